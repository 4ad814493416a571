"""Which tiles of a pattern may hold a pair, found from coarse to fine by bounds, and the counts of those left open."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import BlockSparse, Pattern, pattern_from_text
from dilated_attention_pytorch.patterns.base import And, Block, Sum
from dilated_attention_pytorch.patterns.documents import Packed
from dilated_attention_pytorch.problem import Problem, positions_tensor

FAN = 8
"""A region of blocks is cut in so many parts per side, from the whole down to single tiles."""
SEEN_BLOCKS = 1 << 27
"""Up to so many blocks of all heads are looked up in a table of blocks at once (bytes)."""
MOST_COUNT = (1 << 31) - 1
"""The greatest count that a table can hold."""
_CHUNK_PAIRS = 1 << 18  # chunks that stay in the cache: 4 times as fast as 1 << 22
_CHUNK_TILES = 1 << 19


class Tiles(NamedTuple):
    """A list of tiles; every field has one number for each."""

    sample: Tensor
    head: Tensor
    q: Tensor
    k: Tensor

    def take(self, which: Tensor) -> Tiles:
        return Tiles(*(x[which] for x in self))


def make_reader(pattern: Pattern, problem: Problem) -> tuple[Reader, int, int]:
    """A reader of the counts, and how many samples and heads tables need."""
    q_at, k_at = positions_tensor(problem.query_positions), positions_tensor(problem.key_positions)
    if any(table.device.type not in ("cpu", "meta") for table in pattern.tables):
        pattern = pattern_from_text(pattern.text(), [table.cpu() for table in pattern.tables])  # once, not at each look
    batched = problem.key_lengths is not None or pattern.varies_by_sample
    samples, heads = problem.batch if batched else 1, problem.num_heads if pattern.varies_by_head else 1
    return Reader(pattern, problem, q_at, k_at), samples, heads


@dataclass(frozen=True, eq=False)
class Reader:
    """Bounds and counts of a pattern at the problem's rows, padding included, for lists of tiles."""

    pattern: Pattern
    problem: Problem
    q_at: Tensor
    k_at: Tensor

    def bounds(self, tiles: Tiles, q: Block, k: Block) -> tuple[Tensor, Tensor]:
        """Least and greatest count of tiles of one sample, of blocks ``q`` and ``k``; all have three dims."""
        given = self.pattern.count_bounds(tiles.head, self.problem.num_heads, q, k)
        low, high = (torch.as_tensor(x) for x in given)
        if max(low.dim(), high.dim()) == 4:  # a batch of tables; all tiles are of one sample
            low, high = (x[int(tiles.sample[0]) % len(x)] if x.dim() == 4 else x for x in (low, high))
        if self.problem.key_lengths is not None:
            visible = torch.tensor(self.problem.key_lengths)[tiles.sample]
            low, high = low * (k.high < visible), high * (k.low < visible)
        return low, high

    def examples(self, tiles: Tiles, block_size: tuple[int, int]) -> tuple[Tiles, Tensor]:
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

    def _sides(self, tiles: Tiles, block_size: tuple[int, int]) -> tuple[tuple[Tensor, Tensor, int], ...]:
        return (self.q_at, tiles.q, block_size[0]), (self.k_at, tiles.k, block_size[1])

    def _signs(self, pattern: Pattern, tiles: Tiles, q: Block, k: Block) -> list[Tensor]:
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

    def counts(self, tiles: Tiles, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
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


def _of_sample(x: Tensor, tiles: Tiles) -> Tensor:
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


def find_tiles(reader: Reader, samples: int, heads: int, block_size: tuple[int, int]) -> tuple[Tiles, Tensor]:
    """The tiles that may hold a pair, by sample, head, query block, key block; the count of the full ones, else 0."""
    lengths = (len(reader.q_at), len(reader.k_at))
    if min(lengths) == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Tiles(nothing, nothing, nothing, nothing), nothing
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


def _start(reader: Reader, sample: int, heads: int, sides: list[list[Block]]) -> tuple[int, Tiles, tuple[int, int]]:
    """The level of blocks to begin with, regions of them that may hold a pair, and their parts per side."""
    table = _table(reader.pattern)
    if table is None:
        none, (q, k) = torch.zeros(heads, dtype=torch.int64), sides[-1]
        return len(sides) - 1, Tiles(none + sample, torch.arange(heads), none, none), (len(q.low), len(k.low))
    sizes = [heads * len(q.low) * len(k.low) for q, k in sides]
    level = next((i for i, size in enumerate(sizes) if size <= SEEN_BLOCKS), len(sides) - 1)
    seen = table.seen(*sides[level])
    if len(seen) < heads:
        seen = seen.expand(heads, -1, -1)
    head, q_block, k_block = seen.nonzero(as_tuple=True)
    return level, Tiles(torch.full_like(head, sample), head, q_block, k_block), (1, 1)


def _table(pattern: Pattern) -> BlockSparse | None:
    """The table outside of whose blocks the pattern sees nothing, if it is a product with one."""
    if isinstance(pattern, And):
        return _table(pattern.left) or _table(pattern.right)
    return pattern if isinstance(pattern, BlockSparse) else None


def _split(reader: Reader, regions: Tiles, q: Block, k: Block, fan: tuple[int, int]) -> tuple[Tiles, Tensor]:
    """The parts of regions that may hold a pair, and the count of those that are full, else 0.

    A region has ``fan`` parts per side; ``q`` and ``k`` are all blocks of the size of a part.
    """
    found = []
    for which in torch.arange(len(regions.q)).split(max(1, _CHUNK_TILES // math.prod(fan))):
        region = regions.take(which)
        rows = region.q.view(-1, 1, 1) * fan[0] + torch.arange(fan[0]).view(-1, 1)
        columns = region.k.view(-1, 1, 1) * fan[1] + torch.arange(fan[1])
        some = (rows < len(q.low)) & (columns < len(k.low))
        held = Tiles(region.sample.view(-1, 1, 1), region.head.view(-1, 1, 1), rows, columns)
        q_part, k_part = q.take(rows.clamp(max=len(q.low) - 1)), k.take(columns.clamp(max=len(k.low) - 1))
        low, high = reader.bounds(held, q_part, k_part)
        at = (some & (high > 0)).nonzero(as_tuple=True)
        low, high = (x.expand(some.shape)[at] for x in (low, high))
        part = Tiles(*(x.expand(some.shape)[at] for x in held))
        found.append((part, torch.where(low == high, low, 0)))
    return _joined(found)


def _joined(parts: list[tuple[Tiles, Tensor]]) -> tuple[Tiles, Tensor]:
    sample, head, q, k = (torch.cat(x) for x in zip(*(tiles for tiles, _ in parts)))
    return Tiles(sample, head, q, k), torch.cat([count for _, count in parts])


class PartialTiles(NamedTuple):
    """For each tile its place in `counts`, and -1, or the one count that it turned out to have."""

    table: Tensor
    counts: Tensor
    uniform: Tensor


def read_partial(
    reader: Reader, tiles: Tiles, block_size: tuple[int, int], most_bytes: int | None
) -> PartialTiles | None:
    """The counts of tiles that bounds could not settle: uint8, or int32 where one is above 255.

    Equal tiles share a place; None when those that differ take more than ``most_bytes``. With None for it nothing is
    compared, and each has a place of its own. None, too, when a count is above `MOST_COUNT`.
    """
    n, size = len(tiles.q), block_size[0] * block_size[1]
    uniform, distinct = torch.full((n,), -1), [torch.zeros((0, size), dtype=torch.uint8)]
    alike, held_bytes = _Alike(size), 0
    for first in range(0, n, max(1, _CHUNK_PAIRS // size)):
        part = slice(first, first + max(1, _CHUNK_PAIRS // size))
        counts, held = (x.flatten(1) for x in reader.counts(tiles.take(torch.arange(n)[part]), block_size))
        low, high = torch.where(held, counts, MOST_COUNT + 1).amin(1), counts.amax(1)
        if bool((high > MOST_COUNT).any()):
            return None
        uniform[part] = torch.where(low == high, high, -1)
        counts = counts[low < high]
        if most_bytes is not None:
            counts = counts[alike.new(counts)]
        distinct.append(counts.to(torch.uint8 if bool((high <= 255).all()) else torch.int32))
        held_bytes += distinct[-1].nbytes
        if most_bytes is not None and held_bytes > most_bytes:
            return None
    table, mixed = torch.zeros(n, dtype=torch.int64), uniform < 0
    table[mixed] = torch.arange(int(mixed.sum())) if most_bytes is None else alike.places()
    return PartialTiles(table, torch.cat(distinct).view(-1, *block_size), uniform)


class _Alike:
    """Tiles told apart by two random sums of their counts, in the order in which they come."""

    def __init__(self, size: int) -> None:
        words = np.random.default_rng(0).integers(-(2**62), 2**62, (size, 2), dtype=np.int64)
        self.words = torch.from_numpy(words).unbind(1)
        self.known, self.codes = np.zeros(0, dtype="V16"), [np.zeros(0, dtype="V16")]

    def new(self, counts: Tensor) -> Tensor:
        """Places of those among (tiles, size) that are unlike all before."""
        code = torch.stack([(counts * word).sum(1) for word in self.words], 1).numpy().view("V16")[:, 0]
        self.codes.append(code)
        new, places = np.unique(code, return_index=True)
        places = places[~np.isin(new, self.known)]
        self.known = np.concatenate([self.known, code[places]])
        return torch.from_numpy(places)

    def places(self) -> Tensor:
        """For each tile that came, the place of the first one like it among those that were new."""
        order = np.argsort(self.known)
        return torch.from_numpy(order[np.searchsorted(self.known[order], np.concatenate(self.codes))])
