"""Which rows of a sequence the queries of a rank see in a branch, by arithmetic on runs: no loop visits a token.

A branch lives in sections: the segments of documents. In a section the rows on a head's grid are one run, so what a
rank lacks there are meetings of runs with runs. Sections that are alike for all ranks are visited once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dilated_attention_pytorch.patterns import Branch, Documents
from dilated_attention_pytorch.problem import Positions, Problem

Numbers = npt.NDArray[Any]
"""int64, elementwise and broadcastable."""


class Runs(NamedTuple):
    """Many runs: positions ``start, start + step, ...``, ``length`` of them; arrays that broadcast."""

    start: Numbers
    step: Numbers
    length: Numbers

    @property
    def last(self) -> Numbers:
        """The last position; before ``start`` where there is none."""
        last: Numbers = self.start + self.step * (self.length - 1)
        return last

    def at(self, index: Any) -> Runs:
        """All three indexed alike."""
        return Runs(*(x[index] for x in self))


def meet(a: Runs, b: Runs) -> Runs:
    """The positions that are in both, elementwise; their step is the common multiple of the steps.

    Example:
        >>> one = Runs(*(np.array([x]) for x in (0, 4, 10)))
        >>> other = Runs(*(np.array([x]) for x in (6, 6, 4)))
        >>> [int(x[0]) for x in meet(one, other)]
        [12, 12, 2]
    """
    shared = np.gcd(a.step, b.step)
    turn, step = b.step // shared, a.step // shared * b.step
    gap = b.start - a.start
    skipped = gap // shared % turn * _inverse(a.step // shared, turn) % turn  # rows of a before one that b's steps hit
    first = a.start + skipped * a.step
    first = first + np.maximum(0, -((first - b.start) // step)) * step
    length = (np.minimum(a.last, b.last) - first) // step + 1
    some = (gap % shared == 0) & (a.length > 0) & (b.length > 0)
    return Runs(first, step, np.where(some, np.maximum(0, length), 0))


def _inverse(x: Numbers, modulus: Numbers) -> Numbers:
    """``pow(x, -1, modulus)``, elementwise; there are few different ones."""
    x, modulus = np.broadcast_arrays(x, modulus)
    assert max(x.max(initial=0), modulus.max(initial=0)) < 1 << 31, "a pair is one number, a product stays in int64"
    known, which = np.unique(x << 32 | modulus, return_inverse=True)
    inverses = [pow(pair >> 32, -1, pair & 0xFFFFFFFF) for pair in known.tolist()]
    found: Numbers = np.array(inverses, dtype=np.int64)[which].reshape(x.shape)
    return found


class HeadClass(NamedTuple):
    """Heads whose grids begin at the same place: of each of some kv heads equally many query heads."""

    offset: int
    kv_heads: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]  # those of each kv head


class Term(NamedTuple):
    """What a branch asks of samples that see alike; hashable, nothing but numbers.

    ``bounds`` are the starts of documents and the end of the last one. Keys from ``limit`` on are not seen.
    """

    branch: int
    samples: tuple[int, int]
    segment_length: int | None
    rate: int
    is_causal: bool
    window: int | None
    bounds: tuple[int, ...]
    limit: int
    classes: tuple[HeadClass, ...]

    @property
    def offsets(self) -> Numbers:
        """Where the grids of the classes begin: (C,)."""
        return np.array([c.offset for c in self.classes], dtype=np.int64)


class Section(NamedTuple):
    """Positions ``low <= p < high`` that see each other only, ``times`` of them, ``apart`` from one to the next."""

    low: int
    high: int
    times: int
    apart: int


def terms(branches: Sequence[Branch], problem: Problem, end: int) -> tuple[Term, ...]:
    """What all branches ask of all samples of a problem whose positions are below ``end``."""
    found = []
    for number, branch in enumerate(branches):
        classes = head_classes(branch, problem.num_heads, problem.kv_group)
        longest = end if branch.segment_length is None else min(branch.segment_length, end)
        for samples, bounds, limit in _samples(branch, problem, end):
            found.append(
                Term(
                    number,
                    samples,
                    branch.segment_length,
                    max(1, min(branch.dilation_rate, longest)),  # further on, a segment has one place anyway
                    branch.is_causal,
                    branch.window,
                    bounds,
                    limit,
                    classes,
                )
            )
    return tuple(term for term in found if term.classes and term.samples[0] < term.samples[1])


def head_classes(branch: Branch, num_heads: int, kv_group: int) -> tuple[HeadClass, ...]:
    """The heads that run a branch, by the place of their grid and how many share a kv head.

    Example:
        >>> head_classes(Branch(8, 2), 2, 2)
        (HeadClass(offset=0, kv_heads=(0,), heads=((0,),)), HeadClass(offset=1, kv_heads=(0,), heads=((1,),)))
    """
    readers: dict[tuple[int, int], list[int]] = {}
    for head in range(*branch.head_range(num_heads)):
        readers.setdefault((int(branch.offset(head, num_heads)), head // kv_group), []).append(head)
    classes: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {}
    for (offset, kv_head), heads in readers.items():
        classes.setdefault((offset, len(heads)), {})[kv_head] = tuple(heads)
    return tuple(HeadClass(offset, tuple(of), tuple(of.values())) for (offset, _), of in classes.items())


def _samples(branch: Branch, problem: Problem, end: int) -> Iterator[tuple[tuple[int, int], tuple[int, ...], int]]:
    """Neighbouring samples with equal documents and visible keys: (samples, bounds of documents, limit)."""
    tables: list[tuple[int, ...]] = [(0, end)]
    if branch.documents is not None:
        assert isinstance(branch.documents, Documents)
        lengths = branch.documents.lengths
        bounds = branch.documents.bounds(lengths.device).tolist()
        tables = [tuple(b) for b in (bounds if lengths.dim() == 2 else [bounds])]
    limits = problem.key_lengths
    kinds = [
        (tables[b if len(tables) > 1 else 0], end if limits is None else min(limits[b], end))
        for b in range(problem.batch)
    ]
    first = 0
    for b in range(1, problem.batch + 1):
        if b == problem.batch or kinds[b] != kinds[first]:
            yield (first, b), *kinds[first]
            first = b


class Rows:
    """The rows of all ranks as arrays: flat, one entry a run; ``row`` is a run's first row at its rank."""

    def __init__(self, positions: Sequence[Positions]) -> None:
        flat = [(rank, *run) for rank, runs in enumerate(positions) for run in runs if run.length > 0]
        table = np.array(flat, dtype=np.int64).reshape(-1, 4).T
        self.size = len(positions)
        self.rank = table[0]
        self.runs = Runs(table[1], np.where(table[3] == 1, 1, table[2]), table[3])
        before = np.cumsum(self.runs.length) - self.runs.length
        self.row = before - before[np.searchsorted(self.rank, self.rank)] if len(before) else before

    @cached_property
    def by_rank(self) -> Runs:
        """The same as a table (ranks, runs), filled up with empty runs."""
        number = np.arange(len(self.rank)) - np.searchsorted(self.rank, self.rank)
        width = int(number.max(initial=0)) + 1
        table = [np.full((self.size, width), fill, dtype=np.int64) for fill in (0, 1, 0)]
        for column, values in zip(table, self.runs):
            column[self.rank, number] = values
        return Runs(*table)

    def of(self, rank: int) -> Runs:
        """The runs of a rank."""
        return self.runs.at(self.rank == rank)


