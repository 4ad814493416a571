"""From a pattern and a problem to the plans that can walk it, kept in a bounded, locked cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.patterns import BlockSparse, Branch, Documents, Pattern
from dilated_attention_pytorch.patterns.base import And, Sum
from dilated_attention_pytorch.plans.base import DensePlan, Plan, shapes_of
from dilated_attention_pytorch.plans.orders import block_rows, chosen_plan, chosen_rows, fixed_classes, ordered_plan
from dilated_attention_pytorch.plans.pieces import Span, chunk_pieces
from dilated_attention_pytorch.plans.strided import Chunk, HeadSlice, Piece, StridedPlan
from dilated_attention_pytorch.plans.tiles import BLOCK_SIZE, tile_plan, visited_tiles
from dilated_attention_pytorch.problem import Problem

CHUNK_ROWS = 8192
"""A chunk is the largest multiple of the segments' common multiple within this, or one common multiple (tokens)."""


class Interval(NamedTuple):
    """Positions ``start <= p < end`` that only see each other; keys end at ``key_end``."""

    start: int
    end: int
    key_end: int


MASKED_PAIRS = 1 << 17
"""Up to so many (head, query, key) places a dense plan may come first without having been measured as faster."""
HELD_PAIRS = 1 << 19
"""Up to so many places a DensePlan holds its log-counts once they were asked for, to be used again."""
SOON_TILES = 1 << 12
"""Up to so many tiles are read in row order though another order has fewer (seconds; above, a minute and more)."""
LEAST_ROWS = 16
"""The fewest query rows of a tile: fewer, and kernels do little else than start."""
LEAST_CHOSEN = 8
"""Chosen blocks of fewer rows are computed densely: in tiles of their own they would cost more."""
LARGEST_TILE = 128
"""Rows and keys of a tile at most, unless a backend's options say otherwise."""
CALL_PAIRS = 50_000
"""What one call for one piece costs beside its arithmetic, in pairs of one kernel (about 0.1 ms on a CPU core)."""

_cache = BoundedCache(128)


def candidate_plans(
    pattern: Pattern, problem: Problem, tiles: bool = False, largest_tile: int = LARGEST_TILE
) -> tuple[Plan, ...]:
    """Every plan that walks this pattern for this problem, the one with the least work first.

    A pattern with a strided form gets tables of tiles only on request, ``tiles=True``: making them costs more.
    ``largest_tile`` bounds the rows and keys of a tile.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> import torch
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> q = torch.zeros(1, 4096, 2, 8)
        >>> plans = candidate_plans(Causal(), make_problem(q, q, q, scale=1.0, query_start=0))
        >>> [type(p).__name__ for p in plans]
        ['StridedPlan', 'DensePlan']
    """
    key = (
        str(problem.q.device),
        problem.accumulate_dtype,
        pattern.text(),
        tuple(map(digest, pattern.tables)),
        (problem.batch, problem.num_heads),
        problem.query_positions,
        problem.key_positions,
        problem.key_lengths,
        tiles or pattern.branches() is None,  # without a closed form tables are made whether they are asked for or not
        largest_tile,
    )
    return _cache.get(key, lambda: _made_plans(pattern, problem, tiles, largest_tile))


def _made_plans(pattern: Pattern, problem: Problem, tiles: bool, largest_tile: int) -> tuple[Plan, ...]:
    strided, dense = strided_plan(pattern, problem), dense_plan(pattern, problem)
    plans: tuple[Plan, ...] = (dense,)
    if strided is not None:
        calls = sum(len(chunk.pieces) for chunk in strided.chunks)
        strided_cost = strided.issued_pairs(problem) + CALL_PAIRS * calls
        short = _counted_pairs(problem) <= MASKED_PAIRS and dense.issued_pairs(problem) < strided_cost
        plans = (dense, strided) if short else (strided, dense)
    if tiles or strided is None:
        made = _tiled(pattern, problem, tile_size(pattern, problem, largest_tile), needed=strided is None)
        plans = (*plans, *made) if strided is not None or dense.short is not None else (*made, *plans)
    return plans


def digest(table: Tensor) -> tuple[object, ...]:
    """What tells tables apart: shape, dtype and a hash of the numbers."""
    numbers = hashlib.blake2b(table.detach().cpu().contiguous().numpy().data, digest_size=16).digest()
    return tuple(table.shape), table.dtype, numbers


