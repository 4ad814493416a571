"""Orders of rows that suit tiles: rows of one residue class together, and chosen blocks of queries apart.

In row order a tile of a branch with rate r holds a visible pair almost everywhere, and 1 / r^2 of its pairs. With the
rows of each residue modulo r next to each other a tile is seen whole or not at all. Where tables were chosen for blocks
of queries that do not fill tiles, rows are repeated until they do: so no tile holds rows of two choices. Positions are
runs, so a problem whose rows stand in another order is the same problem: any kernel that walks tiles can compute it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import BlockSparse, Dilated, Pattern
from dilated_attention_pytorch.patterns.base import And
from dilated_attention_pytorch.patterns.documents import Packed
from dilated_attention_pytorch.plans.base import Plan
from dilated_attention_pytorch.plans.ranges import TileRanges, tile_ranges
from dilated_attention_pytorch.plans.tiles import BLOCK_SIZE, TilePlan, tile_plan, visited_tiles
from dilated_attention_pytorch.problem import Positions, Problem, Run, positions_end, positions_tensor

SAMPLE_ROWS = 8192
"""Orders are compared on so many last rows of queries and keys."""
WORTH = 0.75
"""An order is taken when it leaves at most this share of the tiles: moving the rows costs time, too."""
MAX_RUNS = 1 << 14
"""An order of more runs is not considered."""
MAX_MODULUS = 4096


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Another order of the rows of queries and keys, as runs of row numbers; each row stands in it once.

    A run of step 0 among those of queries is *filling*: it repeats a row that stands before it, so that the next one
    begins a tile; what is computed for it is left out. ``query_rows`` and ``key_rows`` are the same as int64 tensors on
    the problem's device, ``query_places`` and ``key_places`` say where each row stands, ``filling`` which places fill;
    it is None when none does.

    Example:
        >>> order = RowOrder.of((Run(0, 2, 2), Run(1, 2, 1)), (Run(0, 1, 3),), "cpu")
        >>> order.restored_queries(torch.tensor([10, 12, 11]), dim=0)
        tensor([10, 11, 12])
        >>> order.moves_keys
        False
    """

    queries: Positions
    keys: Positions
    query_rows: Tensor
    key_rows: Tensor
    query_places: Tensor
    key_places: Tensor
    filling: Tensor | None

    @classmethod
    def of(cls, queries: Positions, keys: Positions, device: torch.device | str) -> RowOrder:
        """The order of these runs of rows."""
        query_rows, key_rows = positions_tensor(queries), positions_tensor(keys)
        lengths = torch.tensor([run.length for run in queries], dtype=torch.int64)
        fills = torch.tensor([run.step == 0 for run in queries], dtype=torch.bool).repeat_interleave(lengths)
        held = (_places(query_rows, ~fills), _places(key_rows, torch.ones_like(key_rows, dtype=torch.bool)))
        filling = fills.nonzero().squeeze(1).to(device) if bool(fills.any()) else None
        rows, columns, places, key_places = (x.to(device) for x in (query_rows, key_rows, *held))
        return cls(queries, keys, rows, columns, places, key_places, filling)

    @property
    def moves_keys(self) -> bool:
        """Whether some key leaves its place."""
        return self.keys != (Run(0, 1, len(self.key_rows)),)

    def placed(self, problem: Problem) -> Problem:
        """The problem with the positions of its rows in this order; the tensors are left as they are, for planning."""
        return replace(
            problem,
            query_positions=_compose(problem.query_positions, self.queries),
            key_positions=_compose(problem.key_positions, self.keys) if self.moves_keys else problem.key_positions,
        )

    def applied(self, problem: Problem) -> Problem:
        """The same problem with its rows in this order: q and the bias are copied, k and v if keys move.

        Padded keys are 0 in the copies and no longer at the end; that they are not seen is left to the tables of tiles.
        """
        bias, placed = problem.bias, self.placed(problem)
        if bias is not None:
            bias = bias if bias.shape[-1] == 1 or not self.moves_keys else bias.index_select(-1, self.key_rows)
            bias = bias if bias.dim() < 2 or bias.shape[-2] == 1 else bias.index_select(-2, self.query_rows)
        q = problem.q.index_select(1, self.query_rows)
        if not self.moves_keys:
            return replace(placed, q=q, bias=bias)
        k, v = (x.index_select(1, self.key_rows) for x in (problem.k, problem.v))
        if problem.key_lengths is not None:
            at = positions_tensor(placed.key_positions, k.device)
            padding = at >= torch.tensor(problem.key_lengths, device=k.device).view(-1, 1)
            k, v = (x.masked_fill_(padding[..., None, None], 0.0) for x in (k, v))
        return replace(placed, q=q, k=k, v=v, bias=bias, key_lengths=None)

    def ordered_queries(self, x: Tensor, dim: int) -> Tensor:
        """A copy of ``x`` whose query rows, along ``dim``, stand in this order."""
        return x.index_select(dim, self.query_rows)

    def ordered_gradients(self, x: Tensor, dim: int) -> Tensor:
        """`ordered_queries` of a gradient of results: 0 at places that fill."""
        moved = self.ordered_queries(x, dim)
        return moved if self.filling is None else moved.index_fill_(dim, self.filling, 0)

    def restored_queries(self, x: Tensor, dim: int) -> Tensor:
        """A contiguous copy of ``x`` with its query rows, along ``dim``, back in row order."""
        return x.index_select(dim, self.query_places)

    def restored_keys(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with its key rows, along ``dim``, back in row order: a contiguous copy if keys move."""
        return x.index_select(dim, self.key_places) if self.moves_keys else x


def _places(rows: Tensor, held: Tensor) -> Tensor:
    """For each row the place where it is held."""
    places = held.nonzero().squeeze(1)
    return torch.empty_like(places).index_copy_(0, rows[places], places)


def _compose(positions: Positions, rows: Positions) -> Positions:
    """Positions of runs of rows."""
    starts = list(accumulate((run.length for run in positions), initial=0))
    found = []
    for run in rows:
        done = 0
        while done < run.length:
            row = run.start + run.step * done
            i = bisect_right(starts, row) - 1
            at, inside = positions[i], row - starts[i]
            here = run.length - done
            if run.step > 0:
                here = min(here, -(-(at.length - inside) // run.step))
            found.append(Run(at.start + inside * at.step, run.step * at.step, here))
            done += here
    return tuple(found)


@dataclass(frozen=True, eq=False)
class OrderedPlan(Plan):
    """The problem with its rows in another order, as tiles: ``tiles`` is the plan of ``order.applied(problem)``.

    They are `TileRanges` where all tables at once would be too large; `parts` gives the tables of either.
    """

    order: RowOrder
    tiles: TilePlan | TileRanges

    def parts(self) -> Iterator[TilePlan]:
        """The tables, each with all tiles of its own blocks of queries."""
        if isinstance(self.tiles, TileRanges):
            yield from self.tiles.parts()
        else:
            yield self.tiles

    @property
    def kind(self) -> str:
        """Where only places that fill were added, measurements of `TilePlan` hold."""
        return type(self).__name__ if self.order.moves_keys else TilePlan.__name__

    def expand(self, problem: Problem) -> Tensor:
        ordered = self.tiles.expand(self.order.applied(problem))
        return ordered.index_select(2, self.order.query_places).index_select(3, self.order.key_places)

    def issued_pairs(self, problem: Problem) -> int:
        return self.tiles.issued_pairs(problem)

    def counted_pairs(self, problem: Problem) -> int:
        """Query-key pairs over all samples and heads, each as often as it is seen."""
        return self.tiles.counted_pairs(problem, self.order.filling)

    def describe(self, problem: Problem) -> str:
        kinds = ((self.order.moves_keys, "rows by residue"), (self.order.filling is not None, "chosen blocks apart"))
        return ", ".join([self.tiles.describe(problem), *(name for holds, name in kinds if holds)])


def ordered_plan(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = BLOCK_SIZE) -> OrderedPlan | None:
    """The tile plan of the best order by residues, or None where `residue_order` finds none, or `tile_plan` fails.

    Of a pattern with tables that were chosen from data, the `chosen_plan`, or None where that is in row order.

    Example:
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> q = torch.zeros(1, 4096, 1, 8)
        >>> plan = ordered_plan(Dilated(4096, 8), make_problem(q, q, q, scale=1.0, query_start=0), (128, 128))
        >>> plan.tiles.num_tiles, plan.tiles.density
        (16, 0.015625)
    """
    if fixed_classes(pattern) is not None or chosen_rows(pattern) is not None:
        plan = chosen_plan(pattern, problem, block_size)
        return plan if isinstance(plan, OrderedPlan) else None
    order = residue_order(pattern, problem, block_size)
    tiles = None if order is None else tile_plan(pattern, order.placed(problem), block_size)
    return None if order is None or tiles is None else OrderedPlan(pattern, order, tiles)


def chosen_plan(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = BLOCK_SIZE) -> OrderedPlan | TilePlan:
    """The tile plan of a pattern with tables that were chosen from data: they do not say how a row is summed (law 5).

    Blocks of queries that tables were chosen for stand in tiles of their own; no row moves but by `key_classes`. Tables
    that would be too large are `TileRanges`, with the same sums.

    Example:
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> from dilated_attention_pytorch.selection import SelectedTiles
        >>> chosen = SelectedTiles(BlockSparse(24, torch.eye(3, dtype=torch.bool)), Dilated(96, 2))
        >>> q = torch.zeros(1, 72, 1, 8)
        >>> chosen_plan(chosen, make_problem(q, q, q, scale=1.0, query_start=0), (16, 16)).order.queries[:2]
        (Run(start=0, step=1, length=24), Run(start=23, step=0, length=8))
    """
    chosen, whole = chosen_rows(pattern), (Run(0, 1, problem.key_length),)
    order = residue_order(pattern, problem, block_size) if fixed_classes(pattern) is not None else None
    queries = None if chosen is None else rows_apart(problem.query_positions, chosen, block_size[0])
    if queries is not None:
        order = RowOrder.of(queries, whole if order is None else order.keys, problem.q.device)
    placed = problem if order is None else order.placed(problem)
    tiles = tile_plan(pattern, placed, block_size)
    if tiles is None:
        if order is None:
            order = RowOrder.of((Run(0, 1, problem.query_length),), whole, problem.q.device)
        return OrderedPlan(pattern, order, tile_ranges(pattern, placed, block_size))
    return tiles if order is None else OrderedPlan(pattern, order, tiles)


def block_rows(positions: Positions, block: int) -> npt.NDArray[np.int64]:
    """How many rows in turn stand in one block of ``block`` positions.

    Example:
        >>> block_rows((Run(6, 1, 10), Run(40, 2, 3)), 8)
        array([2, 8, 3])
    """
    number = positions_tensor(positions).numpy() // block
    borders = np.flatnonzero(number[1:] != number[:-1]) + 1
    return np.diff(borders, prepend=0, append=len(number))


def rows_apart(positions: Positions, block: int, rows: int) -> Positions | None:
    """Runs of rows, some of them filling, in which no tile of ``rows`` holds rows of two blocks of positions.

    None where none does in row order.

    Example:
        >>> rows_apart((Run(6, 1, 10),), 8, 4)
        (Run(start=0, step=1, length=2), Run(start=1, step=0, length=2), Run(start=2, step=1, length=8))
    """
    lengths = block_rows(positions, block)
    ends = np.cumsum(lengths)
    if not (ends[:-1] % rows).any():
        return None
    fills = -lengths % rows
    fills[-1] = 0
    runs, first = [], 0
    for i in [*np.flatnonzero(fills).tolist(), len(fills) - 1]:
        end = int(ends[i])
        if end > first:
            runs.append(Run(first, 1, end - first))
        if fills[i]:
            runs.append(Run(end - 1, 0, int(fills[i])))
        first = end
    return tuple(runs)


def residue_order(pattern: Pattern, problem: Problem, block_size: tuple[int, int] = BLOCK_SIZE) -> RowOrder | None:
    """The order by residue classes that leaves the fewest tiles, or None where no order leaves clearly fewer.

    Classes are modulo a dilation rate of the pattern, or the least common multiple of them all; where grids start anew
    (segments that the rate does not divide, packed documents) so do the classes. Rows must stand in one run each. Where
    a part of the pattern names its `key_classes`, keys stand in that order without comparing, and queries in their own.
    Of tables of blocks that cut a pattern only the shape is looked at: orders are compared for their diagonal.
    """
    modulus = fixed_classes(pattern)
    sides = (problem.query_positions, problem.key_positions) if modulus is None else (problem.key_positions,)
    if any(len(runs) != 1 or runs[0].step != 1 for runs in sides):
        return None
    if modulus is not None:
        return _order(pattern, problem, modulus, None, moves_queries=False)
    classes = list(_classes(pattern, problem.key_length))
    if not classes:
        return None
    sample, model = _last_rows(problem, SAMPLE_ROWS), _with_diagonals(pattern)
    fewest, best = WORTH * visited_tiles(model, sample, block_size), None
    for modulus, period in classes:
        order = _order(pattern, sample, modulus, period)
        if order is not None:
            tiles = visited_tiles(model, order.placed(sample), block_size)
            if tiles < fewest:
                fewest, best = tiles, (modulus, period)
    return None if best is None else _order(pattern, problem, *best)


def fixed_classes(pattern: Pattern) -> int | None:
    """The modulus of the order of keys that parts of the pattern ask for, or None.

    Their tables may come from later tokens, which must not decide in which order a row sums its keys.
    """
    found = [part.key_classes for part in pattern.parts() if part.key_classes is not None]
    return math.lcm(*found) if found else None


def chosen_rows(pattern: Pattern) -> int | None:
    """Positions of the blocks of queries that parts of the pattern were chosen for, the same for all, or None.

    Example:
        >>> chosen_rows(Dilated(4096, 8)) is None
        True
    """
    found = [part.chosen_rows for part in pattern.parts() if part.chosen_rows is not None]
    return math.gcd(*found) if found else None


def _with_diagonals(pattern: Pattern, cut: bool = False) -> Pattern:
    """The pattern with the diagonal in place of every table of blocks that is a side of a product.

    Such a table may have been chosen from the data: later tokens must not decide in which order a row sums its keys.
    """
    if cut and isinstance(pattern, BlockSparse):
        (rows, columns), table = pattern.block_size, pattern.layout
        q, k = (torch.arange(n) for n in table.shape[-2:])
        q = q.view(-1, 1)
        return BlockSparse(pattern.block_size, (q * rows < (k + 1) * columns) & (k * columns < (q + 1) * rows))
    cut = cut or isinstance(pattern, And)
    inner = {f.name: getattr(pattern, f.name) for f in fields(pattern)}  # type: ignore[arg-type]
    changed = {name: _with_diagonals(x, cut) for name, x in inner.items() if isinstance(x, Pattern)}
    return replace(pattern, **changed) if changed else pattern  # type: ignore[type-var]


def _last_rows(problem: Problem, rows: int) -> Problem:
    def last(positions: Positions) -> Positions:
        (run,) = positions
        left = max(0, run.length - rows)
        return (Run(run.start + left, 1, run.length - left),)

    q, k, v = (x[:, max(0, x.shape[1] - rows) :] for x in (problem.q, problem.k, problem.v))
    queries, keys = last(problem.query_positions), last(problem.key_positions)
    return replace(problem, q=q, k=k, v=v, bias=None, query_positions=queries, key_positions=keys)


def _classes(pattern: Pattern, length: int) -> Iterator[tuple[int, int | None]]:
    """(modulus, period after which classes start anew or None) worth comparing, small moduli first."""
    grids = {(p.segment_length, p.dilation_rate) for p in pattern.parts() if isinstance(p, Dilated)}
    rates = sorted({r for _, r in grids if r > 1})
    for modulus in sorted({*rates, math.lcm(*rates)} - {1}):
        if modulus <= MAX_MODULUS:
            yield modulus, None
    for w, r in sorted(grids):
        if 1 < r <= min(w, MAX_MODULUS) and w % r != 0 and w < length:
            yield r, w


def _order(
    pattern: Pattern, problem: Problem, modulus: int, period: int | None, moves_queries: bool = True
) -> RowOrder | None:
    """The order by classes of this modulus, or None when it has too many runs or samples are packed differently."""
    starts = {0}
    for part in pattern.parts():
        if isinstance(part, Packed):
            if part.documents.varies_by_sample:
                return None
            starts.update(part.documents.bounds(torch.device("cpu")).flatten().tolist())
    (k,) = problem.key_positions
    end = max(positions_end(problem.query_positions), k.start + k.length)
    if period is not None:
        if end // period * modulus > MAX_RUNS:
            return None
        starts.update(range(0, end, period))
    if len(starts) * modulus > MAX_RUNS:
        return None
    keys = _runs(k, modulus, sorted(starts))
    queries: Positions = (Run(0, 1, problem.query_length),)
    if moves_queries:
        (q,) = problem.query_positions
        queries = _runs(q, modulus, sorted(starts))
    return RowOrder.of(queries, keys, problem.q.device)


def _runs(at: Run, modulus: int, starts: Sequence[int]) -> Positions:
    """Rows that stand at positions ``at``, class by class between the places where classes start anew."""
    end, runs = at.start + at.length, []
    first = bisect_right(starts, at.start) - 1
    for origin, following in pairwise([*starts[first:], max(end, starts[-1])]):
        low, high = max(origin, at.start), min(following, end)
        for residue in range(modulus):
            place = low + (residue - (low - origin)) % modulus
            if place < high:
                runs.append(Run(place - at.start, modulus, -(-(high - place) // modulus)))
    return tuple(runs)
