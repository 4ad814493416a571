"""What a world would do for a problem, and why: method, bytes and FLOPs of its ranks, how even, what overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.flops import backward_flops, forward_flops
from dilated_attention_pytorch.parallel import heads
from dilated_attention_pytorch.parallel.choice import (
    METHODS,
    Choice,
    asked_ranks,
    choose_method,
    most_received,
    rank_problem,
    received_by,
)
from dilated_attention_pytorch.parallel.costs import EVEN, Work, first_even, layout_imbalance, planned_world, rank_work
from dilated_attention_pytorch.parallel.grouping import two_worlds
from dilated_attention_pytorch.parallel.layouts import row_count
from dilated_attention_pytorch.parallel.machines import Machine, machine_named
from dilated_attention_pytorch.parallel.sight import sources
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans.pairs import closed_form_pairs
from dilated_attention_pytorch.problem import Problem, check_inputs, make_problem

MIB = 2**20


class Overlap(NamedTuple):
    """Seconds of the busiest rank: on the wire, computing beside it, and of the wire what that hides.

    Example:
        >>> Overlap(2.0, 5.0, 1.5).share
        0.75
    """

    wire: float
    beside: float
    hidden: float

    @property
    def share(self) -> float:
        """The share of the transfers that computing hides; 1 where nothing is sent."""
        return self.hidden / self.wire if self.wire > 0 else 1.0

    @property
    def exposed(self) -> float:
        """Seconds that are waited for."""
        return self.wire - self.hidden


class Leg(NamedTuple):
    """One way on which rows travel: by which method, among how many ranks, in how many messages to a rank at most.

    These stand apart as far as ``span`` neighbours do. ``received`` is what comes to the busiest rank for one call.
    """

    method: str
    ranks: int
    span: int
    messages: int
    received: Traffic


@dataclass(frozen=True)
class WorldExplanation:
    """What `context_parallel_attend` would do in a world, for one call. ``str()`` gives the text.

    ``rows`` are the fewest and the most queries of a rank; ``work`` its counted pairs; ``received`` the bytes of the
    busiest rank and ``mean_received`` of the mean one, ``legs`` on which ways they come; ``methods`` the busiest rank's
    bytes with each method that can; ``layouts`` the imbalance of each. ``forward`` and ``backward`` are what the
    machine is expected to hide.
    """

    problem: str
    ranks: int
    layout: str
    rows: tuple[int, int]
    choice: Choice
    work: Work
    dims: tuple[int, int]
    dtype: str
    received: Traffic
    mean_received: Traffic
    legs: tuple[Leg, ...]
    methods: dict[str, Traffic]
    layouts: dict[str, float]
    forward: Overlap
    backward: Overlap
    machine: Machine

    @property
    def forward_flops(self) -> int:
        """FLOPs of the heaviest rank, ``2 (D + Dv)`` for each of its pairs; backward has 2.5 times as many."""
        return forward_flops(self.work.heaviest, *self.dims)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the heaviest rank's backward pass."""
        return backward_flops(self.work.heaviest, *self.dims)

    @property
    def seconds(self) -> float:
        """Seconds expected for forward and backward: the heaviest rank's computing, and what the busiest waits for."""
        return self.computing + self.forward.exposed + self.backward.exposed

    @property
    def computing(self) -> float:
        """Seconds for the heaviest rank's FLOPs."""
        return self.machine.compute_seconds(self.forward_flops + self.backward_flops, self.dtype)

    def is_faster_than(self, imbalance: float) -> bool:
        """Whether no layout with this imbalance could be faster, even if it sent nothing.

        Not known where heads may be dealt out: their work is as even in every layout.
        """
        return "all_to_all" in self.choice.refused and self.seconds <= self.computing * imbalance / self.work.imbalance

    def __str__(self) -> str:
        about = "" if self.work.is_exact else ", estimated from a sample (the pattern has no closed form)"
        m, even = self.machine, ", ".join(f"{name} {imbalance:.3f}" for name, imbalance in self.layouts.items())
        lines = [
            ("problem", self.problem),
            ("world", f"{self.ranks} ranks, {self.layout}, {self.rows[0]:,} to {self.rows[1]:,} rows on a rank"),
            ("method", f"{' and '.join(map(_way, self.legs)) or self.choice.name}: {self.choice.because}"),
            ("pairs", f"{self.work.heaviest:,} on the heaviest rank{about}"),
            ("FLOPs", f"per rank and layer {self.forward_flops:.3e} forward, {self.backward_flops:.3e} backward"),
            ("imbalance", f"{self.work.imbalance:.3f} (the heaviest rank's work over the mean)"),
            ("bytes", f"per rank and layer {_mib(self.received)} come to the busiest,"),
            ("", f"{_mib(self.mean_received)} to the mean"),
            ("overlap", f"{_hidden('forward', self.forward)}; {_hidden('backward', self.backward)},"),
            ("", f"on {m.name} at {m.attained:.0%} of its matrix rate and {m.attained_bandwidth:.0%} of its bandwidth"),
            ("", f"{'between nodes' if m.spans_nodes(self.ranks) else 'inside a node'}, which are assumed"),
            *((name, f"{_mib(received)} come to the busiest") for name, received in self.methods.items()),
            *((name, "no: " + "; ".join(reasons)) for name, reasons in self.choice.refused.items()),
            ("layouts", f"imbalance {even}; the first that is even (up to {EVEN}): {first_even(self.layouts)}"),
        ]
        return "\n".join(f"{name:<11}{told}" for name, told in lines)


