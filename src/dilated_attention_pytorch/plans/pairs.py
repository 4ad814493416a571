"""Counted pairs of patterns in closed form, by arithmetic on runs: no loop visits a token.

Rows of a run inside one segment meet a grid in an arithmetic progression of grid places m. The keys that the row at
place m sees are those from ``m - behind`` to before ``m + ahead`` of the segment's key places ``low <= j < high``, so
their number is ``F(m + ahead) - F(m - behind)`` with F(x) = clamp(x, low, high) - low: a sum of clamped ramps. Whole
segments repeat after ``step / gcd(step, w)`` of them, so that only one period is visited.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dilated_attention_pytorch.patterns import Branch, Documents, Pattern
from dilated_attention_pytorch.problem import Positions, Problem, positions_end

Numbers = npt.NDArray[Any]
"""int64, or Python's own integers where products could pass 2^63."""


class _Spans(NamedTuple):
    """Rows ``first, first + step, ...`` and keys ``low <= k < high``, places inside one document; elementwise.

    ``owner`` is the number of the set of queries that the rows belong to.
    """

    owner: Numbers
    first: Numbers
    rows: Numbers
    low: Numbers
    high: Numbers

    def take(self, which: Numbers) -> _Spans:
        return _Spans(*(x[which] for x in self))


def closed_form_pairs(
    pattern: Pattern, problem: Problem, queries: Sequence[Positions] | None = None
) -> list[int] | None:
    """Counted pairs over samples and heads for each of some sets of query positions, by default the problem's own.

    Keys, their padding, heads and samples are the problem's. None where the pattern has no closed form, or keys do not
    stand in runs of step 1. Exact at any length.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import Run, make_problem
        >>> x = torch.empty(1, 10, 1, 8, device="meta")
        >>> whole = make_problem(x, x, x, scale=1.0, query_start=0)
        >>> closed_form_pairs(Causal(), whole, [(Run(0, 1, 5),), (Run(5, 1, 5),)])
        [15, 40]
    """
    branches = pattern.branches()
    if branches is None or any(run.step != 1 for run in problem.key_positions if run.length > 1):
        return None
    sets = (problem.query_positions,) if queries is None else tuple(queries)
    total = [0] * len(sets)
    for branch in branches:
        classes = _grids(branch, problem.num_heads)
        for (limit, sample), samples in _sample_kinds(branch, problem).items():
            bounds = _bounds(branch, sample, sets, problem)
            for step in sorted({run.step if run.length > 1 else 1 for runs in sets for run in runs}):
                spans = _spans(sets, step, problem.key_positions, limit, bounds)
                for place, heads in classes.items():
                    for owner, pairs in _grid_pairs(branch, place, step, spans):
                        total[owner] += samples * heads * pairs
    return total


def _grids(branch: Branch, num_heads: int) -> Counter[int]:
    """Heads by the place of their grid."""
    return Counter(int(branch.offset(head, num_heads)) for head in range(*branch.head_range(num_heads)))


def _sample_kinds(branch: Branch, problem: Problem) -> Counter[tuple[int | None, int]]:
    """Samples by their visible keys and the row of the table of documents."""
    varies = branch.documents is not None and branch.documents.varies_by_sample
    limits = problem.key_lengths
    return Counter((None if limits is None else limits[b], b if varies else 0) for b in range(problem.batch))


def _bounds(branch: Branch, sample: int, sets: Sequence[Positions], problem: Problem) -> Numbers:
    """Starts of the documents and the end of the last one; what stands beyond sees nothing."""
    if branch.documents is None:
        end = max([positions_end(problem.key_positions), *(positions_end(runs) for runs in sets)])
        return np.array([0, end], dtype=np.int64)
    documents = branch.documents.of_sample(sample)
    assert isinstance(documents, Documents)
    table = documents.bounds(documents.lengths.device)
    return np.asarray((table if table.dim() == 1 else table[0]).cpu().numpy(), dtype=np.int64)