def _tiled(pattern: Pattern, problem: Problem, size: tuple[int, int], needed: bool) -> tuple[Plan, ...]:
    """Tables of tiles: in the order that suits them, and in row order if ``needed`` or soon made.

    Where a choice must not decide how rows are summed there is one order only, and tables whatever they take. For
    blocks that would fill little of a tile of their own there are none.
    """
    chosen = chosen_rows(pattern)
    if chosen is not None and chosen < LEAST_CHOSEN and len(block_rows(problem.query_positions, chosen)) > 1:
        return ()
    if chosen is not None or fixed_classes(pattern) is not None:
        return (chosen_plan(pattern, problem, size),)
    ordered = ordered_plan(pattern, problem, size)
    soon = ordered is None or needed or visited_tiles(pattern, problem, size) <= SOON_TILES
    return tuple(p for p in (ordered, tile_plan(pattern, problem, size) if soon else None) if p is not None)


def tile_size(pattern: Pattern, problem: Problem, largest: int = LARGEST_TILE) -> tuple[int, int]:
    """Query rows and key rows of a tile: on a CPU those of the pattern's blocks, so that tiles are full or empty.

    Neither is above ``largest``, and they are part of no result. Query rows are such that blocks which were chosen
    apart stand in tiles of their own, as law 5 asks, with few of them or with few rows to fill others (`rows_apart`).
    """
    rows, keys = (min(n, largest) for n in BLOCK_SIZE)
    chosen = chosen_rows(pattern)
    if chosen is not None:
        rows = _rows_of_choices(block_rows(problem.query_positions, chosen), rows)
    blocks = list(_block_sizes(pattern))
    if blocks and problem.q.device.type in ("cpu", "meta"):
        starts = ([run.start for run in side] for side in (problem.query_positions, problem.key_positions))
        own = [math.gcd(largest, *sizes, *at) for sizes, at in zip(zip(*blocks), starts)]
        if min(own) >= LEAST_ROWS:
            return own[0] if chosen is None else math.gcd(rows, own[0]), own[1]
        if chosen is not None and own[1] >= LEAST_ROWS:  # rows are placed to suit, keys stand as they do
            return rows, own[1]
    return rows, keys


