"""Patterns from tables: how often each block of queries sees each block of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import Block, Index, Pattern
from dilated_attention_pytorch.problem import Problem, positions_end

_MOST_CELLS = 64  # that a tile is told by


@dataclass(frozen=True, eq=False)
class BlockSparse(Pattern):
    """Blocks of queries see blocks of keys as often as a table says.

    ``block_size`` (tokens) is that of both sides, or (queries, keys). ``layout`` is a table of bool or counts, (Q, K)
    for all heads, (H, Q, K), or (B, H, Q, K): query position i stands in row ``i // block_size`` and key position j in
    column ``j // block_size``. An empty row is legal: its queries see nothing.

    Raises InvalidInput for a table of another shape or dtype; `attend` raises it for one too small for the positions.

    Example:
        >>> print(BlockSparse(2, torch.tensor([[True, False], [True, True]])).draw(4))
        11··
        11··
        1111
        1111
    """

    block_size: tuple[int, int]
    layout: Tensor

    def __init__(self, block_size: int | tuple[int, int], layout: Tensor) -> None:
        sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise InvalidInput(f"BlockSparse: expected a block_size of at least 1 token, or two. Got {block_size!r}.")
        if not isinstance(layout, Tensor):
            raise InvalidInput(f"BlockSparse: expected layout to be a tensor. Got {type(layout).__name__}.")
        if layout.is_floating_point() or layout.is_complex() or layout.dim() not in (2, 3, 4) or 0 in layout.shape:
            raise InvalidInput(
                "BlockSparse: expected a layout of bool or integer counts, of shape (Q, K), (H, Q, K) or (B, H, Q, K), "
                f"at least one block. Got {layout.dtype} of shape {tuple(layout.shape)}."
            )
        object.__setattr__(self, "block_size", tuple(sizes))
        object.__setattr__(self, "layout", layout.to(torch.uint8) if layout.dtype == torch.bool else layout)

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        row, column = (torch.as_tensor(x) // size for x, size in zip((q, k), self.block_size))
        return self._cells(self.layout.to(row.device), torch.as_tensor(head), row, column)

    def _cells(self, table: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The counts of cells, 0 beyond the table's edges, int64; a batch of tables adds a leading dim."""
        rows, columns = table.shape[-2:]
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        row, column = row.clamp(0, rows - 1), column.clamp(0, columns - 1)
        if table.dim() == 2:
            return table[row, column] * inside.long()
        head = head.to(row.device).clamp(max=table.shape[-3] - 1)
        if table.dim() == 3:
            return table[head, row, column] * inside.long()
        sample = torch.arange(table.shape[0], device=row.device).view(-1, 1, 1, 1)
        return table[sample, head, row, column] * inside.long()

    @property
    def density(self) -> float:
        """Share of the table's blocks whose count is not 0.

        Example:
            >>> BlockSparse(2, torch.tensor([[True, False], [True, True]])).density
            0.75
        """
        return int(self.layout.count_nonzero()) / self.layout.numel()

    @property
    def varies_by_head(self) -> bool:
        return self.layout.dim() > 2 and self.layout.shape[-3] > 1

    @property
    def varies_by_sample(self) -> bool:
        return self.layout.dim() > 3 and self.layout.shape[0] > 1

    def of_sample(self, sample: int) -> BlockSparse:
        table = self.layout
        return self if table.dim() < 4 else BlockSparse(self.block_size, table[sample if table.shape[0] > 1 else 0])

    def seen(self, q: Block, k: Block) -> Tensor:
        """Which of all blocks ``q`` of queries see some pair of which blocks ``k`` of keys: (H or 1, Q, K), bool.

        For a table without a batch dim; far cheaper for all blocks at once than `count_bounds` for each.

        Example:
            >>> whole = Block(torch.tensor([0]), torch.tensor([3]), torch.tensor([1]))
            >>> halves = Block(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([1, 1]))
            >>> BlockSparse(1, torch.tensor([[1, 0, 0, 0]] * 4)).seen(whole, halves)
            tensor([[[ True, False]]])
        """
        found = self.layout.to(q.low.device) > 0
        for dim, side, size in ((-2, q, self.block_size[0]), (-1, k, self.block_size[1])):
            first, last = side.low // size, side.high // size
            cells, end = found, found.shape[dim] - 1
            found = cells.index_select(dim, first.clamp(max=end))
            for further in range(1, int((last - first).max()) + 1):
                found |= cells.index_select(dim, torch.minimum(first + further, last).clamp(max=end))
            found &= (first <= end).view((-1, 1) if dim == -2 else (-1,))
        return found.view(-1, *found.shape[-2:])

    def signs(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Tensor, ...] | None:
        sides = [(side.low // size, side.high // size) for side, size in zip((q, k), self.block_size)]
        rows, columns = (1 + int((last - first).max()) for first, last in sides)
        if rows * columns > _MOST_CELLS:
            return None
        table, ((top, _), (left, _)) = self.layout.to(q.low.device), sides
        cells = [self._cells(table, head, top + i, left + j) for i in range(rows) for j in range(columns)]
        return q.low % self.block_size[0], k.low % self.block_size[1], *cells

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        (top, bottom), (left, right) = (
            (side.low // size, side.high // size) for side, size in zip((q, k), self.block_size)
        )
        if bool(((top == bottom) & (left == right)).all()):
            count = self._cells(self.layout.to(top.device), head, top, left)
            return count, count
        area = (bottom - top + 1) * (right - left + 1)
        seen = most = self._area_sum(self._sums[0], head, top, bottom, left, right)
        greatest = self._greatest
        if greatest > 1:
            most = self._area_sum(self._sums[1], head, top, bottom, left, right)
        return torch.where(most == area, greatest, (seen == area).long()), (seen > 0) * greatest

    def _area_sum(self, sums: Tensor, head: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        sums = sums.to(top.device)
        rows, columns = (n - 1 for n in sums.shape[-2:])
        top, bottom = top.clamp(max=rows), (bottom + 1).clamp(max=rows)
        left, right = left.clamp(max=columns), (right + 1).clamp(max=columns)
        corners = ((bottom, right), (top, right), (bottom, left), (top, left))
        a, b, c, d = (self._cells(sums, head, row, column) for row, column in corners)
        return a - b - c + d

    @cached_property
    def _greatest(self) -> int:
        return int(self.layout.max())

    @cached_property
    def _sums(self) -> tuple[Tensor, ...]:
        """Cells above 0, and if any is above 1 those of the greatest count, summed over the rows and columns before."""
        kinds = [self.layout > 0] if self._greatest <= 1 else [self.layout > 0, self.layout == self._greatest]
        return tuple(
            pad(cells.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32), (1, 0, 1, 0)) for cells in kinds
        )

    def check(self, problem: Problem) -> None:
        """Raise InvalidInput unless the table has a row and a column for every position, and fits heads and batch."""
        shape, sizes = self.layout.shape, self.block_size
        sides = ((problem.query_positions, "rows"), (problem.key_positions, "columns"))
        for (positions, name), held, size in zip(sides, shape[-2:], sizes):
            end = positions_end(positions)
            wanted = -(-end // size)
            if held < wanted:
                raise InvalidInput(
                    f"BlockSparse: positions up to {end - 1} in blocks of {size} need {wanted} {name}, "
                    f"the layout has {held}; its shape is {tuple(shape)}. Build it for the whole length."
                )
        if len(shape) > 2 and shape[-3] not in (1, problem.num_heads):
            raise InvalidInput(f"BlockSparse: the layout is for {shape[-3]} heads, q has {problem.num_heads}.")
        if len(shape) > 3 and shape[0] not in (1, problem.batch):
            raise InvalidInput(f"BlockSparse: the layout is for {shape[0]} samples, q has {problem.batch}.")
        if self.layout.dtype != torch.uint8 and self.layout.device.type != "meta" and bool((self.layout < 0).any()):
            raise InvalidInput(f"BlockSparse: expected counts >= 0. Got {int(self.layout.min())}.")
