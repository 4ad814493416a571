"""The plan of a gather: which rows go to whom, in which order they travel, and what is computed with them.

What one rank sends to another travels in the order (term, section, layer of needed rows, class of heads, run), and
inside such a parcel by sample, kv head, repeat of the section and row: both sides find that order from positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.parallel.grids import (
    Frame,
    Numbers,
    Rows,
    Runs,
    Section,
    Term,
    meet,
    needed,
    query_places,
)
from dilated_attention_pytorch.parallel.shapes import Shape, splits
from dilated_attention_pytorch.problem import Positions, Run


class Parcels(NamedTuple):
    """Rows that travel, an entry for each run of them: from or to a rank, for a class of heads in a section."""

    rank: Numbers
    visit: Numbers  # number of the term and section
    head_class: Numbers
    start: Numbers  # position of the first row
    step: Numbers  # positions from one row to the next
    length: Numbers
    row: Numbers  # of the first one at the rank that has it
    row_step: Numbers
    held_step: Numbers  # positions from one row of that rank's run to the next
    wire_rows: Numbers  # samples x kv heads x repeats of the section x length

    def take(self, which: Numbers) -> Parcels:
        """The entries with these numbers."""
        return Parcels(*(x[which] for x in self))

    def counts(self, size: int) -> tuple[int, ...]:
        """Wire rows from or to each of ``size`` ranks."""
        return tuple(int(n) for n in np.bincount(self.rank, weights=self.wire_rows, minlength=size))


class Visit(NamedTuple):
    """A section in which a term asks this rank, or others, for rows."""

    term: Term
    section: Section


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows of entries of equal size, each made of arithmetic runs: a table of (first, step, length)."""

    table: Tensor
    shape: tuple[int, int]  # entries, rows of each

    def expand(self) -> Tensor:
        """All row numbers: (entries, rows), int64."""
        first, step, length = self.table.unbind(1)
        run, place = _places(length, self.shape[0] * self.shape[1])
        return (first[run] + step[run] * place).view(self.shape)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Equal dense problems of own queries with received rows; no query row and no received row is in it twice."""

    shape: Shape
    samples: Tensor  # (E,)
    heads: Tensor  # (E, t): query heads that read the same kv head
    queries: Segments
    keys: Segments


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """What a rank sends, receives and computes with what came. Rows are wire rows: of one sample and one kv head."""

    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    sends: Tensor  # (parcels, 9), see `sent_rows`
    kv_heads: Tensor
    bundles: tuple[Bundle, ...]

    def sent_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, row, kv head) of everything that this rank sends, in the order in which it travels."""
        sample, row, row_step, length, apart, times, kv_first, kv_size, count = self.sends.unbind(1)
        parcel, rest = _places(count, sum(self.send_counts))
        place, rest = rest % length[parcel], rest // length[parcel]
        turn, rest = rest % times[parcel], rest // times[parcel]
        kv, rest = rest % kv_size[parcel], rest // kv_size[parcel]
        rows = row[parcel] + row_step[parcel] * place + apart[parcel] * turn
        return sample[parcel] + rest, rows, self.kv_heads[kv_first[parcel] + kv]