def _spans(sets: Sequence[Positions], step: int, keys: Positions, limit: int | None, bounds: Numbers) -> _Spans:
    """The rows of runs of this step against the keys of their own documents, where there are both."""
    starts, ends = bounds[:-1], bounds[1:]
    parts = []
    for owner, runs in enumerate(sets):
        for run in runs:
            if run.length == 0 or (run.step if run.length > 1 else 1) != step:
                continue
            # only documents that the run reaches; with one or few it is all of them
            a = max(int(np.searchsorted(ends, run.start, side="right")), 0)
            b = int(np.searchsorted(starts, run.start + step * (run.length - 1), side="right"))
            skipped = np.maximum(0, -(-(starts[a:b] - run.start) // step))
            rows = np.minimum(run.length, -(-(ends[a:b] - run.start) // step)) - skipped
            first = run.start + skipped * step - starts[a:b]
            for key in keys:
                end = key.start + key.length if limit is None else min(key.start + key.length, limit)
                low = np.maximum(key.start, starts[a:b]) - starts[a:b]
                high = np.minimum(end, ends[a:b]) - starts[a:b]
                some = (rows > 0) & (high > low)
                parts.append(_Spans(np.full(b - a, owner), first, rows, low, high).take(some))
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return _Spans(nothing, nothing, nothing, nothing, nothing)
    return _Spans(*(np.concatenate(x) for x in zip(*parts)))


def _grid_pairs(branch: Branch, place: int, step: int, spans: _Spans) -> Iterator[tuple[int, int]]:
    """(owner, pairs) of one sample and one head on the grid at ``place``."""
    if len(spans.owner) == 0:
        return
    end = int(max(spans.high.max(), (spans.first + step * (spans.rows - 1)).max() + 1))
    w = end if branch.segment_length is None else min(branch.segment_length, end)
    if end * w >= 1 << 61:
        spans = _Spans(*(x.astype(object) for x in spans))
    which, segment, times = _segments(spans, step, w)
    if len(which) == 0:
        return
    inside = spans.take(which)
    base = segment * w
    # the rows of the span that stand in the segment: numbers i of them, from `skipped` on
    skipped = np.maximum(0, -((inside.first - base) // step))
    rows = np.minimum(inside.rows, -((inside.first - base - w) // step)) - skipped
    first = inside.first + skipped * step - base
    pairs = times * _segment_pairs(
        branch, place, step, first, rows, np.maximum(inside.low - base, 0), np.minimum(inside.high - base, w)
    )
    borders = np.flatnonzero(np.diff(inside.owner)) + 1
    for part, owners in zip(np.split(pairs, borders), np.split(inside.owner, borders)):
        yield int(owners[0]), int(part.sum())


def _segments(spans: _Spans, step: int, w: int) -> tuple[Numbers, Numbers, Numbers]:
    """The segments in which rows may meet keys: (span, segment, how many segments are like it), spans ascending."""
    last = spans.first + step * (spans.rows - 1)
    first_met = np.maximum(spans.first // w, spans.low // w)
    last_met = np.minimum(last // w, (spans.high - 1) // w)
    whole = np.maximum(spans.first // w + 1, -(-spans.low // w))
    whole_end = np.minimum(last // w, spans.high // w)
    period = step // math.gcd(step, w)
    many = np.clip(whole_end - whole, 0, None)
    shown = np.minimum(many, period).astype(np.int64)
    numbers = np.arange(len(shown))
    inner = np.repeat(numbers, shown)
    turn = np.arange(len(inner)) - np.repeat(np.cumsum(shown) - shown, shown)
    edges = [
        (numbers, first_met, (first_met <= last_met) & ((first_met < whole) | (first_met >= whole_end))),
        (numbers, last_met, (first_met < last_met) & ((last_met < whole) | (last_met >= whole_end))),
    ]
    which = np.concatenate([inner, *(span[some] for span, _, some in edges)])
    segment = np.concatenate([whole[inner] + turn, *(at[some] for _, at, some in edges)])
    times = np.concatenate([(many[inner] - turn + period - 1) // period, np.ones(len(which) - len(inner), np.int64)])
    order = np.argsort(which, kind="stable")
    return which[order], segment[order], times[order]


def _segment_pairs(
    branch: Branch, place: int, step: int, first: Numbers, rows: Numbers, low: Numbers, high: Numbers
) -> Numbers:
    """Pairs of rows ``first + i * step`` with keys ``low <= k < high``, places inside a segment; elementwise."""
    r = branch.dilation_rate
    shared = math.gcd(step, r)
    stride = r // shared  # every stride-th row is on the grid, if any is
    skipped = (place - first) // shared * pow(step // shared, -1, stride) % stride
    terms = np.where((place - first) % shared == 0, np.maximum(0, -((skipped - rows) // stride)), 0)
    m, climb = (first + skipped * step - place) // r, step // shared
    low, high = np.maximum(0, -((place - low) // r)), np.maximum(0, -((place - high) // r))
    top = np.maximum(0, high - low)
    reach = None if branch.window is None else -(-branch.window // r)
    ahead = 1 if branch.is_causal else reach
    seen: Numbers = terms * top if ahead is None else _ramp(m + ahead - low, climb, terms, top)
    return seen if reach is None else seen - _ramp(m - reach + 1 - low, climb, terms, top)


def _ramp(first: Numbers, climb: int, terms: Numbers, top: Numbers) -> Numbers:
    """The sum of ``first + i * climb`` over i < terms, each held between 0 and ``top``; elementwise."""
    low = np.minimum(np.maximum(-(first // climb), 0), terms)
    high = np.minimum(np.maximum(-((first - top) // climb), low), terms)
    n = high - low
    total: Numbers = n * (first + low * climb) + climb * (n * (n - 1) // 2) + top * (terms - high)
    return total
