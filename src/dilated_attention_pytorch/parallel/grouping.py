"""Ranks taken together: the rows that they hold, and the two worlds of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.layouts import joined
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.problem import Positions, Run


class GroupRows(NamedTuple):
    """The rows that several ranks hold together: where they stand, and which of them are each rank's, in its order."""

    positions: Positions
    slices: tuple[tuple[slice, ...], ...]

    @property
    def counts(self) -> list[int]:
        """How many rows each rank holds."""
        return [sum(map(slice_length, own)) for own in self.slices]


def group_rows(shards: Sequence[Positions]) -> GroupRows:
    """The rows of ranks whose shards are disjoint, by ascending position.

    Runs that interleave become one where together they leave no gap, as all stripes do; else each stays whole, and they
    follow each other by their first position: there are never more runs than the ranks have.

    Example:
        >>> rows = group_rows([(Run(0, 2, 3),), (Run(1, 2, 2), Run(5, 1, 4))])
        >>> rows.positions, rows.slices[1]
        ((Run(start=0, step=1, length=9),), (slice(1, 4, 2), slice(5, 9, 1)))
    """
    numbered = [(run, rank) for rank, runs in enumerate(shards) for run in runs if run.length > 0]
    numbered.sort(key=lambda one: one[0].start)
    runs: list[Run] = []
    slices: list[list[tuple[int, slice]]] = [[] for _ in shards]
    first = 0  # of the rows of the knot
    for knot in _knots(numbered):
        whole = _progression([run for run, _ in knot])
        runs.extend([run for run, _ in knot] if whole is None else [whole])
        at = first
        for run, rank in knot:
            if whole is None:
                place, step = at, 1
            else:
                place, step = first + (run.start - whole.start) // whole.step, max(1, run.step // whole.step)
            slices[rank].append((run.start, slice(place, place + (run.length - 1) * step + 1, step)))
            at += run.length
        first = at
    for rank, shard in enumerate(shards):  # a rank's own order may be another than that of positions
        order = {run.start: number for number, run in enumerate(shard)}
        slices[rank].sort(key=lambda one: order[one[0]])
    return GroupRows(joined(runs), tuple(tuple(cut for _, cut in own) for own in slices))


def slice_length(cut: slice) -> int:
    """How many rows a slice with all its numbers takes.

    Example:
        >>> slice_length(slice(1, 8, 3))
        3
    """
    return len(range(cut.start, cut.stop, cut.step))


def _last(run: Run) -> int:
    return run.start + run.step * (run.length - 1)


def _knots(numbered: list[tuple[Run, int]]) -> list[list[tuple[Run, int]]]:
    """Runs, ascending by start, in groups that do not overlap each other."""
    knots: list[list[tuple[Run, int]]] = []
    end = -1
    for one in numbered:
        if one[0].start > end:
            knots.append([])
        knots[-1].append(one)
        end = max(end, _last(one[0]))
    return knots


def _progression(runs: list[Run]) -> Run | None:
    """The one run that disjoint runs are together, or None."""
    low, high, count = min(run.start for run in runs), max(map(_last, runs)), sum(run.length for run in runs)
    if count == 1:
        return Run(low, 1, 1)
    step, rest = divmod(high - low, count - 1)
    fits = rest == 0 and all(
        (run.start - low) % step == 0 and (run.step % step == 0 or run.length == 1) for run in runs
    )
    return Run(low, step, count) if fits else None


def two_worlds(
    world: World,
    inner: int,
    inner_group: dist.ProcessGroup | None = None,
    outer_group: dist.ProcessGroup | None = None,
) -> tuple[World, World]:
    """(outer, inner) worlds of a mesh of ``inner`` columns whose ranks are numbered row by row.

    Inside a row of the mesh heads are exchanged for tokens; the outer world joins the ranks of a column, each with all
    rows of its row of the mesh. Raises InvalidInput for columns that do not divide the ranks.

    Example:
        >>> from dilated_attention_pytorch.parallel.layouts import Layout
        >>> rows = tuple(Layout("zigzag", 16, 4).positions(r) for r in range(4))
        >>> outer, inner = two_worlds(World(2, rows, rows), 2)
        >>> outer.rank, outer.queries[0], inner.rank, inner.size
        (1, (Run(start=0, step=1, length=4), Run(start=12, step=1, length=4)), 0, 2)
    """
    if inner < 1 or world.size % inner != 0:
        raise InvalidInput(f"two_worlds: {world.size} ranks are no mesh of {inner} columns; take a divisor.")
    row, column = divmod(world.rank, inner)
    starts = range(0, world.size, inner)
    queries, keys = (
        tuple(group_rows(side[a : a + inner]).positions for a in starts) for side in (world.queries, world.keys)
    )
    mine = slice(row * inner, (row + 1) * inner)
    return (
        World(row, queries, keys, outer_group),
        World(column, world.queries[mine], world.keys[mine], inner_group),
    )