def _rows_of_choices(lengths: npt.NDArray[np.int64], most: int) -> int:
    """Rows of a tile for so many rows in each block: a divisor of all, or what leaves few tiles and few filling rows.

    A tile costs about as much as `LEAST_ROWS` rows beside its own.
    """
    if len(lengths) <= 1:
        return most
    shared = math.gcd(most, *set(lengths[:-1].tolist()))
    if shared >= LEAST_ROWS:
        return shared
    sizes = [n for n in (16, 32, 64, 128, 256) if n <= most]
    return min(sizes, key=lambda n: int((-(-lengths // n)).sum()) * (n + LEAST_ROWS))


def _block_sizes(pattern: Pattern) -> Iterator[tuple[int, int]]:
    """Those of the tables of blocks in a pattern, at positions as they are."""
    if isinstance(pattern, BlockSparse):
        yield pattern.block_size
    elif isinstance(pattern, And | Sum):
        yield from _block_sizes(pattern.left)
        yield from _block_sizes(pattern.right)


def dense_plan(pattern: Pattern, problem: Problem) -> DensePlan:
    """The dense plan; short enough, it can hold its log-counts."""
    if _counted_pairs(problem) > HELD_PAIRS:
        return DensePlan(pattern)
    return DensePlan(pattern, shapes_of(problem))


def _counted_pairs(problem: Problem) -> int:
    """Places (sample, head, query, key) that may have different counts."""
    samples = 1 if problem.key_lengths is None else problem.batch
    return samples * problem.num_heads * problem.query_length * problem.key_length


def strided_plan(pattern: Pattern, problem: Problem) -> StridedPlan | None:
    """The strided plan, or None when the pattern has no closed form or rows do not stand at consecutive positions."""
    branches = pattern.branches()
    if branches is None or not _same_documents(branches):
        return None
    for positions in (problem.query_positions, problem.key_positions):
        if len(positions) != 1 or positions[0].step != 1:
            return None
    return StridedPlan(pattern, tuple(_chunks(branches, problem)))


def _same_documents(branches: tuple[Branch, ...]) -> bool:
    tables = {None if b.documents is None else str(b.documents.tables[0].tolist()) for b in branches}
    return len(tables) == 1


def _chunks(branches: tuple[Branch, ...], problem: Problem) -> Iterator[Chunk]:
    if problem.batch == 0 or problem.query_length == 0:
        return
    q_run, k_run = problem.query_positions[0], problem.key_positions[0]
    classes = _head_classes(branches, problem.num_heads)
    common = math.lcm(*(b.segment_length for b in branches if b.segment_length is not None))
    segmented = all(b.segment_length is not None for b in branches)
    known: dict[tuple[object, ...], tuple[tuple[Piece, ...], bool, bool]] = {}
    for samples, key_limit, intervals in _sample_groups(branches, problem):
        for start, end, key_end in intervals:
            q_low, q_high = max(q_run.start, start), min(q_run.start + q_run.length, end)
            k_low, k_high = max(k_run.start, start), min(k_run.start + k_run.length, key_end, key_limit)
            if q_low >= q_high:
                continue
            step = end - start
            if segmented and common < step:
                step = max(common, CHUNK_ROWS // common * common)
            first = start + max(q_low - start, 0) // step * step
            for origin in range(first, q_high, step):
                low, high = max(q_low, origin), min(q_high, origin + step)
                queries = Span(low - origin, high - origin)
                keys = Span(max(k_low, origin) - origin, min(k_high, origin + step) - origin)
                if keys.low >= keys.high:
                    keys = Span(0, 0)
                for places, heads in classes:
                    recipe = (places, queries, keys)
                    if recipe not in known:
                        known[recipe] = chunk_pieces(branches, places, queries, keys)
                    pieces, complete, complete_keys = known[recipe]
                    yield Chunk(
                        samples,
                        heads,
                        (low - q_run.start, high - q_run.start),
                        (origin + keys.low - k_run.start, origin + keys.high - k_run.start) if pieces else (0, 0),
                        pieces,
                        complete,
                        complete_keys,
                    )


def _head_classes(branches: tuple[Branch, ...], num_heads: int) -> list[tuple[tuple[int | None, ...], HeadSlice]]:
    """Heads grouped by their grid offsets in all branches, each group an arithmetic run."""
    groups: dict[tuple[int | None, ...], list[int]] = {}
    for head in range(num_heads):
        places = []
        for b in branches:
            first, last = b.head_range(num_heads)
            places.append(int(b.offset(head, num_heads)) if first <= head < last else None)
        groups.setdefault(tuple(places), []).append(head)
    classes = []
    for places_key, heads in groups.items():
        step = heads[1] - heads[0] if len(heads) > 1 else 1
        if heads == list(range(heads[0], heads[-1] + 1, step)):
            classes.append((places_key, HeadSlice(heads[0], step, len(heads))))
        else:
            classes.extend((places_key, HeadSlice(h, 1, 1)) for h in heads)
    return classes


def _sample_groups(
    branches: tuple[Branch, ...], problem: Problem
) -> Iterator[tuple[tuple[int, int], int, list[Interval]]]:
    """Runs of samples with equal key limits and documents: (samples, first invisible position, intervals)."""
    q_run, k_run = problem.query_positions[0], problem.key_positions[0]
    end = max(q_run.start + q_run.length, k_run.start + k_run.length)
    documents = branches[0].documents
    tables = [[Interval(0, end, end)]]
    if documents is not None:
        assert isinstance(documents, Documents)
        bounds = documents.bounds(documents.lengths.device).tolist()
        tables = [_intervals(b, end) for b in (bounds if documents.lengths.dim() == 2 else [bounds])]
    limits = problem.key_lengths or (end,) * problem.batch
    keys = [(limits[b], b if len(tables) > 1 else 0) for b in range(problem.batch)]
    first = 0
    for b in range(1, problem.batch + 1):
        if b == problem.batch or keys[b][0] != keys[first][0] or tables[keys[b][1]] != tables[keys[first][1]]:
            yield (first, b), keys[first][0], tables[keys[first][1]]
            first = b


def _intervals(bounds: list[int], end: int) -> list[Interval]:
    """The documents that are not empty, and the rows past the last one, which see nothing."""
    inside = [Interval(a, b, b) for a, b in pairwise(bounds) if a < b]
    return [*inside, Interval(bounds[-1], end, bounds[-1])] if bounds[-1] < end else inside
