"""Kernel launches of a strided pattern: lists of tiles for the queries (forward, dq) and for the keys (dk, dv).

A launch is a list of tiles; a tile is ``block[0]`` rows of one group of one head; a group is the rows of a head that
share one set of branches. Everything here is integer arithmetic on positions; no device is touched.

Every table holds absolute positions: row i of q stands at ``query_positions[0].start + i``.

    tile (T, 4): head, group, first row inside the group, sample. Heaviest first; inside a weight, samples then heads
        slowest. The head is a query head in query launches, a key-value head in key launches. A program of a tile works
        for sample ``sample + program_id(1)``, and axis 1 of the grid is `samples`.
    group (G, 8): base, first residue, number of residues, rows, period, first of its branch list, number of branches,
        1 if mixed. Row i of a group, ascending, stands at
        ``base + i // residues * period + residue[first residue + i % residues]``. Rows of a group that is not mixed
        stand in one document and on all the branches of its list and no others; without branches they see nothing, as
        do rows past the last document. A mixed group is a run of consecutive rows of any documents and branches.
    branch_list: branches that rows of a group are on, as columns of `offset`. In key launches an entry is ``query head
        inside the kv group * n + column``: a tile of keys serves every query head of its kv head.
    branch (n, 4), of the n branches of this launch: w, r, and how many tokens a query sees behind it and ahead of it.
        What has no bound stands as the whole length, which exceeds every distance.
    offset (H, n): the place of a query head's grid in each of these branches, -1 where it does not run the branch.

Positions must fit int32 with room for sums; the backend refuses longer problems.

A kernel may read branches from positions alone and use groups only to find rows: the lists say what the planner meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dilated_attention_pytorch.backends.triton.groups import (
    Entries,
    Groups,
    Ints,
    make_groups,
    make_tiles,
    split_documents,
    visited_slots,
)
from dilated_attention_pytorch.patterns import Branch, Documents
from dilated_attention_pytorch.problem import Problem

Table = npt.NDArray[np.int32]

GROUP_COLUMNS = 8
TILE_OVERHEAD = 256
"""What starting and storing a tile costs, in partner slots (an estimate)."""
GRID_LIMIT = 65535
"""CUDA's limit for axes 1 and 2 of a grid."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch; the module's text says what the tables hold.

    ``carry``: start from the (out, lse) already there. The first launch has it False and writes every row, (0, -inf)
    where no branch of it comes. ``kind`` "list" walks the tiles; "one" is a single branch without documents, on a grid
    of (tiles, segments, heads * samples): ``grid`` is (tiles of a segment, first segment, segments), tiles of
    ``block[0]`` grid places from the segment's start. Its tile, group, residue and branch_list tables are empty.
    ``visited`` is the partner slots that each tile walks, in the order of `tile` (of all programs for "one").
    """

    kind: str
    branches: tuple[int, ...]
    carry: bool
    block: tuple[int, int]
    samples: int
    tile: Table
    group: Table
    residue: Table
    branch_list: Table
    branch: Table
    offset: Table
    grid: tuple[int, int, int]
    visited: Ints

    @property
    def issued(self) -> int:
        """Query-key pairs that the tiles compute, over all samples and heads, padding of tiles included."""
        return int(self.visited.sum()) * self.block[0] * self.samples


@dataclass(frozen=True, eq=False)
class Layout:
    """What planning reads of a problem: branches, heads, and where rows and keys stand.

    ``bounds`` (samples, documents + 1) are document bounds as positions, one row when samples share them, None without
    documents. ``queries`` and ``keys`` are half-open ranges of positions. ``heads`` are those planned, None for all:
    estimates look at a few.
    """

    branches: tuple[Branch, ...]
    num_heads: int
    kv_group: int
    batch: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    bounds: Ints | None = None
    heads: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """One past the last position of either side."""
        return max(self.queries[1], self.keys[1], 1)


def layout_of(problem: Problem, branches: tuple[Branch, ...]) -> Layout:
    """The layout of a problem whose rows stand at consecutive positions, as every StridedPlan's do."""
    queries, keys = problem.query_positions[0], problem.key_positions[0]
    documents = branches[0].documents if branches else None
    bounds = None
    if documents is not None:
        assert isinstance(documents, Documents)
        bounds = np.atleast_2d(documents.bounds(documents.lengths.device).cpu().numpy())
        bounds = np.unique(bounds, axis=0) if (bounds == bounds[0]).all() else bounds
    return Layout(
        branches,
        problem.num_heads,
        problem.kv_group,
        problem.batch,
        (queries.start, queries.start + queries.length),
        (keys.start, keys.start + keys.length),
        bounds,
    )


