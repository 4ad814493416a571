"""A pattern as tables of tiles: which blocks of keys each block of queries visits, and with which counts.

Any pattern on any positions has this form. Blocks are found from coarse to fine by bounds on the counts, so empty
regions are never visited; only tiles whose counts are not all equal are looked at pair by pair.

Legend: Q query blocks, K key blocks, W the longest list of a block, T distinct partial tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import BlockSparse, Pattern, pattern_from_text
from dilated_attention_pytorch.patterns.base import And, Block, Sum
from dilated_attention_pytorch.patterns.documents import Packed
from dilated_attention_pytorch.plans.base import Plan
from dilated_attention_pytorch.problem import Problem, positions_tensor

BLOCK_SIZE = (128, 64)
"""Query rows and key rows of a tile."""
FAN = 8
"""A region of blocks is cut in so many parts per side, from the whole down to single tiles."""
PARTIAL_PAIRS = 1 << 30
"""A pattern with more pairs in partial tiles gets no tables: reading its counts would cost more than it saves."""
TABLE_BYTES = 1 << 28
"""The most that distinct partial tiles may take."""
SEEN_BLOCKS = 1 << 27
"""Up to so many blocks of all heads are looked up in a table of blocks at once (bytes)."""
_CHUNK_PAIRS = 1 << 18  # chunks that stay in the cache: 4 times as fast as 1 << 22
_CHUNK_TILES = 1 << 19


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
    counts: Tensor  # (T, block of queries, block of keys) uint8, 0 past the ragged edge and on padded keys

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


class _Tiles(NamedTuple):
    """A list of tiles; every field has one number for each."""

    sample: Tensor
    head: Tensor
    q: Tensor
    k: Tensor

    def take(self, which: Tensor) -> _Tiles:
        return _Tiles(*(x[which] for x in self))


def tile_plan(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = BLOCK_SIZE) -> TilePlan | None:
    """The tile plan of a pattern, or None when its tables would be too large or a count does not fit in 8 bits.

    Too large: partial tiles that differ hold more than `PARTIAL_PAIRS` pairs or `TABLE_BYTES`. Under a choice made from
    data that depends on the data, and a pattern without tables is computed densely, with sums in another order.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> q = torch.zeros(1, 512, 2, 8)
        >>> plan = tile_plan(Causal(), make_problem(q, q, q, scale=1.0, query_start=0), block_size=(128, 128))
        >>> plan.full_num.tolist(), plan.kv_idx.flatten().tolist(), plan.counts.shape
        ([[[0, 1, 2, 3]]], [0, 1, 2, 3], torch.Size([1, 128, 128]))
    """
    reader, samples, heads = _reader(pattern, problem)
    tiles, count = _find(reader, samples, heads, block_size)  # count is 0 where the tile is not known to be full
    unsure = count == 0
    examples, alike = reader.examples(tiles.take(unsure), block_size)
    if len(examples.q) * block_size[0] * block_size[1] > PARTIAL_PAIRS:
        return None
    read = _read_partial(reader, examples, block_size)
    if read is None:
        return None
    count[unsure] = read.uniform[alike]  # 0: empty after all, above 0: full, -1: partial
    table = torch.zeros_like(count)
    table[unsure] = read.table[alike]
    lists = []
    for by_key, at, size in ((False, reader.q_at, block_size[0]), (True, reader.k_at, block_size[1])):
        shape = (samples, heads, -(-len(at) // size))
        for chosen, value in ((count < 0, table), (count > 0, count)):
            lists.append(_lists(tiles.take(chosen), value[chosen], by_key, shape))
    device = problem.q.device if problem.q.device.type != "meta" else torch.device("cpu")
    kv, full, q, full_q = (x.to(device) for x in lists)
    return TilePlan(pattern, block_size, *kv, *full, *q, *full_q, read.counts.to(device))


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
    return len(_find(*_reader(pattern, problem), block_size)[0].q)


def _reader(pattern: Pattern, problem: Problem) -> tuple[_Reader, int, int]:
    """A reader of the counts, and how many samples and heads tables need."""
    q_at, k_at = positions_tensor(problem.query_positions), positions_tensor(problem.key_positions)
    if any(table.device.type not in ("cpu", "meta") for table in pattern.tables):
        pattern = pattern_from_text(pattern.text(), [table.cpu() for table in pattern.tables])  # once, not at each look
    batched = problem.key_lengths is not None or pattern.varies_by_sample
    samples, heads = problem.batch if batched else 1, problem.num_heads if pattern.varies_by_head else 1
    return _Reader(pattern, problem, q_at, k_at), samples, heads


@dataclass(frozen=True, eq=False)
class _Reader:
    """Bounds and counts of a pattern at the problem's rows, padding included, for lists of tiles."""

    pattern: Pattern
    problem: Problem
    q_at: Tensor
    k_at: Tensor

    def bounds(self, tiles: _Tiles, q: Block, k: Block) -> tuple[Tensor, Tensor]:
        """Least and greatest count of tiles of one sample, of blocks ``q`` and ``k``; all have three dims."""
        given = self.pattern.count_bounds(tiles.head, self.problem.num_heads, q, k)
        low, high = (torch.as_tensor(x) for x in given)
        if max(low.dim(), high.dim()) == 4:  # a batch of tables; all tiles are of one sample
            low, high = (x[int(tiles.sample[0]) % len(x)] if x.dim() == 4 else x for x in (low, high))
        if self.problem.key_lengths is not None:
            visible = torch.tensor(self.problem.key_lengths)[tiles.sample]
            low, high = low * (k.high < visible), high * (k.low < visible)
        return low, high

    def examples(self, tiles: _Tiles, block_size: tuple[int, int]) -> tuple[_Tiles, Tensor]:
        """Tiles that stand for all of these, and for each tile the place of the one with equal counts."""
        if len(tiles.q) == 0:
            return tiles, tiles.q
        q, k = (_blocks(at, size).take(i) for at, i, size in self._sides(tiles, block_size))
        signs = self._signs(self.pattern, tiles, q, k)
        signs += [_shapes(*side) for side in self._sides(tiles, block_size)]
        if self.problem.key_lengths is not None:
            span = int((self.k_at.max() - self.k_at.min()).item()) + 1
            signs.append((torch.tensor(self.problem.key_lengths)[tiles.sample] - k.low).clamp(0, span))
        places, alike = _distinct(signs)
        return tiles.take(places), alike

    def _sides(self, tiles: _Tiles, block_size: tuple[int, int]) -> tuple[tuple[Tensor, Tensor, int], ...]:
        return (self.q_at, tiles.q, block_size[0]), (self.k_at, tiles.k, block_size[1])

    def _signs(self, pattern: Pattern, tiles: _Tiles, q: Block, k: Block) -> list[Tensor]:
        """Numbers of tiles: where they agree, and the rows stand alike, the counts are equal.

        The side of a sum or product whose count is the same all over a tile adds that count alone.
        """
        if pattern.period is not None:
            return [tiles.head * pattern.varies_by_head, q.low % pattern.period, k.low - q.low]
        if isinstance(pattern, And | Sum):
            signs = []
            for side in (pattern.left, pattern.right):
                bounds = side.count_bounds(tiles.head, self.problem.num_heads, q, k)
                low, high = (_of_sample(torch.as_tensor(x), tiles) for x in bounds)
                varied = low != high
                signs += [torch.where(varied, -1, low), *(x * varied for x in self._signs(side, tiles, q, k))]
            return signs
        if isinstance(pattern, Packed):
            same, _, *blocks = pattern.documents.shared(q, k)
            same = _of_sample(same, tiles) > 0
            mine, other = (Block(*(_of_sample(x, tiles) for x in block)) for block in blocks)
            inside = self._signs(pattern.inner, tiles, mine, other)
            return [x * ~same for x in (tiles.sample + 1, tiles.head, q.low, k.low)] + [x * same for x in inside]
        if (own := pattern.signs(tiles.head, self.problem.num_heads, q, k)) is not None:
            return [_of_sample(x, tiles) for x in own]
        return [tiles.sample, tiles.head, q.low, k.low]

    def counts(self, tiles: _Tiles, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Counts of some tiles, int64, 0 past the ragged edge; and where a pair exists: (tiles, *block_size) each."""
        (q, q_held), (k, k_held) = (_rows(*side) for side in self._sides(tiles, block_size))
        q, k, n = q.unsqueeze(2), k.unsqueeze(1), len(tiles.q)
        found = torch.as_tensor(self.pattern.count(tiles.head.view(-1, 1, 1), self.problem.num_heads, q, k))
        if found.dim() == 4:  # (B, tiles, ...)
            sample = tiles.sample if found.shape[0] > 1 else torch.zeros_like(tiles.sample)
            found = found.expand(-1, n, *block_size)[sample, torch.arange(n)]
        found = found.expand(n, *block_size).long()
        if self.problem.key_lengths is not None:
            found = found * (k < torch.tensor(self.problem.key_lengths)[tiles.sample].view(-1, 1, 1))
        held = q_held.unsqueeze(2) & k_held.unsqueeze(1)
        return found * held, held


def _of_sample(x: Tensor, tiles: _Tiles) -> Tensor:
    """A number for each tile, of its sample, from one for all tiles or (B, 1, 1, tiles); int64."""
    n = len(tiles.sample)
    if x.dim() == 4:
        sample = tiles.sample if x.shape[0] > 1 else torch.zeros_like(tiles.sample)
        x = x.expand(-1, 1, 1, n)[sample, 0, 0, torch.arange(n)]
    return x.expand(n).long()


def _rows(at: Tensor, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The positions of the rows of blocks, and which rows there are: (blocks, size) each."""
    rows = blocks.view(-1, 1) * size + torch.arange(size)
    return at[rows.clamp(max=len(at) - 1)], rows < len(at)


def _blocks(at: Tensor, size: int) -> Block:
    """The blocks of ``size`` rows that stand at positions ``at``."""
    n = at.numpy()
    starts = np.arange(0, len(n), size)
    low, high = np.minimum.reduceat(n, starts), np.maximum.reduceat(n, starts)
    step = np.gcd.reduceat(n - np.repeat(low, np.diff([*starts, len(n)])), starts)
    return Block(*(torch.from_numpy(x) for x in (low, high, step)))


def _shapes(at: Tensor, blocks: Tensor, size: int) -> Tensor:
    """A number for each block that blocks share whose rows stand alike above the lowest one."""
    used, which = blocks.unique(return_inverse=True)
    rows, held = _rows(at, used, size)
    low = torch.where(held, rows, rows.amax()).amin(1, keepdim=True)
    above = torch.where(held, rows - low, -1).numpy()
    return torch.from_numpy(np.unique(above, axis=0, return_inverse=True)[1].reshape(-1))[which]


def _distinct(columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Places of rows that stand for all, and for each row the place among them of the one equal to it."""
    key, span = torch.zeros_like(columns[0]), 1
    for column in columns:
        low = int(column.min())
        values = int(column.max()) - low + 1
        if span * values >= 1 << 62:
            key = key.unique(return_inverse=True)[1]
            span = len(key)
        key, span = key * values + (column - low), span * values
    _, places, alike = np.unique(key.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(places), torch.from_numpy(alike.reshape(-1))


def _find(reader: _Reader, samples: int, heads: int, block_size: tuple[int, int]) -> tuple[_Tiles, Tensor]:
    """The tiles that may hold a pair, by sample, head, query block, key block; the count of the full ones, else 0."""
    lengths = (len(reader.q_at), len(reader.k_at))
    if min(lengths) == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return _Tiles(nothing, nothing, nothing, nothing), nothing
    fans = [1]
    while any(-(-n // (size * fans[-1])) > 2 * FAN for n, size in zip(lengths, block_size)):
        fans.append(fans[-1] * FAN)
    sides = [[_blocks(at, size * fan) for at, size in zip((reader.q_at, reader.k_at), block_size)] for fan in fans]
    parts = []
    for sample in range(samples):
        alone = replace(reader, pattern=reader.pattern.of_sample(sample))
        level, tiles, fan = _start(alone, sample, heads, sides)
        for q, k in reversed(sides[: level + 1]):
            tiles, count = _split(alone, tiles, q, k, fan)
            fan = (FAN, FAN)
        parts.append((tiles, count))
    tiles, count = _joined(parts)
    q_blocks, k_blocks = (len(side.low) for side in sides[0])
    key = ((tiles.sample * heads + tiles.head) * q_blocks + tiles.q) * k_blocks + tiles.k
    if bool((key[1:] > key[:-1]).all()):
        return tiles, count
    order = torch.from_numpy(np.argsort(key.numpy(), kind="stable"))
    return tiles.take(order), count[order]


def _start(reader: _Reader, sample: int, heads: int, sides: list[list[Block]]) -> tuple[int, _Tiles, tuple[int, int]]:
    """The level of blocks to begin with, regions of them that may hold a pair, and their parts per side."""
    table = _table(reader.pattern)
    if table is None:
        none, (q, k) = torch.zeros(heads, dtype=torch.int64), sides[-1]
        return len(sides) - 1, _Tiles(none + sample, torch.arange(heads), none, none), (len(q.low), len(k.low))
    sizes = [heads * len(q.low) * len(k.low) for q, k in sides]
    level = next((i for i, size in enumerate(sizes) if size <= SEEN_BLOCKS), len(sides) - 1)
    seen = table.seen(*sides[level])
    if len(seen) < heads:
        seen = seen.expand(heads, -1, -1)
    head, q_block, k_block = seen.nonzero(as_tuple=True)
    return level, _Tiles(torch.full_like(head, sample), head, q_block, k_block), (1, 1)


def _table(pattern: Pattern) -> BlockSparse | None:
    """The table outside of whose blocks the pattern sees nothing, if it is a product with one."""
    if isinstance(pattern, And):
        return _table(pattern.left) or _table(pattern.right)
    return pattern if isinstance(pattern, BlockSparse) else None


def _split(reader: _Reader, regions: _Tiles, q: Block, k: Block, fan: tuple[int, int]) -> tuple[_Tiles, Tensor]:
    """The parts of regions that may hold a pair, and the count of those that are full, else 0.

    A region has ``fan`` parts per side; ``q`` and ``k`` are all blocks of the size of a part.
    """
    found = []
    for which in torch.arange(len(regions.q)).split(max(1, _CHUNK_TILES // math.prod(fan))):
        region = regions.take(which)
        rows = region.q.view(-1, 1, 1) * fan[0] + torch.arange(fan[0]).view(-1, 1)
        columns = region.k.view(-1, 1, 1) * fan[1] + torch.arange(fan[1])
        some = (rows < len(q.low)) & (columns < len(k.low))
        held = _Tiles(region.sample.view(-1, 1, 1), region.head.view(-1, 1, 1), rows, columns)
        q_part, k_part = q.take(rows.clamp(max=len(q.low) - 1)), k.take(columns.clamp(max=len(k.low) - 1))
        low, high = reader.bounds(held, q_part, k_part)
        at = (some & (high > 0)).nonzero(as_tuple=True)
        low, high = (x.expand(some.shape)[at] for x in (low, high))
        part = _Tiles(*(x.expand(some.shape)[at] for x in held))
        found.append((part, torch.where(low == high, low, 0)))
    return _joined(found)


def _joined(parts: list[tuple[_Tiles, Tensor]]) -> tuple[_Tiles, Tensor]:
    sample, head, q, k = (torch.cat(x) for x in zip(*(tiles for tiles, _ in parts)))
    return _Tiles(sample, head, q, k), torch.cat([count for _, count in parts])


class _Partial(NamedTuple):
    """For each tile its place in the distinct `counts`, and -1, or the one count that it turned out to have."""

    table: Tensor
    counts: Tensor
    uniform: Tensor


def _read_partial(reader: _Reader, tiles: _Tiles, block_size: tuple[int, int]) -> _Partial | None:
    """The counts of tiles that bounds could not settle, or None when they are too many or too large."""
    n, size = len(tiles.q), block_size[0] * block_size[1]
    words = torch.from_numpy(np.random.default_rng(0).integers(-(2**62), 2**62, (size, 2), dtype=np.int64))
    codes, uniform = np.zeros(n, dtype="V16"), torch.full((n,), -1)
    known, distinct, held_bytes = np.zeros(0, dtype="V16"), [torch.zeros((0, size), dtype=torch.uint8)], 0
    for first in range(0, n, max(1, _CHUNK_PAIRS // size)):
        part = slice(first, first + max(1, _CHUNK_PAIRS // size))
        counts, held = (x.flatten(1) for x in reader.counts(tiles.take(torch.arange(n)[part]), block_size))
        low, high = torch.where(held, counts, 256).amin(1), counts.amax(1)
        if bool((high > 255).any()):
            return None
        uniform[part] = torch.where(low == high, high, -1)
        mixed = low < high
        code = torch.stack([(counts * word).sum(1) for word in words.unbind(1)], 1)[mixed].numpy().view("V16")[:, 0]
        codes[part][mixed.numpy()] = code
        new, places = np.unique(code, return_index=True)
        places = places[~np.isin(new, known)]
        known = np.concatenate([known, code[places]])
        distinct.append(counts[mixed][torch.from_numpy(places)].to(torch.uint8))
        held_bytes += distinct[-1].numel()
        if held_bytes > TABLE_BYTES:
            return None
    order = np.argsort(known)
    table = torch.zeros(n, dtype=torch.int64)
    mixed = uniform < 0
    table[mixed] = torch.from_numpy(order[np.searchsorted(known[order], codes[mixed.numpy()])])
    return _Partial(table, torch.cat(distinct).view(-1, *block_size), uniform)


def _lists(rows: _Tiles, value: Tensor, by_key: bool, shape: tuple[int, int, int]) -> TileLists:
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
