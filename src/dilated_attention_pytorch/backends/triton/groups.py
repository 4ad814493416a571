"""Which rows of a head share one set of branches, and the tiles that these groups are cut into.

Rows are positions of one side of the problem, the queries (forward, dq) or the keys (dk, dv). The other side, the
partners, is what a tile walks. Inside a document positions are counted from its first token, here called places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PERIOD_LIMIT, TINY_SEGMENT = 1024, 64
"""A segment that its rate does not divide either joins the period of the residues or cuts epochs. All such segments
join when the period stays within the limit (tokens), else only tiny ones: their epochs would be shorter than a tile."""


class Entries(NamedTuple):
    """Branches as the rows of one head meet them, one element each; a plain branch number, or with several query heads
    on one key head ``local head * number of branches + branch``."""

    number: Ints
    segment: Ints  # w, at least 1, at most the whole length
    rate: Ints
    offset: Ints
    behind: Ints  # tokens that a row sees before its own position
    ahead: Ints  # and after it


class Strips(NamedTuple):
    """Rows and partners of each document: absolute positions, half-open. Rows outside all documents have no partners
    and ``member`` False."""

    origin: Ints  # first token of the document
    end: Ints  # one past its last token
    row_low: Ints
    row_high: Ints
    member: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows that share one set of entries: ``pos = base + (i // residues) * period + residue[first + i % residues]``.

    All arrays have one element for each group, apart from `residue` and `entry_list`, into which they point. A `mixed`
    group is a run of consecutive rows, of several documents or entries: its list names all that some row may be on.
    """

    period: int
    residue: Ints
    entry_list: Ints  # places in an Entries
    base: Ints
    residue_first: Ints
    residues: Ints
    rows: Ints
    entry_first: Ints
    entries: Ints
    mixed: Ints  # 0 or 1

    def positions(self, group: Ints, index: Ints) -> Ints:
        """Absolute positions of rows ``index`` of the groups."""
        g = self.residues[group]
        return self.base[group] + index // g * self.period + self.residue[self.residue_first[group] + index % g]

    def occupied(self) -> Groups:
        """Only the groups that have entries."""
        keep = self.entries > 0
        names = ("base", "residue_first", "residues", "rows", "entry_first", "entries", "mixed")
        return Groups(self.period, self.residue, self.entry_list, *(getattr(self, name)[keep] for name in names))


@dataclass(frozen=True, eq=False)
class Tiles:
    """Blocks of rows of groups, and the partner slots that each walks (rounded up to whole blocks)."""

    group: Ints
    first: Ints
    visited: Ints


def ragged(lengths: Ints) -> tuple[Ints, Ints]:
    """For lists of these lengths one after another: the list of each element, and its place in the list.

    Example:
        >>> ragged(np.array([2, 0, 1]))
        (array([0, 0, 2]), array([0, 1, 0]))
    """
    which = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    starts = np.cumsum(lengths) - lengths
    return which, np.arange(len(which), dtype=np.int64) - starts[which]


def split_documents(bounds: Ints | None, low: int, high: int, end: int) -> Strips:
    """The parts of rows ``low <= p < high`` in each document, and those past the last one, which see nothing.

    ``bounds`` (documents + 1,) are absolute positions; None is one document of ``end`` tokens.
    """
    if bounds is None:
        bounds = np.array([0, end], dtype=np.int64)
    origin, stop = bounds[:-1], bounds[1:]
    member = np.ones(len(origin), dtype=bool)
    if bounds[-1] < high:
        origin, stop = np.append(origin, bounds[-1]), np.append(stop, high)
        member = np.append(member, False)
    row_low, row_high = np.maximum(origin, low), np.minimum(stop, high)
    keep = row_low < row_high
    return Strips(origin[keep], stop[keep], row_low[keep], row_high[keep], member[keep])