def query_launches(
    layout: Layout,
    block: tuple[int, int],
    split: Sequence[Sequence[int]] | None = None,
    *,
    carry: bool = False,
    only_lists: bool = False,
) -> tuple[Launch, ...]:
    """Launches that together give every query row all its branches: forward and dq.

    ``block`` is (query rows, keys) of a step. ``split`` names the branches of each launch; None is all in one.
    A launch of one branch is of kind "one" where that covers what it must, unless ``only_lists``; see `Launch`. With
    ``carry`` the first goes on from what is there, too.
    """
    launches = []
    for part in [range(len(layout.branches))] if split is None else split:
        one = None if only_lists or len(part) != 1 else _one_launch(layout, part[0], block, carry)
        launches.append(one or _list_launch(layout, tuple(part), block, carry, by_keys=False))
        carry = True
    return tuple(launches)


def key_launches(
    layout: Layout,
    block: tuple[int, int],
    split: Sequence[Sequence[int]] | None = None,
    *,
    carry: bool = False,
) -> tuple[Launch, ...]:
    """Launches that together give every key row all its queries: dk and dv. All are tile lists.

    ``block`` is (keys, query rows) of a step; otherwise as `query_launches`.
    """
    launches = []
    for part in [range(len(layout.branches))] if split is None else split:
        launches.append(_list_launch(layout, tuple(part), block, carry, by_keys=True))
        carry = True
    return tuple(launches)


def branch_tables(layout: Layout, part: Sequence[int]) -> tuple[Table, Table]:
    """The tables ``branch`` (n, 4) and ``offset`` (H, n) of the branches that ``part`` names."""
    end, rows, offsets = layout.end, [], np.full((layout.num_heads, len(part)), -1, dtype=np.int32)
    for column, number in enumerate(part):
        b = layout.branches[number]
        segment = end if b.segment_length is None else min(b.segment_length, end)
        behind = end if b.window is None else min(b.window - 1, end)
        heads = layout.num_heads if b.of_heads is None else b.of_heads[1]
        rate = min(b.dilation_rate, max(segment, heads))  # further on, a segment has one place anyway
        rows.append((segment, rate, behind, 0 if b.is_causal else behind))
        first, last = b.head_range(layout.num_heads)
        offsets[first:last, column] = [int(b.offset(h, layout.num_heads)) for h in range(first, last)]
    return np.array(rows, dtype=np.int32).reshape(-1, 4), offsets


