"""Tables of tiles that would be too large together, made for some blocks of queries at a time.

What the tables of a choice take depends on what was chosen, and later tokens may have chosen it. They must not change
how a row is summed (law 5), so a pattern with such tables is walked in the same order whatever they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans import tiles
from dilated_attention_pytorch.plans.base import Plan, shapes_of
from dilated_attention_pytorch.plans.tile_search import MOST_COUNT
from dilated_attention_pytorch.plans.tiles import FoundTiles, TilePlan
from dilated_attention_pytorch.problem import Problem


@dataclass(frozen=True, eq=False)
class TileRanges(Plan):
    """The tables of a `TilePlan`, a range of blocks of queries at a time: made when asked for, and not kept.

    Each of `parts` has the shapes of the whole, and the tiles of its own range alone. A block of queries has all of its
    tiles in one part, in the order of the whole, and every number that a backend cuts its work by is that of the whole:
    so a row gets the same sums, bit for bit, whatever the ranges are. ``grid`` is (samples, heads, query blocks, key
    blocks) of the tables; a range is of units, by query block, then sample, then head. ``num_tiles`` counts those that
    may hold a pair.
    """

    block_size: tuple[int, int]
    placed: Problem
    grid: tuple[int, int, int, int]
    ranges: tuple[tuple[int, int], ...]
    num_tiles: int

    def parts(self) -> Iterator[TilePlan]:
        """The tables of each range, one after another.

        Raises InvalidInput when a count is above `MOST_COUNT`.
        """
        found = FoundTiles.of(self.pattern, self.placed, self.block_size)
        unit = _units(found)
        for first, last in self.ranges:
            plan = found.take((unit >= first) & (unit < last)).plan()
            if plan is None:
                raise InvalidInput(f"attend: expected counts up to {MOST_COUNT}. Got more; scale the tables down.")
            yield plan

    def expand(self, problem: Problem) -> Tensor:
        counts = torch.zeros((), dtype=torch.int64)
        for part in self.parts():
            counts = counts.to(part.counts.device) + part.expand(problem)
        return counts

    def issued_pairs(self, problem: Problem) -> int:
        """At most: tiles that turn out to be empty are counted."""
        repeats = problem.batch * problem.num_heads // max(1, self.grid[0] * self.grid[1])
        return repeats * self.num_tiles * self.block_size[0] * self.block_size[1]

    def counted_pairs(self, problem: Problem, filling: Tensor | None = None) -> int:
        """Query-key pairs over all samples and heads, as `TilePlan.counted_pairs`."""
        return sum(part.counted_pairs(problem, filling) for part in self.parts())

    def describe(self, problem: Problem) -> str:
        share = f"up to {100 * self.num_tiles / max(1, math.prod(self.grid)):.3g} % of them visited"
        size = f"{self.block_size[0]} x {self.block_size[1]}"
        return f"tiles: blocks of {size}, {share}, tables made in {len(self.ranges)} parts"


def tile_ranges(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = tiles.BLOCK_SIZE) -> TileRanges:
    """The tile plan of a pattern in ranges, each with tables within `TABLE_BYTES` or of a single unit.

    Counts above 255 take four times as much.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> q = torch.zeros(1, 512, 2, 8)
        >>> plan = tile_ranges(Causal(), make_problem(q, q, q, scale=1.0, query_start=0), (128, 128))
        >>> plan.ranges, [part.full_num.tolist() for part in plan.parts()]
        (((0, 4),), [[[[0, 1, 2, 3]]]])
    """
    found = FoundTiles.of(pattern, problem, block_size)
    (samples, heads), q_blocks, k_blocks = found.tables, found.blocks(by_key=False), found.blocks(by_key=True)
    most = max(1, tiles.TABLE_BYTES // (block_size[0] * block_size[1]))
    ranges = tuple(_ranges(found, samples * heads * q_blocks, most))
    grid = (samples, heads, q_blocks, k_blocks)
    return TileRanges(pattern, block_size, shapes_of(problem), grid, ranges, len(found.tiles.q))


def _units(found: FoundTiles) -> Tensor:
    """For each tile the number of its unit."""
    (samples, heads), at = found.tables, found.tiles
    return (at.q * samples + at.sample) * heads + at.head


def _ranges(found: FoundTiles, units: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of units whose tiles stand for at most ``most`` to be read; the last ends at ``units``."""
    examples, alike = found.examples()
    unit = _units(found)[found.uniform == 0]
    order = torch.argsort(unit, stable=True)
    numbers, lengths = (x.tolist() for x in unit[order].unique_consecutive(return_counts=True))
    taken = np.full(len(examples.q), -1)  # the range that each example was counted for
    first, held, number = 0, 0, 0
    for at, mine in zip(numbers, alike[order].split(lengths)):
        wanted = np.unique(mine.numpy())
        new = int((taken[wanted] != number).sum())
        if held > 0 and held + new > most:
            yield first, at
            first, held, number, new = at, 0, number + 1, len(wanted)
        taken[wanted] = number
        held += new
    yield first, units
