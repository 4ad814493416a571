"""A tile plan cut into batches of dense problems: units that visit equally many tiles, with the key rows they read.

A *unit* is a block of queries of one sample and head, or of the query heads that share a key-value head and a table.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dilated_attention_pytorch.plans import TilePlan

Ints = npt.NDArray[np.int64]

PARTIAL = 0
"""The count of pieces whose pairs are counted one by one."""


@dataclass(frozen=True, eq=False)
class TilePiece:
    """Some units that visit equally many tiles of one kind: one batch of dense problems of ``key_rows`` keys each.

    ``count`` is that of every pair, or PARTIAL: then ``tables (n or 1, m)`` names the tiles in the plan's counts.
    ``first_unit`` is set when the units stand side by side, ``run`` (first block, blocks from unit to unit) when the
    keys of each do, so that neither needs copying. A *fresh* piece is the first of all its units.
    """

    units: Tensor  # (n,)
    blocks: Tensor  # (n, m), blocks of keys
    key_rows: int
    count: int
    tables: Tensor | None
    first_unit: int | None
    run: tuple[int, int] | None
    fresh: bool


@dataclass(frozen=True, eq=False)
class TilePieces:
    """The pieces of some samples and heads; ``whole`` when fresh pieces write the rows of every unit."""

    pieces: tuple[TilePiece, ...]
    whole: bool


@dataclass(frozen=True)
class Part:
    """Some samples and heads of a plan, computed together: (first, last) samples and (first, last) query heads.

    ``fan`` query heads make one unit; ``group`` of them share a key-value head.
    """

    samples: tuple[int, int]
    heads: tuple[int, int]
    group: int
    fan: int

    @property
    def shape(self) -> tuple[int, int]:
        """Samples, and heads of units."""
        return self.samples[1] - self.samples[0], (self.heads[1] - self.heads[0]) // self.fan


_known: WeakKeyDictionary[TilePlan, dict[tuple[object, ...], TilePieces]] = WeakKeyDictionary()
_lock = threading.Lock()


def pieces_of(plan: TilePlan, part: Part, key_length: int, gathered_rows: int, max_units: int | None) -> TilePieces:
    """The pieces of a part, made once for a plan; each reads at most ``gathered_rows`` key rows that must be copied.

    A unit with tiles for more than half as many is in several pieces. No piece has more than ``max_units`` units.
    """
    batched, headed = (size > 1 for size in plan.kv_num.shape[:2])
    place = (part.samples if batched else None, part.heads if headed else None)
    key = (place, part.shape, part.group // part.fan, key_length, gathered_rows, max_units)
    with _lock:
        held = _known.setdefault(plan, {}).get(key)
    if held is None:
        held = _Cut(plan, part, key_length, gathered_rows, max_units).pieces()
        with _lock:
            _known[plan][key] = held
    return held


class _Tiles:
    """Tiles of one kind as flat arrays: the unit, the block of keys, and the table or count of each; by unit."""

    def __init__(self, unit: Ints, block: Ints, value: Ints) -> None:
        self.unit, self.block, self.value = unit, block, value

    @classmethod
    def of(cls, part: Part, num: Tensor, idx: Tensor, value: Tensor) -> _Tiles:
        """Those of a part in lists (B or 1, H or 1, Q) and (.., Q, W)."""
        where = [slice(*span) if size > 1 else slice(None) for span, size in zip((part.samples, part.heads), num.shape)]
        tables = [x[tuple(where)].expand(*part.shape, *x.shape[2:]).cpu().numpy() for x in (num, idx, value)]
        counted = tables[0].reshape(-1)
        held = np.arange(idx.shape[-1]) < counted[:, None]
        unit = np.repeat(np.arange(len(counted)), counted)
        return cls(unit, *(x.reshape(len(counted), -1)[held].astype(np.int64) for x in tables[1:]))

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Tiles:
        """The tiles chosen."""
        return _Tiles(self.unit[chosen], self.block[chosen], self.value[chosen])


class _Cut:
    """The making of the pieces of one part."""

    def __init__(self, plan: TilePlan, part: Part, key_length: int, gathered_rows: int, max_units: int | None) -> None:
        self.part, self.plan = part, plan
        self.size = min(plan.block_size[1], key_length)
        self.key_blocks, self.q_blocks = -(-key_length // self.size), plan.kv_num.shape[2]
        self.lacks = self.key_blocks * self.size - key_length  # rows, in the last block of keys
        self.call_tiles, self.max_units = max(1, gathered_rows // self.size), max_units
        self.list_tiles = max(1, self.call_tiles // 2)  # a call of one problem has work for one thread only
        units = part.shape[0] * part.shape[1] * self.q_blocks
        self.touched, self.written = np.zeros(units, dtype=bool), np.zeros(units, dtype=bool)

    def pieces(self) -> TilePieces:
        plan, found = self.plan, list[TilePiece]()
        full = _Tiles.of(self.part, plan.full_num, plan.full_idx, plan.full_count)
        kinds = [(int(c), full.where(full.value == c)) for c in np.unique(full.value)]
        kinds.append((PARTIAL, _Tiles.of(self.part, plan.kv_num, plan.kv_idx, plan.kv_table)))
        for count, tiles in kinds:  # in an order that no other unit has a say in: rows stay the same bit for bit
            found.extend(self._of_kind(count, tiles))
        return TilePieces(tuple(found), bool(self.written.all()))

    def _of_kind(self, count: int, tiles: _Tiles) -> list[TilePiece]:
        """The tiles of one kind, cut in lists of at most `list_tiles`, lists of equal lengths together."""
        if len(tiles.unit) == 0:
            return []
        n = len(tiles.unit)
        rank = np.arange(n) - np.searchsorted(tiles.unit, tiles.unit)
        starts = np.flatnonzero(rank % self.list_tiles == 0)
        sizes, number = np.diff(np.append(starts, n)), rank[starts] // self.list_tiles
        ragged = (tiles.block[starts + sizes - 1] == self.key_blocks - 1) & (self.lacks > 0)
        is_run = tiles.block[starts + sizes - 1] - tiles.block[starts] == sizes - 1
        order = np.lexsort((is_run, ragged, sizes, number))  # a unit is in a piece once; units stay ascending
        alike = np.stack([number, sizes, ragged, is_run], 1)[order]
        edges = np.flatnonzero((alike[1:] != alike[:-1]).any(1)) + 1
        found = []
        for low, high in pairwise([0, *edges.tolist(), len(order)]):
            _, m, lacking, in_runs = alike[low].tolist()
            entries = starts[order[low:high], None] + np.arange(m)
            cuts = _stretches(self._blocks(tiles, entries[:, 0])) if in_runs else [0, len(entries)]
            step = max(1, self.call_tiles // m)
            step = step if self.max_units is None else min(step, self.max_units)
            for begin, end in pairwise(cuts):
                for first in range(begin, end, step):
                    part = entries[first : min(first + step, end)]
                    found.append(self._piece(count, tiles, part, m * self.size - lacking * self.lacks))
        return found

    def _blocks(self, tiles: _Tiles, entries: Ints) -> Ints:
        """Places of blocks of keys among those of all the part's key-value heads."""
        return tiles.block[entries] + tiles.unit[entries] // self.q_blocks * self.part.fan // self.part.group * (
            self.key_blocks
        )

    def _piece(self, count: int, tiles: _Tiles, entries: Ints, key_rows: int) -> TilePiece:
        units, device = tiles.unit[entries[:, 0]], self.plan.kv_num.device
        blocks = self._blocks(tiles, entries)
        tables = None
        if count == PARTIAL:
            named = tiles.value[entries]
            named = named[:1] if (named == named[:1]).all() else named
            tables = torch.from_numpy(named).to(device)
        touched = self.touched[units]
        fresh = not bool(touched.any())
        self.touched[units] = True
        self.written[units] |= fresh
        return TilePiece(
            torch.from_numpy(units).to(device),
            torch.from_numpy(blocks).to(device),
            key_rows,
            count,
            tables,
            int(units[0]) if units[-1] - units[0] + 1 == len(units) else None,
            _run(blocks),
            fresh,
        )


def _stretches(starts: Ints) -> list[int]:
    """Places that cut numbers into evenly spaced stretches, if few do."""
    gaps = np.diff(starts)
    changes = np.flatnonzero(gaps[1:] != gaps[:-1]) + 1
    jumps = changes[np.diff(changes, prepend=-2) > 1]  # a gap unlike its neighbours is two changes
    n = len(starts)
    return [0, *(jumps + 1).tolist(), n] if 4 * len(jumps) <= n else [0, n]


def _run(blocks: Ints) -> tuple[int, int] | None:
    """(first block, blocks from row to row) when every row is a run of neighbours and rows are evenly spaced."""
    if (np.diff(blocks, axis=1) != 1).any():
        return None
    steps = np.diff(blocks[:, 0])
    step = int(steps[0]) if len(steps) else 0
    return (int(blocks[0, 0]), step) if step >= 0 and (steps == step).all() else None