def head_entries(layout: Layout, part: Sequence[int], by_keys: bool) -> list[tuple[list[int], Entries]]:
    """Heads of the tiles grouped by their entries: heads whose grids coincide share tables."""
    branch, offset = branch_tables(layout, part)
    size = layout.kv_group if by_keys else 1
    classes: dict[bytes, tuple[list[int], Entries]] = {}
    for head in range(layout.num_heads // size) if layout.heads is None else layout.heads:
        places = offset[head * size : (head + 1) * size].astype(np.int64)
        local, column = np.nonzero(places >= 0)
        w, r, behind, ahead = branch[column].T.astype(np.int64)
        seen = (ahead, behind) if by_keys else (behind, ahead)
        entries = Entries(local * len(branch) + column, w, r, places[local, column], *seen)
        classes.setdefault(places.tobytes(), ([], entries))[0].append(head)
    return list(classes.values())


def _list_launch(layout: Layout, part: tuple[int, ...], block: tuple[int, int], carry: bool, by_keys: bool) -> Launch:
    rows, partners = (layout.keys, layout.queries) if by_keys else (layout.queries, layout.keys)
    samples: list[Ints | None] = [None] if layout.bounds is None else list(layout.bounds)
    tables: list[list[Ints]] = [[np.zeros((0, n), dtype=np.int64)] for n in (4, GROUP_COLUMNS)]
    residues, lists, weights = ([np.zeros(0, dtype=np.int64)] for _ in range(3))
    at = residue_at = list_at = 0
    for sample, bounds in enumerate(samples):
        strips = split_documents(bounds, *rows, layout.end)
        for heads, entries in head_entries(layout, part, by_keys):
            groups = make_groups(entries, strips, block[0])
            groups = groups.occupied() if carry else groups
            tiles = make_tiles(groups, entries, strips, partners, block)
            same = np.zeros_like(tiles.group)
            tables[0] += [np.stack([same + h, tiles.group + at, tiles.first, same + sample], 1) for h in heads]
            tables[1].append(_group_table(groups, residue_at, list_at))
            weights += [tiles.visited] * len(heads)
            residues.append(groups.residue)
            lists.append(entries.number[groups.entry_list])
            at, residue_at, list_at = at + len(groups.base), residue_at + len(residues[-1]), list_at + len(lists[-1])
    tile, visited = np.concatenate(tables[0]), np.concatenate(weights)
    order = tile_order(tile, visited)
    return Launch(
        "list",
        part,
        carry,
        block,
        layout.batch if len(samples) == 1 else 1,
        tile[order].astype(np.int32),
        np.concatenate(tables[1]).astype(np.int32),
        _never_empty(np.concatenate(residues)),
        _never_empty(np.concatenate(lists)),
        *branch_tables(layout, part),
        (0, 0, 0),
        visited[order],
    )


def tile_order(tile: Ints, visited: Ints) -> Ints:
    """The order of tiles: heaviest first in half octaves; in each, samples, heads and groups slowest.

    Coarse weights cost no balance and keep one head's keys and values in the cache.
    """
    weight = np.floor(2 * np.log2(visited + TILE_OVERHEAD))
    head, group, first, sample = tile.T
    return np.lexsort((first, group, head, sample, -weight))


def _never_empty(x: Ints) -> Table:
    """A table with an address, since kernels take one even when they read nothing of it."""
    return (x if len(x) else np.zeros(1, dtype=np.int64)).astype(np.int32)


def _group_table(groups: Groups, residue_at: int, list_at: int) -> Ints:
    g = groups
    period = np.full_like(g.base, g.period)
    rows = (g.base, g.residue_first + residue_at, g.residues, g.rows, period)
    return np.stack([*rows, g.entry_first + list_at, g.entries, g.mixed], 1)


def _one_launch(layout: Layout, number: int, block: tuple[int, int], carry: bool) -> Launch | None:
    """The launch of one branch on a plain grid, or None where that cannot hold it or would leave rows unwritten."""
    branch, offset = branch_tables(layout, (number,))
    w, r, behind, ahead = branch[0].tolist()
    low, high = layout.queries
    everywhere = r == 1 and bool((offset >= 0).all())
    if layout.bounds is not None or not (carry or everywhere) or low >= high:
        return None
    first, segments = low // w, (high - 1) // w - low // w + 1
    if max(segments, layout.num_heads * layout.batch) > GRID_LIMIT:
        return None
    tiles = -(-min(-(-w // r), high) // block[0])
    if tiles * segments > 2 * (-(-(high - low) // (r * block[0])) + segments):
        return None  # most tiles would hold no query: a few rows of a long segment
    start = np.repeat((first + np.arange(segments)) * w, tiles)
    row = np.tile(np.arange(tiles) * block[0] * r, segments)
    visited = [np.zeros(0, dtype=np.int64)]
    places = offset[:, 0] if layout.heads is None else offset[list(layout.heads), 0]
    for c in places[places >= 0].tolist():
        a, b = start + c + row, np.minimum(start + w, high) - 1
        entries = Entries(*(np.full_like(a, x) for x in (0, w, r, c, behind, ahead)))
        reach = (np.maximum(a, low), np.minimum(a + (block[0] - 1) * r, b))
        span = (np.full_like(a, layout.keys[0]), np.full_like(a, layout.keys[1]))
        visited.append(visited_slots(*reach, entries, span, block[1]))
    return Launch(
        "one",
        (number,),
        carry,
        block,
        layout.batch,
        np.zeros((0, 4), np.int32),
        np.zeros((0, GROUP_COLUMNS), np.int32),
        _never_empty(visited[0]),
        _never_empty(visited[0]),
        branch,
        offset,
        (tiles, first, segments),
        np.concatenate(visited),
    )
