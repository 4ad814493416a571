"""Plans as the flat tables that the C kernel reads, made once for a plan and kept as long as it lives."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dilated_attention_pytorch.plans import Plan, StridedPlan, TilePlan
from dilated_attention_pytorch.plans.strided import Piece
from dilated_attention_pytorch.problem import Problem

Ints = npt.NDArray[np.int64]

UNBOUNDED = 1 << 40
FEW_UNITS = 16
"""Below so many backward units each is cut in parts, so that one head can use several threads."""
MOST_PARTS = 8
PART_KEYS = 512
"""Rows that a part holds at least."""

_known: WeakKeyDictionary[Plan, dict[tuple[int, int, int], StridedTables | TiledTables]] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class StridedTables:
    """A StridedPlan as int64 arrays, one row for each piece, chunk and region; see source/problem.h.

    A region is what chunks of different heads share: samples and rows. ``region_chunks`` (regions, H) names the chunk
    of each head. The cumulative sums count the units of work before each chunk and each region.
    """

    pieces: Ints
    chunks: Ints
    first_unit: Ints
    regions: Ints
    region_chunks: npt.NDArray[np.int32]
    first_base: Ints
    parts: int
    pairs: int


@dataclass(frozen=True, eq=False)
class TiledTables:
    """What a TilePlan lacks: its counts with lanes of queries last, padded to whole tiles of 64: (T, keys, lanes).

    As bytes: counts of four bytes make four times as many.
    """

    counts: Tensor
    parts: int
    pairs: int


def strided_tables(plan: StridedPlan, problem: Problem, part_rows: int) -> StridedTables:
    """The tables of a strided plan, forward units of ``part_rows`` query rows."""
    key = (problem.num_heads, problem.kv_group, part_rows)
    with _lock:
        held = _known.setdefault(plan, {}).get(key)
    if not isinstance(held, StridedTables):
        held = _strided(plan, problem, part_rows)
        with _lock:
            _known[plan][key] = held
    return held


def tiled_tables(plan: TilePlan, problem: Problem) -> TiledTables:
    """The tables of a tile plan."""
    key = (problem.num_heads, problem.kv_group, problem.batch)
    with _lock:
        held = _known.setdefault(plan, {}).get(key)
    if not isinstance(held, TiledTables):
        bases = problem.batch * problem.num_heads // problem.kv_group
        rows = max(problem.query_length, problem.key_length)
        counts = plan.counts.transpose(1, 2)
        counts = torch.nn.functional.pad(counts, (0, -plan.block_size[0] % 64)).contiguous().view(torch.uint8)
        held = TiledTables(counts, _parts(bases, rows), plan.issued_pairs(problem))
        with _lock:
            _known[plan][key] = held
    return held


def _parts(bases: int, rows: int) -> int:
    """In how many parts rows and keys of a backward unit are cut; never by the number of threads."""
    return 1 if bases >= FEW_UNITS else max(1, min(MOST_PARTS, rows // PART_KEYS))


def _piece_row(piece: Piece) -> tuple[int, ...]:
    low, high = -UNBOUNDED, UNBOUNDED
    if piece.band is not None:
        low = piece.band.diagonal - piece.band.size + 1
        high = piece.band.diagonal + (0 if piece.band.is_causal else piece.band.size - 1)
    elif piece.is_causal:
        high = 0
    return (piece.segments, *piece.queries, *piece.keys, low, high, int(piece.fresh))


def _strided(plan: StridedPlan, problem: Problem, part_rows: int) -> StridedTables:
    pieces: list[tuple[int, ...]] = []
    places: dict[int, int] = {}  # chunks that look alike share their pieces
    regions: dict[tuple[int, ...], int] = {}
    keys: list[tuple[int, int]] = []
    chunks, chunk_regions = [], []
    for chunk in plan.chunks:
        place = places.get(id(chunk.pieces))
        if place is None:
            place = places[id(chunk.pieces)] = len(pieces)
            pieces.extend(_piece_row(piece) for piece in chunk.pieces)
        chunks.append(
            (
                *chunk.samples,
                *chunk.heads,
                *chunk.queries,
                *chunk.keys,
                place,
                len(chunk.pieces),
                int(chunk.complete),
            )
        )
        region = regions.setdefault((*chunk.samples, *chunk.queries), len(regions))
        chunk_regions.append(region)
        if region == len(keys):
            keys.append(chunk.keys)
        elif chunk.keys != (0, 0):  # a chunk without pieces names no keys
            assert keys[region] in ((0, 0), chunk.keys)
            keys[region] = chunk.keys
    chunk_table = np.array(chunks, dtype=np.int64).reshape(len(chunks), 12)
    rows = chunk_table[:, 6] - chunk_table[:, 5]
    units = (chunk_table[:, 1] - chunk_table[:, 0]) * chunk_table[:, 4] * -(-rows // part_rows)
    region_rows = np.array(list(regions), dtype=np.int64).reshape(len(regions), 4)
    region_table = np.concatenate([region_rows, np.array(keys, dtype=np.int64).reshape(len(keys), 2)], 1)
    bases = (region_rows[:, 1] - region_rows[:, 0]) * (problem.num_heads // problem.kv_group)
    region_chunks = np.full((len(regions), problem.num_heads), -1, dtype=np.int32)
    for i, (chunk, region) in enumerate(zip(plan.chunks, chunk_regions)):
        region_chunks[region, chunk.heads.part(0, chunk.heads.size)] = i
    return StridedTables(
        np.array(pieces, dtype=np.int64).reshape(len(pieces), 12),
        chunk_table,
        _starts(units),
        region_table,
        region_chunks,
        _starts(bases),
        _parts(int(bases.sum()), int(rows.max(initial=0))),
        plan.issued_pairs(problem),
    )


def _starts(sizes: Ints) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