def make_groups(entries: Entries, strips: Strips, tile_rows: int) -> Groups:
    """The groups of all rows of the strips; every row is in exactly one.

    A strip is cut into epochs where a segment starts that shifts its branch's grid. Epochs that meet all grids in the
    same phase share their lists of residues. Epochs too short to fill tiles of ``tile_rows`` with one set of entries
    are left whole, and join with such neighbours.
    """
    low, high = strips.row_low - strips.origin, strips.row_high - strips.origin  # places
    joins, period, cuts = _grids(entries, int(high.max(initial=1)))
    strip, start, length = _epochs(cuts, low, high)
    period = min(period, int(length.max(initial=1)))
    phase = start[:, None] % entries.segment
    phase = np.where(joins, phase, phase % entries.rate)
    phase = np.concatenate([strips.member[strip, None], phase], 1)
    at = strips.origin[strip] + start

    longest = int(np.argmax(length)) if len(length) else 0
    sets = len(_kinds(entries, joins, phase[longest : longest + 1], np.array([period])).first) if len(length) else 1
    short = (length < tile_rows * max(sets, 2) / 2) & strips.member[strip]
    parts = [_residue_groups(entries, joins, period, phase[~short], at[~short], length[~short])]
    parts.append(_mixed_groups(len(entries.number), period, at[short], length[short]))
    return _joined(period, parts)


def _residue_groups(
    entries: Entries, joins: npt.NDArray[np.bool_], period: int, phase: Ints, at: Ints, length: Ints
) -> Groups:
    phases, of_epoch = np.unique(phase, axis=0, return_inverse=True)
    of_epoch = of_epoch.reshape(-1)
    spans = np.zeros(len(phases), dtype=np.int64)
    np.maximum.at(spans, of_epoch, np.minimum(length, period))
    kinds = _kinds(entries, joins, phases, spans)

    first_kind = np.searchsorted(kinds.phase, np.arange(len(phases) + 1))
    epoch, nth = ragged(np.diff(first_kind)[of_epoch])
    kind = first_kind[of_epoch[epoch]] + nth
    place = np.repeat(np.arange(len(kinds.first)), kinds.size) * (period + 1) + kinds.residue
    rest = np.searchsorted(place, kind * (period + 1) + length[epoch] % period) - kinds.first[kind]
    rows = length[epoch] // period * kinds.size[kind] + rest
    epoch, kind, rows = (x[rows > 0] for x in (epoch, kind, rows))
    columns = (kinds.first[kind], kinds.size[kind], rows, kinds.entry_first[kind], kinds.entries[kind])
    return Groups(period, kinds.residue, kinds.entry_list, at[epoch], *columns, np.zeros_like(rows))


def _mixed_groups(entries: int, period: int, at: Ints, length: Ints) -> Groups:
    """One group for each run of neighbouring epochs: all residues of a period are consecutive rows."""
    starts = np.flatnonzero(np.append(True, at[1:] != at[:-1] + length[:-1])[: len(at)])
    rows = np.add.reduceat(length, starts) if len(starts) else length
    same = np.zeros_like(rows)
    residue, columns = (
        np.arange(period if len(rows) else 0),
        (same, same + period, rows, same, same + entries, same + 1),
    )
    return Groups(period, residue, np.arange(entries), at[starts], *columns)


def _joined(period: int, parts: list[Groups]) -> Groups:
    """The groups of several parts of one period."""
    columns, at, entry_at = [], 0, 0
    for p in parts:
        first, entry_first = p.residue_first + at, p.entry_first + entry_at
        columns.append((p.residue, p.entry_list, p.base, first, p.residues, p.rows, entry_first, p.entries, p.mixed))
        at, entry_at = at + len(p.residue), entry_at + len(p.entry_list)
    return Groups(period, *(np.concatenate(column) for column in zip(*columns)))


class _Kinds(NamedTuple):
    """Sets of residues of one phase that share their entries, phase by phase."""

    residue: Ints
    entry_list: Ints
    phase: Ints
    first: Ints
    size: Ints
    entry_first: Ints
    entries: Ints


def _grids(entries: Entries, extent: int) -> tuple[npt.NDArray[np.bool_], int, Ints]:
    """Which entries join the period with their segment, the period (tokens), and the places where epochs start anew."""
    shifting = (entries.segment % entries.rate != 0) & (entries.segment < extent)
    rates = math.lcm(*entries.rate[~shifting].tolist())
    segments = sorted(set(entries.segment[shifting].tolist()))
    all_join = math.lcm(rates, *segments) <= PERIOD_LIMIT
    joining = [w for w in segments if all_join or w <= TINY_SEGMENT]
    while math.lcm(rates, *joining) > PERIOD_LIMIT and joining:
        joining.pop()
    joins = shifting & np.isin(entries.segment, joining)
    period = math.lcm(rates, *joining, *entries.rate[shifting & ~joins].tolist())
    cuts = [np.arange(w, extent, w) for w in segments if w not in joining]
    return joins, period, np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *cuts]))


