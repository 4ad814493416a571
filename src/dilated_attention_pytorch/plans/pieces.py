"""The pieces of one chunk: closed forms for segments, grids, causal triangles and windows.

Everything here is arithmetic on places relative to the chunk's origin, which every segment grid divides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dilated_attention_pytorch.patterns import Branch
from dilated_attention_pytorch.plans.strided import Band, Piece, Rows

WINDOW_ROWS = (128, 512)
"""Query rows of one windowed block: twice the window, within these bounds; larger blocks compute more hidden pairs."""


class Span(NamedTuple):
    """Places ``low <= p < high`` of the queries or keys of a chunk."""

    low: int
    high: int


class Case(NamedTuple):
    """A dense problem inside a grid of query places and key places, repeated ``folds`` times ``fold_stride`` apart."""

    query: int
    query_length: int
    key: int
    key_length: int
    is_causal: bool = False
    band: Band | None = None
    folds: int = 1
    fold_stride: int = 0


def chunk_pieces(
    branches: Sequence[Branch], places: Sequence[int | None], queries: Span, keys: Span
) -> tuple[tuple[Piece, ...], bool, bool]:
    """The pieces of all branches in a chunk, and whether fresh pieces write all query rows, and all key rows.

    ``places[b]`` is the grid offset of the chunk's heads in branch b, None where these heads do not run it.
    """
    pieces: list[Piece] = []
    for branch, place in sorted(zip(branches, places), key=lambda pair: pair[0].dilation_rate):
        if place is not None:
            pieces.extend(_branch_pieces(branch, place, queries, keys))
    return _mark_fresh(pieces, queries.high - queries.low, keys.high - keys.low)


def _mark_fresh(pieces: list[Piece], num_queries: int, num_keys: int) -> tuple[tuple[Piece, ...], bool, bool]:
    rows, columns = np.zeros(num_queries, dtype=bool), np.zeros(num_keys, dtype=bool)
    written, written_keys = rows.copy(), columns.copy()
    marked = []
    for p in pieces:
        mine, other = p.queries.slices(p.segments), p.keys.slices(p.segments)
        fresh = not any(rows[s].any() for s in mine)
        fresh_keys = not any(columns[s].any() for s in other)
        for s in mine:
            rows[s] = True
            written[s] |= fresh
        for s in other:
            columns[s] = True
            written_keys[s] |= fresh_keys
        marked.append(replace(p, fresh=fresh, fresh_keys=fresh_keys))
    return tuple(marked), bool(written.all()), bool(written_keys.all())


def _branch_pieces(branch: Branch, place: int, queries: Span, keys: Span) -> Iterator[Piece]:
    if queries.low >= queries.high or keys.low >= keys.high:
        return
    end = max(queries.high, keys.high)
    w = end if branch.segment_length is None else branch.segment_length
    first = max(queries.low, keys.low) // w
    last = (min(queries.high, keys.high) - 1) // w
    whole = (-(-max(queries.low, keys.low) // w), min(queries.high, keys.high) // w)  # segments that both hold entirely
    if whole[0] < whole[1]:
        yield from _segment_pieces(branch, place, queries, keys, whole[0], whole[1] - whole[0], w)
    for segment in range(first, last + 1):
        if not whole[0] <= segment < whole[1]:
            yield from _segment_pieces(branch, place, queries, keys, segment, 1, w)


def _segment_pieces(
    branch: Branch, place: int, queries: Span, keys: Span, segment: int, segments: int, w: int
) -> Iterator[Piece]:
    """The pieces of ``segments`` equal segments, the first of which is number ``segment``."""
    r, base = branch.dilation_rate, segment * w

    def grid(span: Span) -> tuple[int, int]:  # first grid place inside the span, and one past the last
        low, high = max(span.low - base, 0), min(span.high - base, w)
        return max(0, -(-(low - place) // r)), max(0, -(-(high - place) // r))

    (a, a_end), (b, b_end) = grid(queries), grid(keys)
    if a >= a_end or b >= b_end:
        return
    window = None if branch.window is None else -(-branch.window // r)
    for case in dense_cases(a, a_end - a, b, b_end - b, branch.is_causal, window, fold=segments == 1):
        count, stride = (case.folds, case.fold_stride * r) if case.folds > 1 else (segments, w)
        query = base + place + r * (a + case.query) - queries.low
        key = base + place + r * (b + case.key) - keys.low
        yield Piece(
            count,
            Rows(query, r, case.query_length, stride),
            Rows(key, r, case.key_length, stride),
            case.is_causal,
            case.band,
        )


def dense_cases(
    a: int, num_queries: int, b: int, num_keys: int, is_causal: bool, window: int | None, fold: bool = True
) -> Iterator[Case]:
    """Dense problems that hold exactly the visible pairs of grid places ``a...`` and ``b...``; no row without a key."""
    diagonal = a - b  # row i sees key i + diagonal as itself
    if window is not None and max(num_queries - 1 + diagonal, num_keys - 1 - diagonal) >= window:
        yield from _banded(num_queries, num_keys, Band(diagonal, window, is_causal), fold)
    elif is_causal:
        yield from _triangle(num_queries, num_keys, diagonal)
    else:
        yield Case(0, num_queries, 0, num_keys)


def _triangle(num_queries: int, num_keys: int, diagonal: int) -> Iterator[Case]:
    """A causal problem as a square causal part with full parts to its left and below."""
    skipped = max(0, -diagonal)  # rows before the first key
    rows, diagonal = num_queries - skipped, max(diagonal, 0)
    if rows <= 0:
        return
    if rows == 1:
        yield Case(skipped, 1, 0, min(diagonal + 1, num_keys))
        return
    left = min(diagonal, num_keys)
    if left > 0:
        yield Case(skipped, rows, 0, left)
    square = min(rows, num_keys - left)
    if square > 0:
        yield Case(skipped, square, left, square, is_causal=True)
        if square < rows:
            yield Case(skipped + square, rows - square, left, num_keys - left)


def _banded(num_queries: int, num_keys: int, band: Band, fold: bool) -> Iterator[Case]:
    """A window as blocks of query rows, each against the keys it reaches; equal blocks fold into one piece.

    Blocks whose keys overlap go to different folds, so that key gradients of one fold never share a row.
    """
    diagonal, size, is_causal = band
    ahead = 0 if is_causal else size - 1
    low = max(0, -diagonal - ahead)
    high = min(num_queries, num_keys - diagonal + size - 1)
    block = max(WINDOW_ROWS[0], min(2 * size, WINDOW_ROWS[1]))
    reach = block + size - 1 + ahead  # keys of an inner block

    def case(row: int, folds: int = 1, stride: int = 0) -> Case:
        rows = min(block, high - row)
        key = max(0, row + diagonal - size + 1)
        key_end = min(num_keys, row + rows + diagonal + ahead)
        own = Band(row + diagonal - key, size, is_causal)
        return Case(row, rows, key, key_end - key, False, own, folds, stride)

    count = max(0, -(-(high - low) // block))
    inner = range(
        max(0, -(-(size - 1 - diagonal - low) // block)),
        min((num_keys - diagonal - ahead - low) // block, (high - low) // block),
    )
    phases = -(-reach // block)
    if not fold or len(inner) <= phases:
        inner = range(0)
    for phase in range(phases if inner else 0):
        starts = inner[phase::phases]
        if starts:
            yield case(low + starts[0] * block, len(starts), phases * block)
    for n in range(count):
        if n not in inner:
            yield case(low + n * block)
