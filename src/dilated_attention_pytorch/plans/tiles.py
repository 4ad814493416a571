"""A pattern as tables of tiles: which blocks of keys each block of queries visits, and with which counts.

Any pattern on any positions has this form. Blocks are found from coarse to fine by bounds on the counts, so empty
regions are never visited; only tiles whose counts are not all equal are looked at pair by pair.

Legend: Q query blocks, K key blocks, W the longest list of a block, T distinct partial tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans.base import Plan
from dilated_attention_pytorch.plans.tile_search import (
    MOST_COUNT,
    Reader,
    Tiles,
    find_tiles,
    make_reader,
    read_partial,
)
from dilated_attention_pytorch.problem import Problem

BLOCK_SIZE = (128, 64)
"""Query rows and key rows of a tile."""
PARTIAL_PAIRS = 1 << 30
"""A pattern with more pairs in partial tiles gets no tables, but where they were chosen: reading costs too much."""
TABLE_BYTES = 1 << 28
"""The most that distinct partial tiles may take at once."""


class TileLists(NamedTuple):
    """For each block of one side, its tiles: how many, which blocks of the other side, and a number for each.

    ``num`` (B or 1, H or 1, blocks); ``idx`` and ``value`` (B or 1, H or 1, blocks, W), ascending, then zeros; int32.
    """

    num: Tensor
    idx: Tensor
    value: Tensor

    def to(self, device: torch.device) -> TileLists:
        """The same lists on a device."""
        return TileLists(*(x.to(device) for x in self))


@dataclass(frozen=True, eq=False)
class TilePlan(Plan):
    """Tables ``(B or 1, H or 1, ...)`` of the tiles that are not empty, by query block and transposed by key block.

    Blocks are ``block_size`` rows (queries, keys) in row order; the last may be ragged. A *full* tile has one positive
    count c throughout: its logits gain ln c. A *partial* tile names its entry of `counts`, which equal tiles share.
    ``kv_num, kv_idx`` and ``full_num, full_idx`` are the tables that ``BlockMask.from_kv_blocks`` takes.
    """

    block_size: tuple[int, int]
    kv_num: Tensor  # (.., Q)
    kv_idx: Tensor  # (.., Q, W)
    kv_table: Tensor  # (.., Q, W), places in counts
    full_num: Tensor
    full_idx: Tensor
    full_count: Tensor  # (.., Q, W), the count of each full tile
    q_num: Tensor  # (.., K): the same by key block
    q_idx: Tensor
    q_table: Tensor
    full_q_num: Tensor
    full_q_idx: Tensor
    full_q_count: Tensor
    counts: Tensor  # (T, rows, keys of a block), uint8 or int32; 0 past the ragged edge and on padded keys

    def expand(self, problem: Problem) -> Tensor:
        (bq, bk), (nq, nk) = self.block_size, (problem.query_length, problem.key_length)
        b, h, q_blocks = self.kv_num.shape
        k_blocks = self.q_num.shape[2]
        whole = torch.zeros((b, h, q_blocks, k_blocks, bq, bk), dtype=torch.int64, device=self.counts.device)
        for at, table in _entries(self.kv_num, self.kv_idx, self.kv_table):
            whole[at] += self.counts[table]
        for at, count in _entries(self.full_num, self.full_idx, self.full_count):
            whole[at] += count.view(-1, 1, 1)
        rows = whole.permute(0, 1, 2, 4, 3, 5).reshape(b, h, q_blocks * bq, k_blocks * bk)[:, :, :nq, :nk]
        return rows.expand(problem.batch, problem.num_heads, nq, nk)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Samples and heads of the tables, blocks of queries, blocks of keys."""
        samples, heads, blocks = self.kv_num.shape
        return samples, heads, blocks, self.q_num.shape[2]

    @property
    def num_tiles(self) -> int:
        """Tiles that are visited, over the samples and heads of the tables."""
        return int(self.kv_num.sum()) + int(self.full_num.sum())

    @property
    def density(self) -> float:
        """Share of all tiles that are visited."""
        return self.num_tiles / max(1, self.kv_num.numel() * self.q_num.shape[2])

    def issued_pairs(self, problem: Problem) -> int:
        repeats = problem.batch * problem.num_heads // max(1, self.kv_num.shape[0] * self.kv_num.shape[1])
        return repeats * self.num_tiles * self.block_size[0] * self.block_size[1]

    def counted_pairs(self, problem: Problem, filling: Tensor | None = None) -> int:
        """Query-key pairs over all samples and heads, each as often as it is seen; without the rows ``filling``."""
        (bq, bk), nk = self.block_size, problem.key_length
        nq = problem.query_length + (0 if filling is None else len(filling))
        blocks = torch.arange(self.kv_num.shape[2], device=self.counts.device)
        held = (nq - blocks * bq).clamp(max=bq)  # rows that count
        if filling is not None:
            held -= torch.bincount(filling // bq, minlength=len(held))
        within = self.counts.sum(2, dtype=torch.int64).cumsum(1)  # (T, rows): what fills stands at the end of a block
        pairs = 0
        for (_, _, row, _), table in _entries(self.kv_num, self.kv_idx, self.kv_table):
            pairs += int(within[table, held[row] - 1].sum())
        for (_, _, row, column), count in _entries(self.full_num, self.full_idx, self.full_count):
            pairs += int((held[row] * (nk - column * bk).clamp(max=bk) * count).sum())
        return pairs * (problem.batch * problem.num_heads // max(1, self.kv_num.shape[0] * self.kv_num.shape[1]))

    def describe(self, problem: Problem) -> str:
        size = f"{self.block_size[0]} x {self.block_size[1]}"
        share = f"{100 * self.density:.3g} % of them visited"
        return f"tiles: blocks of {size}, {share}, {self.counts.shape[0]} distinct partial ones"


def _entries(num: Tensor, idx: Tensor, value: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """((sample, head, row block, column block), value) of all entries of a table, as one item if there are any."""
    held = torch.arange(idx.shape[-1], device=idx.device) < num.unsqueeze(-1)
    if bool(held.any()):
        b, h, row, _ = held.nonzero(as_tuple=True)
        yield (b, h, row, idx[held].long()), value[held].long()


class FoundTiles(NamedTuple):
    """The tiles of a pattern that may hold a pair, found by bounds; `plan` reads the counts that these leave open.

    ``tables`` is how many samples and heads they are for. ``uniform`` is the count of tiles known to be full, else 0.
    Tiles stand by sample, head, query block and key block.
    """

    pattern: Pattern
    problem: Problem
    block_size: tuple[int, int]
    reader: Reader
    tables: tuple[int, int]
    tiles: Tiles
    uniform: Tensor

    @classmethod
    def of(cls, pattern: Pattern, problem: Problem, block_size: tuple[int, int]) -> FoundTiles:
        """Those of a pattern at the problem's positions."""
        reader, samples, heads = make_reader(pattern, problem)
        tiles, uniform = find_tiles(reader, samples, heads, block_size)
        return cls(pattern, problem, block_size, reader, (samples, heads), tiles, uniform)

    def blocks(self, by_key: bool) -> int:
        """Blocks of keys, or of queries."""
        at, size = (self.reader.k_at, self.block_size[1]) if by_key else (self.reader.q_at, self.block_size[0])
        return -(-len(at) // size)

    def take(self, which: Tensor) -> FoundTiles:
        """Some of the tiles, for tables of the same shapes."""
        return self._replace(tiles=self.tiles.take(which), uniform=self.uniform[which])

    def examples(self) -> tuple[Tiles, Tensor]:
        """Tiles that stand for all that are to be read, and for each of those the place of the one like it."""
        return self.reader.examples(self.tiles.take(self.uniform == 0), self.block_size)

    def plan(self, most_pairs: int | None = None, most_bytes: int | None = None) -> TilePlan | None:
        """The tables, or None when more than ``most_pairs`` would be read, or those that differ pass ``most_bytes``.

        None, too, when a count is above `MOST_COUNT`.
        """
        if bool((self.uniform > MOST_COUNT).any()):
            return None
        examples, alike = self.examples()
        if most_pairs is not None and len(examples.q) * self.block_size[0] * self.block_size[1] > most_pairs:
            return None
        read = read_partial(self.reader, examples, self.block_size, most_bytes)
        if read is None:
            return None
        unsure, count = self.uniform == 0, self.uniform.clone()
        count[unsure] = read.uniform[alike]  # 0: empty after all, above 0: full, -1: partial
        table = torch.zeros_like(count)
        table[unsure] = read.table[alike]
        lists = []
        for by_key in (False, True):
            shape = (*self.tables, self.blocks(by_key))
            for chosen, value in ((count < 0, table), (count > 0, count)):
                lists.append(_lists(self.tiles.take(chosen), value[chosen], by_key, shape))
        device = self.problem.q.device if self.problem.q.device.type != "meta" else torch.device("cpu")
        kv, full, q, full_q = (x.to(device) for x in lists)
        return TilePlan(self.pattern, self.block_size, *kv, *full, *q, *full_q, read.counts.to(device))


def tile_plan(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = BLOCK_SIZE) -> TilePlan | None:
    """The tile plan of a pattern, or None when its tables would be too large.

    Too large: partial tiles that differ hold more than `PARTIAL_PAIRS` pairs or `TABLE_BYTES`. How many differ can
    depend on tables that were chosen from data: `ranges.TileRanges` walks such a pattern in the same order, then.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> q = torch.zeros(1, 512, 2, 8)
        >>> plan = tile_plan(Causal(), make_problem(q, q, q, scale=1.0, query_start=0), block_size=(128, 128))
        >>> plan.full_num.tolist(), plan.kv_idx.flatten().tolist(), plan.counts.shape
        ([[[0, 1, 2, 3]]], [0, 1, 2, 3], torch.Size([1, 128, 128]))
    """
    return FoundTiles.of(pattern, problem, block_size).plan(PARTIAL_PAIRS, TABLE_BYTES)


def visited_tiles(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = BLOCK_SIZE) -> int:
    """How many tiles may hold a pair, over the samples and heads of the tables; by bounds alone, no table is made.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> q = torch.zeros(1, 512, 2, 8)
        >>> visited_tiles(Causal(), make_problem(q, q, q, scale=1.0, query_start=0), block_size=(128, 128))
        10
    """
    return len(FoundTiles.of(pattern, problem, block_size).tiles.q)


def _lists(rows: Tiles, value: Tensor, by_key: bool, shape: tuple[int, int, int]) -> TileLists:
    """Padded lists by query block, or by key block, of tiles; ``shape`` is (samples, heads, blocks of that side)."""
    row, column = (rows.k, rows.q) if by_key else (rows.q, rows.k)
    flat = (rows.sample * shape[1] + rows.head) * shape[2] + row
    if by_key:
        order = torch.argsort(flat, stable=True)  # columns stay ascending
        flat, column, value = flat[order], column[order], value[order]
    num = torch.bincount(flat, minlength=shape[0] * shape[1] * shape[2])
    width = int(num.max()) if num.numel() else 0
    place = torch.arange(len(flat)) - (num.cumsum(0) - num)[flat]
    tables = []
    for given in (column, value):
        table = torch.zeros((len(num), width), dtype=torch.int32)
        table[flat, place] = given.to(torch.int32)
        tables.append(table.view(*shape, width))
    return TileLists(num.to(torch.int32).view(shape), *tables)
