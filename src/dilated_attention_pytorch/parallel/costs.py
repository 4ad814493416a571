"""The work of every rank of a world, how even it is, and which layout makes it even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dilated_attention_pytorch.parallel.grouping import group_rows, two_worlds
from dilated_attention_pytorch.parallel.heads import inside
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout, row_count
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans.base import block_counts
from dilated_attention_pytorch.plans.pairs import closed_form_pairs
from dilated_attention_pytorch.problem import Positions, Problem, positions_tensor

EVEN = 1.1
"""A world is even when its heaviest rank has at most so many times the mean work."""
SAMPLED_PAIRS = 1 << 23
"""Without a closed form about so many pairs of a world are looked at."""
_SEED = 20230705


@dataclass(frozen=True)
class Work:
    """Counted pairs of each rank, over samples and heads; exact, or estimated from samples of the pairs.

    Example:
        >>> Work((30, 10), True).imbalance
        1.5
    """

    pairs: tuple[int, ...]
    is_exact: bool

    @property
    def total(self) -> int:
        """Pairs of all ranks together."""
        return sum(self.pairs)

    @property
    def heaviest(self) -> int:
        """Pairs of the rank that has most."""
        return max(self.pairs)

    @property
    def imbalance(self) -> float:
        """The heaviest rank's pairs over the mean; 1 where there are none."""
        return self.heaviest * len(self.pairs) / self.total if self.total else 1.0


def rank_work(problem: Problem, pattern: Pattern, world: World, inner: int = 1) -> Work:
    """The work of each rank of a world: its own queries and all keys.

    Where ``inner`` ranks exchange heads for tokens it is the queries of all of these, and its own heads; all ranks do
    with method "all_to_all". Of the problem only batch, heads, dtype and padding are read. Exact for patterns in closed
    form, in well under a second at any length; others are estimated from a sample of pairs, the same on every rank.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> x = torch.empty(1, 1, 8, 64, device="meta").expand(1, 10**9, 8, 64)
        >>> problem = make_problem(x, x, x, scale=1.0, query_start=0)
        >>> [round(rank_work(problem, Causal(), planned_world(problem, name, 64)).imbalance, 3) for name in LAYOUTS]
        [1.984, 1.0, 1.0]
    """
    whole, exact = group_rows(world.keys).positions, True
    shares = [0] * world.size
    for column in range(inner):
        outer, row = two_worlds(replace(world, rank=column), inner)
        local, own = inside(problem, pattern, row)
        pairs, is_exact = _pairs(replace(local, key_positions=whole), own, outer.queries)
        shares[column::inner] = pairs
        exact = exact and is_exact
    return Work(tuple(shares), exact)


def planned_world(problem: Problem, layout: str, size: int, rank: int = 0) -> World:
    """The world in which ``size`` ranks share a whole problem, rows dealt as the layout says; nothing is sent in it."""

    def dealt(positions: Positions) -> tuple[Positions, ...]:
        rows = Layout(layout, row_count(positions), size, positions[0].start if positions else 0)
        return tuple(rows.positions(r) for r in range(size))

    return World(rank, dealt(problem.query_positions), dealt(problem.key_positions))


def layout_imbalance(problem: Problem, pattern: Pattern, size: int) -> dict[str, float]:
    """The imbalance of each layout for a whole problem that ``size`` ranks share, each with its own queries.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> x = torch.empty(1, 64, 1, 8, device="meta")
        >>> layout_imbalance(make_problem(x, x, x, scale=1.0, query_start=0), Causal(), 2)["zigzag"]
        1.0
    """
    return {name: rank_work(problem, pattern, planned_world(problem, name, size)).imbalance for name in LAYOUTS}


def best_layout(problem: Problem, pattern: Pattern, size: int) -> str:
    """The first layout that is even for a whole problem which ``size`` ranks share, as `first_even` says.

    What comes from other ranks is not weighed; ``explain_world(..., layout="auto")`` does.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> x = torch.empty(1, 64, 1, 8, device="meta")
        >>> best_layout(make_problem(x, x, x, scale=1.0, query_start=0), Causal(), 2)
        'zigzag'
    """
    return first_even(layout_imbalance(problem, pattern, size))


def first_even(imbalance: dict[str, float]) -> str:
    """The first of the layouts whose imbalance is at most `EVEN`, else the one with the least.

    They stand in the order contiguous, zigzag, striped: neighbours share segments, and the more of them stand on one
    rank, the fewer rows of dilated branches come from others.

    Example:
        >>> first_even({"contiguous": 1.9, "zigzag": 1.05, "striped": 1.0})
        'zigzag'
    """
    even = (name for name, found in imbalance.items() if found <= EVEN)
    return next(even, min(imbalance, key=imbalance.__getitem__))


def _pairs(problem: Problem, pattern: Pattern, queries: Sequence[Positions]) -> tuple[list[int], bool]:
    """Pairs of each set of queries with the problem's keys, and whether they are exact."""
    closed = closed_form_pairs(pattern, problem, queries)
    if closed is not None:
        return closed, True
    budget = SAMPLED_PAIRS // max(len(queries) * problem.num_heads * problem.batch, 1)
    keys = _drawn(problem.key_positions, max(64, int(budget**0.5) * 8))
    shares, exact = [], len(keys) == row_count(problem.key_positions)
    for positions in queries:
        rows = _drawn(positions, max(8, budget // max(len(keys), 1)))
        heads = torch.arange(problem.num_heads)
        counts = block_counts(pattern, problem, heads, rows, keys)
        places = row_count(positions) * row_count(problem.key_positions)
        seen = int(counts.expand(problem.batch, -1, -1, -1).sum())
        drawn = len(rows) * len(keys)
        shares.append(seen * places // drawn if drawn else 0)
        exact = exact and len(rows) == row_count(positions)
    return shares, exact


def _drawn(positions: Positions, most: int) -> torch.Tensor:
    """All positions where they are few, else as many drawn from a fixed seed, one from each of as many equal parts."""
    rows = row_count(positions)
    if rows <= most:
        return positions_tensor(positions)
    generator = torch.Generator().manual_seed(_SEED)
    part = rows / most
    numbers = ((torch.arange(most) + torch.rand(most, generator=generator, dtype=torch.float64)) * part).long()
    numbers = numbers.clamp(max=rows - 1)
    ends = torch.tensor([run.length for run in positions]).cumsum(0)
    which = torch.searchsorted(ends, numbers, right=True)
    start, step = (torch.tensor([run[i] for run in positions]) for i in (0, 1))
    return start[which] + (numbers - torch.cat((ends.new_zeros(1), ends))[which]) * step[which]