def explain_world(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    world: int,
    inner: int = 1,
    layout: str = "contiguous",
    method: str = "auto",
    machine: str | Machine = "h100",
    **options: Any,
) -> WorldExplanation:
    """What ``world`` ranks would do that share the problem of `attend` with the same arguments; nothing is sent.

    ``q``, ``k`` and ``v`` are whole, (B, N, H, D); only their shapes and dtype are read, and meta tensors will do. With
    ``inner`` ranks in a row of a mesh, heads are exchanged for tokens inside rows and ``method`` is that between them.
    ``layout="auto"`` takes the one that is expected to be the fastest on ``machine``, a `Machine` or its name. Further
    options are those of `attend` that change what is asked: scale, bias, score, key_padding_mask, dropout_p,
    query_start.

    Raises InvalidInput as `attend` does, and for worlds that cannot be; NoBackend when no method can.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import longnet
        >>> x = torch.empty(1, 1, 16, 48, dtype=torch.bfloat16, device="meta").expand(1, 1 << 20, 16, 48)
        >>> found = explain_world(x, x, x, longnet([1024, 32768, 1 << 20], [1, 4, 16]), world=8, layout="auto")
        >>> found.layout, found.choice.name, round(found.work.imbalance, 2)
        ('contiguous', 'gather', 1.0)
    """
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"explain_world: expected a pattern such as Causal(). Got {type(pattern).__name__}.")
    for name, number in (("world", world), ("inner", inner)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InvalidInput(f"explain_world: expected {name} to be at least one rank. Got {number!r}.")
    device = machine_named(machine) if isinstance(machine, str) else machine
    scale, start = check_inputs(q, k, v, **options)
    given = {name: options[name] for name in ("bias", "score", "key_padding_mask", "dropout_p") if name in options}
    whole = make_problem(q, k, v, scale=scale, query_start=start, **given)
    pattern.check(whole)
    layouts = layout_imbalance(whole, pattern, world)

    def explained(name: str) -> WorldExplanation:
        plan = _Plan(whole, pattern, planned_world(whole, name, world), inner)
        return _explained(plan, choose_method(*plan.at(0)[:3], method), layouts, name, device)

    if layout != "auto":
        return explained(layout)
    best: WorldExplanation | None = None
    for name, imbalance in layouts.items():
        if best is None or not best.is_faster_than(imbalance):
            found = explained(name)
            best = found if best is None or found.seconds < best.seconds else best
    assert best is not None
    return best


@dataclass(frozen=True, eq=False)
class _Plan:
    """A whole problem and the world that is to share it; ``inner`` ranks of a row exchange heads for tokens."""

    whole: Problem
    pattern: Pattern
    world: World
    inner: int

    def at(self, rank: int) -> tuple[Problem, Pattern, World, World]:
        """What a rank asks of the others in its column, that world, and its row."""
        world = replace(self.world, rank=rank)
        if self.inner == 1:
            alone = World(0, (world.queries[rank],), (world.keys[rank],))
            return rank_problem(self.whole, world, rank), self.pattern, world, alone
        outer, row = two_worlds(world, self.inner)
        against = heads.reasons_against(self.whole, self.pattern, row)
        if against:
            raise InvalidInput(f"explain_world: rows of the mesh exchange heads for tokens. {'; '.join(against)}.")
        return *heads.inside(rank_problem(self.whole, self.world, rank), self.pattern, row), outer, row

    def received(self, name: str) -> list[tuple[Traffic, Traffic]]:
        """What comes to each rank that is asked, inside its row and by the method between rows."""
        if self.inner == 1:
            return [(Traffic(0, 0), found) for found in received_by(name, *self.at(0)[:3])]
        found = []
        for rank in asked_ranks(self.world.size):
            local, part, outer, row = self.at(rank)
            inside = heads.traffic(rank_problem(self.whole, self.world, rank), self.pattern, row)
            found.append((inside, METHODS[name].traffic(local, part, outer)))
        return found

    def legs(self, name: str, found: Sequence[tuple[Traffic, Traffic]]) -> tuple[Leg, ...]:
        """The ways on which rows travel with a method between rows, given what comes to ranks."""
        ranks = asked_ranks(self.world.size)
        busiest = ranks[max(range(len(ranks)), key=lambda number: found[number][1].total)]
        local, part, outer, row = self.at(busiest)
        inside, between = (most_received(x) for x in zip(*found))
        legs = [Leg("all_to_all", row.size, row.size, 2 * (row.size - 1), inside)] * (row.size > 1)
        if outer.size > 1:
            messages = _messages(name, local, part, outer)
            legs.append(Leg(name, outer.size, self.world.size, messages, between))
        return tuple(legs)

    def beside(self, name: str, work: Work) -> float:
        """The share of the heaviest rank's work that needs nothing which is still on the wire.

        In a ring all steps but the last go on beside a transfer; a gather has the rank's own keys (where they stand in
        steps they are taken for its share of all); heads have nothing.
        """
        rank = work.pairs.index(work.heaviest)
        local, part, outer, _ = self.at(rank)
        if outer.size == 1 or work.heaviest == 0:
            return 1.0
        if name != "gather":
            return 0.0 if name == "all_to_all" else 1 - 1 / outer.size
        own = replace(local, key_positions=outer.keys[outer.rank])
        pairs = closed_form_pairs(part, own, [outer.queries[outer.rank]])
        return 1 / outer.size if pairs is None else pairs[0] / work.heaviest


def _explained(
    plan: _Plan, choice: Choice, layouts: dict[str, float], layout: str, machine: Machine
) -> WorldExplanation:
    whole, world = plan.whole, plan.world
    received = {name: plan.received(name) for name in METHODS if name not in choice.refused}
    totals = {name: [_sum(*ways) for ways in found] for name, found in received.items()}
    mine = totals[choice.name]
    legs = plan.legs(choice.name, received[choice.name])
    work = rank_work(whole, plan.pattern, world, world.size if choice.name == "all_to_all" else plan.inner)
    beside = plan.beside(choice.name, work)
    rows = [row_count(at) for at in world.queries]
    dims, dtype = (whole.q.shape[3], whole.v.shape[3]), "bf16" if whole.q.element_size() == 2 else "fp32"

    def overlap(flops: int, sizes: Sequence[int]) -> Overlap:
        wire = [machine.transfer_seconds(g.messages, size, g.span) if size else 0.0 for g, size in zip(legs, sizes)]
        seconds = beside * machine.compute_seconds(flops, dtype)
        last = wire[-1] if wire and len(wire) == 1 + (plan.inner > 1) else 0.0  # heads inside rows come before all else
        return Overlap(sum(wire), seconds, min(last, machine.overlap * seconds))

    return WorldExplanation(
        problem=f"B {whole.batch}, Nq {whole.query_length}, Nk {whole.key_length}, H {whole.num_heads}, "
        f"Hkv {whole.k.shape[2]}, D {dims[0]}, Dv {dims[1]}, {str(whole.q.dtype).removeprefix('torch.')}, "
        f"{plan.pattern.text()}",
        ranks=world.size,
        layout=layout,
        rows=(min(rows), max(rows)),
        choice=choice,
        work=work,
        dims=dims,
        dtype=dtype,
        received=most_received(mine),
        mean_received=Traffic(*(round(sum(x) / len(mine)) for x in zip(*mine))),
        legs=legs,
        methods={name: most_received(found) for name, found in totals.items()},
        layouts=layouts,
        forward=overlap(forward_flops(work.heaviest, *dims), [leg.received.forward for leg in legs]),
        backward=overlap(backward_flops(work.heaviest, *dims), [leg.received.backward for leg in legs]),
        machine=machine,
    )


def _messages(method: str, problem: Problem, pattern: Pattern, world: World) -> int:
    """Messages that the world's own rank receives in a pass: at most one from each rank whose keys it may see."""
    if method == "all_to_all":
        return 2 * (world.size - 1)
    needed, _ = sources(pattern, problem.num_heads, world, problem.key_lengths)
    return sum(part.length > 0 for rank, part in enumerate(needed) if rank != world.rank)


def _sum(*found: Traffic) -> Traffic:
    return Traffic(*map(sum, zip(*found)))


def _mib(traffic: Traffic) -> str:
    return f"{traffic.forward / MIB:,.1f} MiB forward + {traffic.backward / MIB:,.1f} MiB backward"


def _way(leg: Leg) -> str:
    return f"{leg.method} among {leg.ranks}"


def _hidden(name: str, overlap: Overlap) -> str:
    if overlap.wire == 0:
        return f"{name} nothing is sent"
    return f"{name} {overlap.share:.0%} of {1e3 * overlap.wire:,.2f} ms hidden behind {1e3 * overlap.beside:,.2f} ms"