def _epochs(cuts: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints, Ints]:
    """The strip, first place and length of every epoch of places ``low <= x < high`` of each strip."""
    after = np.searchsorted(cuts, low, side="right")
    strip, nth = ragged(np.searchsorted(cuts, high) - after + 1)
    padded = np.concatenate([cuts, [0]])
    start = np.where(nth == 0, low[strip], padded[after[strip] + nth - 1])
    stop = np.append(start[1:], 0)
    stop = np.where(np.append(strip[1:], -1) == strip, stop, high[strip])
    return strip, start, stop - start


def _kinds(entries: Entries, joins: npt.NDArray[np.bool_], phases: Ints, spans: Ints) -> _Kinds:
    phase, y = ragged(spans)
    place = phases[phase, 1:] + y[:, None]
    place = np.where(joins, place % entries.segment, place) % entries.rate
    seen = (place == entries.offset) & (phases[phase, :1] > 0)
    packed = np.packbits(np.concatenate([seen, np.zeros((len(seen), 1), dtype=bool)], 1), axis=1)
    words = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).reshape(-1)
    _, where, group = np.unique(words, return_index=True, return_inverse=True)
    sets = seen[where]
    group = phase * len(where) + group.reshape(-1)
    order = np.argsort(group, kind="stable")
    names, first, size = np.unique(group[order], return_index=True, return_counts=True)
    nth = np.nonzero(sets)[1]
    entries_of = sets.sum(1)
    of_set = names % len(where)
    starts = np.cumsum(entries_of) - entries_of
    return _Kinds(y[order], nth, names // len(where), first, size, starts[of_set], entries_of[of_set])


def make_tiles(
    groups: Groups, entries: Entries, strips: Strips, partners: tuple[int, int], block: tuple[int, int]
) -> Tiles:
    """Tiles of ``block[0]`` rows of every group, and how many partner slots each visits.

    ``partners`` are the absolute positions of the other side, half-open.
    """
    group, first = ragged(-(-groups.rows // block[0]))
    first = first * block[0]
    last = np.minimum(first + block[0], groups.rows[group]) - 1
    low, high = groups.positions(group, first), groups.positions(group, last)
    begin = np.searchsorted(strips.row_high, low, side="right")
    tile, nth = ragged(np.searchsorted(strips.row_low, high, side="right") - begin)  # and documents
    strip = begin[tile] + nth
    part, nth = ragged(np.where(strips.member[strip], groups.entries[group[tile]], 0))  # and entries
    tile, strip = tile[part], strip[part]
    entry = groups.entry_list[groups.entry_first[group[tile]] + nth]
    origin = strips.origin[strip]
    rows = (np.maximum(low[tile], strips.row_low[strip]), np.minimum(high[tile], strips.row_high[strip] - 1))
    span = (np.maximum(partners[0], origin), np.minimum(partners[1], strips.end[strip]))
    slots = visited_slots(
        rows[0] - origin,
        rows[1] - origin,
        Entries(*(x[entry] for x in entries)),
        (span[0] - origin, span[1] - origin),
        block[1],
    )
    visited = np.zeros(len(group), dtype=np.int64)
    np.add.at(visited, tile, slots)
    return Tiles(group, first, visited)


def visited_slots(first: Ints, last: Ints, entries: Entries, span: tuple[Ints, Ints], block: int) -> Ints:
    """Partner slots, whole blocks in each segment, that rows from place ``first`` to ``last`` walk for one entry each.

    ``span`` are the places of the partners that exist; only what some row can see is walked.
    """
    w, r, c = entries.segment, entries.rate, entries.offset
    low = np.maximum(span[0], first - entries.behind)
    high = np.minimum(span[1], last + entries.ahead + 1)
    s_low, s_high = np.maximum(low, first) // w, np.minimum(high - 1, last) // w

    def inside(segment: Ints) -> Ints:
        a = np.maximum(low - segment * w - c, 0)
        b = np.minimum(high - segment * w, w) - c
        places = np.maximum(-(-b // r) - -(-a // r), 0)
        rounded: Ints = -(-places // block) * block
        return rounded

    whole = -(-np.maximum(-(-(w - c) // r), 0) // block) * block
    slots = inside(s_low) + np.where(s_high > s_low, inside(s_high), 0) + np.maximum(s_high - s_low - 1, 0) * whole
    start = first // w * w + c  # rows in one segment may all be off the grid
    off_grid = (last // w == first // w) & (-(-np.maximum(first - start, 0) // r) * r > last - start)
    return np.where((low < high) & (s_low <= s_high) & ~off_grid, slots, 0)