class Frame(NamedTuple):
    """Where the rows of all ranks stand, as one rank looks at it."""

    rank: int
    queries: Rows
    keys: Rows

    def sections(self, term: Term) -> Iterator[Section]:
        """The sections in which this rank may lack rows or others may lack its rows, in ascending order.

        All ranks find the same sections, as far as they find them: each is between the same borders.
        """
        borders = self._borders(term.limit)
        steps = {int(s) for rows in (self.queries, self.keys) for s in np.unique(rows.runs.step)}
        lows, highs = (np.array(x, dtype=np.int64) for x in (term.bounds[:-1], term.bounds[1:]))
        for low, high in zip(lows[(found := self._matters(lows, highs))].tolist(), highs[found].tolist()):
            w = min(term.segment_length or high - low, high - low)
            inner = borders[np.searchsorted(borders, low) : np.searchsorted(borders, high, side="right")] - low
            cuts = np.unique(
                np.concatenate((inner // w, -(-inner // w), [0, (high - low) // w, -(-(high - low) // w)]))
            )
            first, after = cuts[:-1], cuts[1:]
            period = math.lcm(*(step // math.gcd(step, w) for step in steps))
            some = self._matters(low + first * w, np.minimum(low + after * w, high))
            for a, b in zip(first[some].tolist(), after[some].tolist()):
                for turn in range(min(b - a, period)):
                    start = low + (a + turn) * w
                    yield Section(start, min(start + w, high), -(-(b - a - turn) // period), period * w)

    def _borders(self, limit: int) -> Numbers:
        """Where some rank's rows, or the visible keys, begin or end."""
        return np.unique(
            np.concatenate([x for r in (self.queries.runs, self.keys.runs) for x in (r.start, r.last + 1)] + [[limit]])
        )

    def _matters(self, low: Numbers, high: Numbers) -> Numbers:
        """Whether positions ``low <= p < high`` may hold queries of this rank and keys of others, or the reverse."""
        (asks, sees), (has, knows) = (
            self._touches(rows.of(self.rank), low, high) for rows in (self.queries, self.keys)
        )
        found: Numbers = (low < high) & (asks & ~knows | has & ~sees)
        return found

    @staticmethod
    def _touches(runs: Runs, low: Numbers, high: Numbers) -> tuple[Numbers, Numbers]:
        """Whether a run reaches into positions ``low <= p < high``, and whether one holds them all."""
        low, high = low[:, None], high[:, None]
        near = (runs.start < high) & (runs.last >= low)
        whole = (runs.step == 1) & (runs.start <= low) & (runs.last >= high - 1)
        return np.asarray(near.any(axis=1)), np.asarray(whole.any(axis=1))


def query_places(term: Term, section: Section, queries: Runs) -> Runs:
    """The queries of runs (..., Q) that are on the classes' grids in a section: (C, ..., Q)."""
    start = section.low + term.offsets.reshape((-1,) + (1,) * queries.start.ndim)
    grid = Runs(start, np.array(term.rate), np.maximum(0, -((start - section.high) // term.rate)))
    return meet(queries.at(None), grid)


def needed(term: Term, section: Section, queries: Runs) -> Iterator[Runs]:
    """The positions in a section that queries see, as runs (C, ranks) that share none; ``queries`` is (ranks, Q).

    Where a rank has several runs whose windows leave rows out between them, those rows are taken too.
    """
    met = query_places(term, section, queries)  # (C, ranks, Q)
    some, r = met.length > 0, term.rate
    origin = section.low + term.offsets[:, None]
    high = min(section.high, term.limit)

    def places(first: Numbers, last: Numbers) -> Runs:
        last = np.minimum(last, high - 1)
        return Runs(first, np.array(r), np.where(last >= first, (last - first) // r + 1, 0))

    nowhere = np.broadcast_to(origin - r, some.shape[:2])
    if term.window is None:
        latest = np.where(some, met.last, nowhere[..., None]).max(-1)
        last = latest if term.is_causal else np.where(some.any(-1), high - 1, nowhere)
        yield places(np.broadcast_to(origin, last.shape), last)
        return
    behind = -(-term.window // r) - 1
    ahead = 0 if term.is_causal else behind
    alone = (met.step > (behind + ahead + 1) * r) & (queries.length > 1) & (some.shape[-1] == 1)
    holed = alone.any(-1)  # windows leave rows out between them: a layer for each distance
    order = np.argsort(np.where(some, met.start, np.iinfo(np.int64).max), -1)
    dense, starts, lasts = (np.take_along_axis(x, order, -1) for x in (some & ~alone, met.start, met.last))
    reached = nowhere
    for i in range(some.shape[-1]):
        first = np.maximum(starts[..., i] - behind * r, reached + r)
        last = np.where(dense[..., i], lasts[..., i] + ahead * r, nowhere)
        yield places(first, last)
        reached = np.maximum(reached, last)
    if holed.any():
        start, step, length = met.at((..., 0))
        inside = Runs(origin, np.array(1), np.maximum(0, high - origin))
        for d in range(-behind, ahead + 1):
            yield meet(Runs(start + d * r, step, np.where(holed, length, 0)), inside)
