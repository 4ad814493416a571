"""Which method serves a problem with the least on the wire, chosen alike on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from torch import Tensor

from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.parallel import gather, heads, ring
from dilated_attention_pytorch.parallel.costs import EVEN, Work, rank_work
from dilated_attention_pytorch.parallel.layouts import row_count
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans.planner import digest
from dilated_attention_pytorch.problem import Problem


class Method(Protocol):
    """What a method says of itself before it does anything: why it cannot, what a rank receives; and what it does."""

    @property
    def reasons_against(self) -> Callable[[Problem, Pattern, World], list[str]]:
        """Why it cannot serve a problem; empty means it can."""

    @property
    def traffic(self) -> Callable[[Problem, Pattern, World], Traffic]:
        """What the world's own rank receives."""

    @property
    def forward(self) -> Callable[[Problem, Pattern, World, str], tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
        """(out, lse, what backward wants besides) of the rank's queries, by a backend of this name."""

    @property
    def backward(self) -> Callable[..., Gradients]:
        """The gradients of the rank's rows from (problem, pattern, world, dout, dlse, out, lse, kept, backend)."""


METHODS: Mapping[str, Method] = {"gather": gather, "ring": ring, "all_to_all": heads}
"""The methods by name; of those that receive equally much the first is taken."""
ASKED_RANKS = 32
"""Of a larger world so many ranks are asked what they receive, evenly spread from the first to the last."""
CHOOSING_RANKS = 8
"""So many are asked where a method is to be chosen, on the way to a result."""
_cache = BoundedCache(256)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Choice:
    """The method that is taken, and what it goes by.

    ``received`` is what the busiest rank receives, of those that were asked, and ``imbalance`` the heaviest rank's work
    over the mean, of each method that can; ``refused`` holds the reasons of the others.
    """

    name: str
    because: str
    received: dict[str, Traffic] = field(default_factory=dict)
    imbalance: dict[str, float] = field(default_factory=dict)
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)


def check_method(name: str) -> None:
    """Raise InvalidInput unless it is "auto" or the name of a method."""
    if name != "auto" and name not in METHODS:
        raise InvalidInput(f"expected method to be one of 'auto', {', '.join(map(repr, METHODS))}. Got {name!r}.")


def choose_method(problem: Problem, pattern: Pattern, world: World, name: str = "auto") -> Choice:
    """The method of this name, or with "auto" the one that puts least on the wire, if its work is even enough.

    Of the methods that can, those are left out whose imbalance is more than `EVEN` times the least; of the others the
    one is taken with which the busiest rank receives the fewest bytes, forward and backward together. Only what all
    ranks know alike goes into it, so that all choose alike; what was found is kept for the next call.

    Raises InvalidInput for another name, and NoBackend with every reason when the named one, or none, can.
    """
    check_method(name)
    refused = {n: tuple(method.reasons_against(problem, pattern, world)) for n, method in METHODS.items()}
    refused = {n: reasons for n, reasons in refused.items() if reasons}
    asked = METHODS if name == "auto" else [name]
    able = [n for n in asked if n not in refused]
    if not able:
        reasons = "; ".join(reason for n in asked for reason in refused[n])
        raise NoBackend(f"no method can share this problem among {world.size} ranks: {reasons}.")
    if name != "auto" or len(able) == 1 or world.size == 1:
        why = "it was asked for" if name != "auto" else "the only one that can" if len(able) == 1 else "nothing is sent"
        return Choice(able[0], why, refused=refused)

    def compare() -> tuple[dict[str, Traffic], dict[str, float]]:
        found = {n: most_received(received_by(n, problem, pattern, world, CHOOSING_RANKS)) for n in able}
        return found, {n: method_work(n, problem, pattern, world).imbalance for n in able}

    received, imbalance = _kept(" ".join(able), problem, pattern, world, compare)
    even = [n for n in able if imbalance[n] <= EVEN * min(imbalance.values())]
    best = min(even, key=lambda n: received[n].total)
    because = "the fewest bytes of those that can"
    if len(even) < len(able):
        because += f" and whose work is even ({', '.join(n for n in able if n not in even)} is not)"
    return Choice(best, because, received, imbalance, refused)


def received_by(name: str, problem: Problem, pattern: Pattern, world: World, most: int | None = None) -> list[Traffic]:
    """What each rank receives with a method; of a large world those of `asked_ranks`. Kept in a bounded cache."""
    traffic = METHODS[name].traffic

    def find() -> list[Traffic]:
        ranks = asked_ranks(world.size, most)
        return [traffic(rank_problem(problem, world, r), pattern, replace(world, rank=r)) for r in ranks]

    return _kept(f"received {name} {most}", problem, pattern, world, find)


def method_work(name: str, problem: Problem, pattern: Pattern, world: World) -> Work:
    """The work of each rank with a method. Kept in a bounded cache."""
    inner = world.size if name == "all_to_all" else 1
    return _kept(f"work {inner}", problem, pattern, world, lambda: rank_work(problem, pattern, world, inner))


def most_received(found: Sequence[Traffic]) -> Traffic:
    """The most that any rank receives forward, and the most that any receives backward.

    Example:
        >>> most_received([Traffic(1, 9), Traffic(4, 2)])
        Traffic(forward=4, backward=9)
    """
    return Traffic(max(x.forward for x in found), max(x.backward for x in found))


def asked_ranks(size: int, most: int | None = None) -> list[int]:
    """The ranks of a world that stand for all, at most `ASKED_RANKS` unless given.

    Example:
        >>> asked_ranks(3), asked_ranks(1024)[:3], asked_ranks(1024)[-1]
        ([0, 1, 2], [0, 33, 66], 1023)
    """
    most = ASKED_RANKS if most is None else most
    if size <= most:
        return list(range(size))
    return [number * (size - 1) // (most - 1) for number in range(most)]


def rank_problem(problem: Problem, world: World, rank: int) -> Problem:
    """The problem as another rank has it: the same but for its rows, which hold no numbers."""
    q, k, v = (
        x.new_empty(1, device="meta").expand(x.shape[0], row_count(at[rank]), *x.shape[2:])
        for x, at in ((problem.q, world.queries), (problem.k, world.keys), (problem.v, world.keys))
    )
    return replace(problem, q=q, k=k, v=v, query_positions=world.queries[rank], key_positions=world.keys[rank])


def _kept(what: str, problem: Problem, pattern: Pattern, world: World, find: Callable[[], Found]) -> Found:
    """What ``find`` gives, or gave when the same was asked of a like problem, on whichever rank of a like world."""
    p = problem
    key = (
        what,
        pattern.text(),
        tuple(map(digest, pattern.tables)),
        (p.batch, p.num_heads, p.k.shape[2], p.q.shape[3], p.v.shape[3]),
        (p.q.dtype, p.key_lengths, p.of_heads, p.partial),
        world.queries,
        world.keys,
    )
    return _cache.get(key, find)