def _places(sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For ``total`` things in boxes of these sizes: the box of each, and its place in the box."""
    box = torch.repeat_interleave(sizes, output_size=total)
    return box, torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes)[box]


@lru_cache(maxsize=64)
def traffic_rows(
    terms: tuple[Term, ...], rank: int, queries: tuple[Positions, ...], keys: tuple[Positions, ...]
) -> tuple[int, int]:
    """Wire rows that a rank receives, and that it sends."""
    frame = Frame(rank, Rows(queries), Rows(keys))
    visits = _visits(terms, frame)
    received, sent = (sum(int(p.wire_rows.sum()) for p in _parcels(frame, visits, comes)) for comes in (True, False))
    return received, sent


@lru_cache(maxsize=32)
def gather_plan(
    terms: tuple[Term, ...],
    rank: int,
    queries: tuple[Positions, ...],
    keys: tuple[Positions, ...],
    device: torch.device,
) -> GatherPlan:
    """The plan of one rank of a world, its tables on a device."""
    frame = Frame(rank, Rows(queries), Rows(keys))
    visits = _visits(terms, frame)
    arriving, leaving = (_in_order(_parcels(frame, visits, comes)) for comes in (True, False))
    sends, kv_heads = (x.to(device) for x in _send_table(visits, leaving))
    bundles = tuple(_bundles(frame, visits, arriving, device))
    return GatherPlan(leaving.counts(len(keys)), arriving.counts(len(keys)), sends, kv_heads, bundles)


def _visits(terms: Sequence[Term], frame: Frame) -> list[Visit]:
    return [Visit(term, section) for term in terms for section in frame.sections(term)]


def _parcels(frame: Frame, visits: Sequence[Visit], comes: bool) -> Iterator[Parcels]:
    """What comes to this rank, or what leaves it."""
    me, keys = frame.rank, frame.keys
    held = (keys.rank != me) if comes else (keys.rank == me)
    runs, rows, owners = keys.runs.at(held), keys.row[held], keys.rank[held]
    askers = np.array([me]) if comes else np.flatnonzero(np.arange(keys.size) != me)
    queries = frame.queries.by_rank.at(askers)
    for number, (term, section) in enumerate(visits):
        kv_heads = np.array([len(c.kv_heads) for c in term.classes])
        wide = (term.samples[1] - term.samples[0]) * section.times
        for layer in needed(term, section, queries):  # (C, askers)
            met = meet(runs, layer.at((..., None)))  # (C, askers, runs)
            c, asker, run = np.nonzero(met.length)
            start, step, length = (np.broadcast_to(x, met.length.shape)[c, asker, run] for x in met)
            yield Parcels(
                owners[run] if comes else askers[asker],
                np.full(len(c), number),
                c,
                start,
                step,
                length,
                rows[run] + (start - runs.start[run]) // runs.step[run],
                step // runs.step[run],
                runs.step[run],
                wide * kv_heads[c] * length,
            )


def _in_order(parts: Iterator[Parcels]) -> Parcels:
    """All together in the order in which they travel: by rank, else as they come."""
    nothing = np.zeros(0, dtype=np.int64)
    whole = Parcels(*(np.concatenate(columns) for columns in zip((nothing,) * 10, *parts)))
    return whole.take(np.argsort(whole.rank, kind="stable"))


def _send_table(visits: Sequence[Visit], leaving: Parcels) -> tuple[Tensor, Tensor]:
    """The rows of `GatherPlan.sends`, and the kv heads that they point into."""
    kv_heads: list[int] = []
    places: dict[tuple[int, ...], int] = {}
    table = np.zeros((len(leaving.rank), 9), dtype=np.int64)
    table[:, 1], table[:, 2], table[:, 3] = leaving.row, leaving.row_step, leaving.length
    table[:, 8] = leaving.wire_rows
    for i, (number, c) in enumerate(zip(leaving.visit.tolist(), leaving.head_class.tolist())):
        term, section = visits[number]
        of = term.classes[c].kv_heads
        if of not in places:
            places[of] = len(kv_heads)
            kv_heads.extend(of)
        table[i, 0], table[i, 5] = term.samples[0], section.times
        table[i, 6], table[i, 7] = places[of], len(of)
        table[i, 4] = section.apart
    table[:, 4] //= leaving.held_step
    return torch.from_numpy(table), torch.tensor(kv_heads, dtype=torch.int64)


def _bundles(frame: Frame, visits: Sequence[Visit], arriving: Parcels, device: torch.device) -> Iterator[Bundle]:
    """The dense problems of this rank's queries with what comes, equal ones together."""
    offset = np.cumsum(arriving.wire_rows) - arriving.wire_rows
    mine = frame.queries.rank == frame.rank
    runs, first_row = frame.queries.runs.at(mine), frame.queries.row[mine]
    groups: dict[tuple[int, int, Shape, int], list[tuple[Numbers, ...]]] = {}
    order = np.lexsort((arriving.head_class, arriving.visit))
    borders = np.flatnonzero(np.diff(arriving.visit[order]) | np.diff(arriving.head_class[order])) + 1
    for which in np.split(order, borders) if len(order) else ():
        number, c = int(arriving.visit[which[0]]), int(arriving.head_class[which[0]])
        term, section = visits[number]
        origin, rate, of = section.low + term.classes[c].offset, term.rate, term.classes[c]
        met = Runs(*np.broadcast_arrays(*query_places(term, section, runs))).at(c)  # (Q,)
        asking = np.flatnonzero(met.length)
        own, came = _grid_runs(met.at(asking), origin, rate), arriving.take(which)
        keys = _grid_runs(came, origin, rate)
        rows = (first_row + (met.start - runs.start) // runs.step)[asking]
        row_step, apart = (met.step // runs.step)[asking], (section.apart // runs.step)[asking]
        reach = None if term.window is None else -(-term.window // term.rate)
        i, j, turn = np.indices((term.samples[1] - term.samples[0], len(of.kv_heads), section.times)).reshape(3, -1, 1)
        entry = (i * len(of.kv_heads) + j) * section.times + turn  # (E, 1)
        for ordinal, (shape, a, b) in enumerate(splits(term.is_causal, reach, own, keys)):
            groups.setdefault((term.branch, ordinal, shape, len(of.heads[0])), []).append(
                (
                    term.samples[0] + i[:, 0],
                    np.array(of.heads)[j[:, 0]],
                    _table(rows[a] + turn * apart[a], row_step[a], met.length[asking][a]),
                    _table(offset[which][b] + entry * came.length[b], np.array(1), came.length[b]),
                )
            )
    for (_, _, shape, _), members in groups.items():
        samples, heads, *tables = (torch.from_numpy(np.concatenate(x)).to(device) for x in zip(*members))
        sizes = ((len(samples), side.length) for side in (shape.queries, shape.keys))
        yield Bundle(shape, samples, heads, *(Segments(table, size) for table, size in zip(tables, sizes)))


def _table(first: Numbers, step: Numbers, length: Numbers) -> Numbers:
    """Rows (first, step, length) of a table, entry by entry, from ``first`` (E, runs)."""
    table: Numbers = np.stack(np.broadcast_arrays(first, step, length), -1).reshape(-1, 3)
    return table


def _grid_runs(runs: Runs | Parcels, origin: int, rate: int) -> list[Run]:
    """Positions on a grid as its places."""
    places = zip(((runs.start - origin) // rate).tolist(), (runs.step // rate).tolist(), runs.length.tolist())
    return [Run(start, step if length > 1 else 1, length) for start, step, length in places]
