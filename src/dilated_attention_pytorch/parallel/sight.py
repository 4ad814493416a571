"""Which rows may be seen from where: what is certain to be seen by none is neither sent nor computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.parallel.layouts import joined, row_count
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.problem import Positions, Run

PARTS = 16
"""Blocks into which a run is cut for its bounds."""
MOST_BLOCKS = 4096
"""Blocks of all ranks together, about: in a large world runs are cut into fewer."""


def sees(
    pattern: Pattern,
    num_heads: int,
    queries: Positions,
    keys: Positions,
    key_lengths: Sequence[int] | None = None,
) -> bool:
    """Whether any query may see any key; False is certain.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> sees(Causal(), 1, (Run(0, 1, 8),), (Run(8, 1, 8),)), sees(Causal(), 1, (Run(8, 1, 8),), (Run(0, 1, 8),))
        (False, True)
    """
    q, k = (_side((runs,), PARTS, _device(pattern)) for runs in (queries, keys))
    return bool(_may_see(pattern, num_heads, q, k, key_lengths)[0][0].any())


class Part(NamedTuple):
    """Some of a rank's rows: slices of its shard, and where they stand."""

    slices: tuple[slice, ...] = ()
    positions: Positions = ()

    @property
    def length(self) -> int:
        """How many rows."""
        return row_count(self.positions)


def sources(
    pattern: Pattern, num_heads: int, world: World, key_lengths: Sequence[int] | None = None
) -> tuple[list[Part], list[Part]]:
    """By rank: those of its keys that this rank's queries may see, and those of this rank's that its queries may see.

    Every rank finds the same of the same pair of ranks. Rows are judged in blocks, so a few more may be named.

    Example:
        >>> from dilated_attention_pytorch import Window
        >>> rows = ((Run(0, 1, 64),), (Run(64, 1, 64),))
        >>> needed, _ = sources(Window(9), 1, World(0, rows, rows))
        >>> needed[1]
        Part(slices=(slice(0, 8, None),), positions=(Run(start=64, step=1, length=8),))
    """
    runs = sum(map(len, (*world.queries, *world.keys)))
    parts = max(1, min(PARTS, MOST_BLOCKS // max(1, runs)))
    mine, device = world.rank, _device(pattern)
    queries, keys = (_side(ranks, parts, device) for ranks in (world.queries, world.keys))
    seen = _may_see(pattern, num_heads, queries.of(mine), keys, key_lengths)
    seeing = _may_see(pattern, num_heads, queries, keys.of(mine), key_lengths)
    return (
        [blocks.part(found) for blocks, found in zip(keys.ranks, seen[0])],
        [keys.ranks[mine].part(found) for (found,) in seeing],
    )


class _Blocks(NamedTuple):
    """A rank's rows in blocks of a run."""

    rows: tuple[tuple[int, Run], ...]  # the first row of each block in the shard, and where it stands
    block: Block

    @staticmethod
    def of(positions: Positions, parts: int, device: torch.device) -> _Blocks:
        rows, first = [], 0
        for run in positions:
            for at, length in _equal(run, parts):
                rows.append((first + at, Run(run.start + run.step * at, run.step, length)))
            first += run.length
        low = [run.start for _, run in rows]
        high = [run.start + run.step * (run.length - 1) for _, run in rows]
        step = [run.step if run.length > 1 else 0 for _, run in rows]
        numbers = (torch.tensor(x, dtype=torch.int64, device=device) for x in (low, high, step))
        return _Blocks(tuple(rows), Block(*numbers))

    def part(self, which: Tensor) -> Part:
        """The rows of some blocks, neighbours joined."""
        chosen = [self.rows[i] for i in which.nonzero().flatten().tolist()]
        slices: list[slice] = []
        for first, run in chosen:
            follows = bool(slices) and slices[-1].stop == first
            slices.append(slice(slices.pop().start if follows else first, first + run.length))
        return Part(tuple(slices), joined(run for _, run in chosen))


class _Side(NamedTuple):
    """The rows of several ranks in blocks, and the blocks of all of them together."""

    ranks: tuple[_Blocks, ...]
    block: Block

    def of(self, rank: int) -> _Side:
        """Those of one rank."""
        return _Side((self.ranks[rank],), self.ranks[rank].block)


@lru_cache(maxsize=32)
def _side(positions: tuple[Positions, ...], parts: int, device: torch.device) -> _Side:
    """Kept, since every rank of a world that is planned asks for the same."""
    ranks = tuple(_Blocks.of(runs, parts, device) for runs in positions)
    return _Side(ranks, Block(*(torch.cat(x) for x in zip(*(blocks.block for blocks in ranks)))))


def _may_see(
    pattern: Pattern, num_heads: int, queries: _Side, keys: _Side, key_lengths: Sequence[int] | None
) -> list[list[Tensor]]:
    """For each rank of queries and each of keys: which of the latter's blocks may be seen."""
    q, k = queries.block, keys.block
    device = q.low.device
    may = torch.zeros(q.low.numel(), k.low.numel(), dtype=torch.bool, device=device)
    if may.numel() > 0:
        head = torch.arange(num_heads if pattern.varies_by_head else 1, device=device).view(-1, 1, 1)
        _, most = pattern.count_bounds(head, num_heads, Block(*(x.view(-1, 1) for x in q)), k)
        found = may | (torch.as_tensor(most, device=device) > 0)
        may = found.flatten(0, -3).any(0) if found.dim() > 2 else found
        if key_lengths is not None:
            may = may & (k.low < max(key_lengths, default=0))
    q_sizes, k_sizes = ([len(blocks.rows) for blocks in side.ranks] for side in (queries, keys))
    rows = [part.any(0) for part in may.cpu().split(q_sizes)]
    return [list(row.split(k_sizes)) for row in rows]


def _device(pattern: Pattern) -> torch.device:
    return pattern.tables[0].device if pattern.tables else torch.device("cpu")


def _equal(run: Run, parts: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of up to ``parts`` parts."""
    parts = min(parts, run.length)
    sizes = [run.length // parts + (i < run.length % parts) for i in range(parts)]
    return zip(accumulate([0, *sizes[:-1]]), sizes)
