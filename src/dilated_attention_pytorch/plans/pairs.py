"""Counted pairs of patterns in closed form, by arithmetic on runs: no loop visits a token.

Rows of a run inside one segment meet a grid in an arithmetic progression of grid places m. The keys that the row at
place m sees are those from ``m - behind`` to before ``m + ahead`` of the segment's key places ``low <= j < high``, so
their number is ``F(m + ahead) - F(m - behind)`` with F(x) = clamp(x, low, high) - low: a sum of clamped ramps. Whole
segments repeat after ``step / gcd(step, w)`` of them, so that only one period is visited.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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
    total = np.zeros(len(sets), dtype=object)
    by_step = _by_step(sets)
    for branch in branches:
        classes = _grids(branch, problem.num_heads)
        for (limit, sample), samples in _sample_kinds(branch, problem).items():
            bounds = _bounds(branch, sample, sets, problem)
            for step, runs in by_step.items():
                spans = _spans(runs, step, problem.key_positions, limit, bounds)
                for place, heads in classes.items() if len(spans.owner) else ():
                    owners, pairs = _grid_pairs(branch, place, step, spans)
                    total[owners] += pairs.astype(object) * (samples * heads)
    return [int(pairs) for pairs in total]


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


def _by_step(sets: Sequence[Positions]) -> dict[int, Numbers]:
    """The runs of all sets as (owner, start, length) rows, (3, runs), by their step; that of a single row is 1."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for owner, runs in enumerate(sets):
        for start, step, length in runs:
            if length > 0:
                found.setdefault(step if length > 1 else 1, []).append((owner, start, length))
    return {step: np.array(rows, dtype=np.int64).T for step, rows in found.items()}


def _spans(runs: Numbers, step: int, keys: Positions, limit: int | None, bounds: Numbers) -> _Spans:
    """The rows of runs of this step against the keys of their own documents, where there are both; by owner."""
    starts, ends = bounds[:-1], bounds[1:]
    owner, start, length = runs
    reached = np.searchsorted(ends, start, side="right")  # the first document that ends behind the run's start
    past = np.searchsorted(starts, start + step * (length - 1), side="right")
    many = np.maximum(past - reached, 0)
    run = np.repeat(np.arange(len(owner)), many)
    document = np.arange(len(run)) + np.repeat(reached - (np.cumsum(many) - many), many)
    owner, start, length = runs[:, run]
    begins, ends = starts[document], ends[document]
    skipped = np.maximum(0, -((start - begins) // step))
    rows = np.minimum(length, -((start - ends) // step)) - skipped
    first = start + skipped * step - begins
    parts = []
    for key in keys:
        end = key.start + key.length if limit is None else min(key.start + key.length, limit)
        low, high = np.maximum(key.start, begins) - begins, np.minimum(end, ends) - begins
        parts.append(_Spans(owner, first, rows, low, high).take((rows > 0) & (high > low)))
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _Spans(*[owner[:0]] * 5)
    spans = _Spans(*(np.concatenate(x) for x in zip(*parts)))
    return spans.take(np.argsort(spans.owner, kind="stable"))


def _grid_pairs(branch: Branch, place: int, step: int, spans: _Spans) -> tuple[Numbers, Numbers]:
    """(owners, their pairs) of one sample and one head on the grid at ``place``."""
    end = int(max(spans.high.max(), (spans.first + step * (spans.rows - 1)).max() + 1))
    w = end if branch.segment_length is None else min(branch.segment_length, end)
    if end * w >= 1 << 61:
        spans = _Spans(spans.owner, *(x.astype(object) for x in spans[1:]))
    which, segment, times = _segments(spans, step, w)
    if len(which) == 0:
        return which, which
    inside = spans.take(which)
    base = segment * w
    # the rows of the span that stand in the segment: numbers i of them, from `skipped` on
    skipped = np.maximum(0, -((inside.first - base) // step))
    rows = np.minimum(inside.rows, -((inside.first - base - w) // step)) - skipped
    first = inside.first + skipped * step - base
    pairs = times * _segment_pairs(
        branch, place, step, first, rows, np.maximum(inside.low - base, 0), np.minimum(inside.high - base, w)
    )
    firsts = np.flatnonzero(np.diff(inside.owner, prepend=-1))
    return inside.owner[firsts], np.add.reduceat(pairs, firsts)


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
