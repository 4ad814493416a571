"""The Hilbert curve through boxes of any size, every step of it to an adjacent cell.

Hilbert's curve (Mathematische Annalen 38, 1891) cuts a square in four; here a box of any sides is cut into up to five
boxes that are walked one after another. A box of size (a, b, c) is walked from its corner (0, 0, 0) to (a - 1, 0, 0),
along its first side; a rectangle has c = 1. Colour the cells as on a chess board: such a walk by adjacent cells can
exist only where a is even or all sides are odd, and not where a is 1 and another side is not. Such boxes are called
walkable. Every cut below leaves walkable boxes whose walks follow on each other, so no step is ever diagonal.

One description of the cuts, `parts_of`, serves both directions: `walk` lists all cells, `places` finds given ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Size = tuple[int, int, int]
Cells: TypeAlias = Sequence[Tensor] | Tensor  # three coordinates, (N,) each

RING = ((0, 0), (1, 0), (1, 1), (0, 1))  # the walk around a cross-section of 2 x 2 cells
SMALL = 4096  # cells of a box that is not worth cutting


class Part(NamedTuple):
    """A box in an outer box: its side k lies on outer axis ``axes[k]``, from ``corner[k]`` up (sign 1) or down (-1).

    The corner is the cell of the outer box in which the part's walk begins.
    """

    size: Size
    axes: Size = (0, 1, 2)
    corner: Size = (0, 0, 0)
    signs: Size = (1, 1, 1)

    def outward(self, cells: Tensor) -> Tensor:
        """Cells (3, N) of the part as cells of the outer box."""
        outer = torch.empty_like(cells)
        for side, axis, start, sign in zip(cells, self.axes, self.corner, self.signs):
            torch.mul(side, sign, out=outer[axis]).add_(start)
        return outer

    def inward(self, cells: Cells) -> list[Tensor]:
        """Cells of the outer box, all of them in the part, as cells of the part; their memory is used again."""
        inner = []
        for axis, start, sign in zip(*self[1:]):
            inner.append(cells[axis].sub_(start) if sign > 0 else cells[axis].neg_().add_(start))
        return inner

    def holds(self, cells: Cells, outer: Size) -> Tensor:
        """Which cells (3, N) of the outer box lie in the part, (N,) bool; axes that are not cut cost nothing."""
        inside = torch.ones_like(cells[0], dtype=torch.bool)
        for length, axis, start, sign in zip(*self):
            low = start if sign > 0 else start - length + 1
            if low > 0:
                inside &= cells[axis] >= low
            if low + length < outer[axis]:
                inside &= cells[axis] < low + length
        return inside


def first_parts(size: Size) -> tuple[Part, ...]:
    """The walkable boxes that make up a box of any size; the curve begins in cell (0, 0, 0).

    It runs along the longest side if that is even or every side is odd, else along the longest even side. Where that is
    less than half the longest, the walk would go all the way there and back; it goes there only, in two boxes of even
    length, and crosses over between them in a slab one cell thick.

    Example:
        >>> [part.size for part in first_parts((3, 4, 1))]
        [(4, 3, 1)]
        >>> [part.size for part in first_parts((2, 7, 1))]
        [(4, 2, 1), (2, 1, 1), (2, 2, 1)]
    """
    by_length = sorted(range(3), key=lambda axis: (size[axis], axis), reverse=True)
    longest = by_length[0]
    main = next((axis for axis in by_length if size[axis] % 2 == 0), longest)
    second, third = (axis for axis in by_length if axis != main)
    a, b, c = size[main], size[second], size[third]
    if size[longest] <= 2 * a:
        return (Part((a, b, c), (main, second, third)),)
    ahead = _even_half(b)  # the second side is the longest
    axes = (second, main, third)
    return (
        Part((ahead, a, c), axes),
        Part((a, c, 1), (main, third, second), (0, 0, ahead)),
        Part((b - 1 - ahead, a, c), axes, (ahead + 1, a - 1, 0), (1, -1, 1)),
    )


def parts_of(size: Size) -> tuple[Part, ...]:
    """The walkable boxes, in the order of the walk, that a walkable box is cut into; none for a short thin one.

    Example:
        >>> [part.size for part in parts_of((4, 4, 1))]  # up, along, down
        [(2, 2, 1), (4, 2, 1), (2, 2, 1)]
        >>> len(parts_of((8, 8, 8)))
        5
    """
    a, b, c = size
    p, q = (1, 2) if b >= c else (2, 1)  # the longer axis across, and the shorter
    if size[p] <= 2:
        return _two(size) if prod(size) > SMALL else ()
    if 2 * a > 3 * size[p]:
        return _two(size)
    if a % 2 == 1 or size[q] == 1 or 3 * size[p] > 4 * size[q]:
        return _three(size, p, q)
    return _five(size, q, p) if size[p] % 2 == 0 and size[q] % 2 == 1 else _five(size, p, q)


def _two(size: Size) -> tuple[Part, ...]:
    """One half behind the other."""
    a, b, c = size
    ahead = _even_half(a)  # an odd side leaves an odd one of 3 or more
    return Part((ahead, b, c)), Part((a - ahead, b, c), corner=(ahead, 0, 0))


def _three(size: Size, p: int, q: int) -> tuple[Part, ...]:
    """Up along axis p, along the first axis in the upper half, and down."""
    a, b, c = size[0], size[p], size[q]
    left, low = a // 2, _even_half(b)
    return (
        Part((low, left, c), (p, 0, q)),
        Part((a, b - low, c), (0, p, q), (0, low, 0)),
        Part((low, a - left, c), (p, 0, q), (low - 1, a - 1, 0), (-1, -1, 1)),
    )


def _five(size: Size, p: int, q: int) -> tuple[Part, ...]:
    """Through the eight octants: up along p, along q, along the first axis, back along q, down along p.

    The first side is even, and so is side q or both others are odd.
    """
    a, b, c = size[0], size[p], size[q]
    left, low, near = a // 2, _even_half(b), c // 2
    if c % 2 == 1:
        left += (left + 1) % 2  # walks along an odd side need odd sides across: left, a - left and b - low
    return (
        Part((low, left, near), (p, 0, q)),
        Part((c, left, b - low), (q, 0, p), (0, 0, low)),
        Part((a, low, c - near), (0, p, q), (0, low - 1, c - 1), (1, -1, -1)),
        Part((c, a - left, b - low), (q, 0, p), (c - 1, a - 1, low), (-1, -1, 1)),
        Part((low, a - left, near), (p, 0, q), (low - 1, a - 1, 0), (-1, -1, 1)),
    )


def _even_half(length: int) -> int:
    """An even number near half of ``length``, at least 2 from 2 on."""
    return (length + 2) // 4 * 2


def walk(size: Size) -> Tensor:
    """All cells of a box of any size in the order of the curve, (3, cells) int64.

    Example:
        >>> walk((2, 2, 1))[:2].T.tolist()
        [[0, 0], [1, 0], [1, 1], [0, 1]]
    """
    walks: dict[Size, Tensor] = {}
    return torch.cat([part.outward(_walk(part.size, walks)) for part in first_parts(size)], 1)


def _walk(size: Size, walks: dict[Size, Tensor]) -> Tensor:
    """The walk of a walkable box, kept in ``walks``: boxes of one size share it."""
    if size not in walks:
        parts = parts_of(size)
        inner = [part.outward(_walk(part.size, walks)) for part in parts]
        walks[size] = torch.cat(inner, 1) if parts else _thin_walk(size)
    return walks[size]


def _thin_walk(size: Size) -> Tensor:
    """Along a box of at most 2 x 2 cells across: around each cross-section, every second time the other way round."""
    ring = torch.tensor([cell for cell in RING if cell[0] < size[1] and cell[1] < size[2]])  # (cells across, 2)
    turns = torch.stack((ring, ring.flip(0)))[torch.arange(size[0]) % 2]  # (a, cells across, 2)
    along = torch.arange(size[0]).repeat_interleave(len(ring))
    return torch.cat((along[None], turns.flatten(0, 1).T))


def places(size: Size, cells: Tensor) -> Tensor:
    """The place on the curve of given cells (3, N) of a box of any size, (N,) int64; the box itself is never built.

    Boxes of one size are cut together, the largest first, down to boxes for which a table of all their cells is made.

    Example:
        >>> places((2, 2, 1), torch.tensor([[0, 1], [1, 1], [0, 0]]))
        tensor([3, 2])
    """
    result = torch.empty_like(cells[0])
    walks: dict[Size, Tensor] = {}
    waiting: dict[Size, list[tuple[Tensor, ...]]] = defaultdict(list)  # cells of boxes, places so far, and whose

    def deal(outer: Size, parts: tuple[Part, ...], inner: Cells, place: Tensor, whose: Tensor) -> None:
        before = 0
        for part in parts:
            chosen = part.holds(inner, outer).nonzero().squeeze(1)
            if len(chosen):
                moved = part.inward([side[chosen] for side in inner])
                waiting[part.size].append((*moved, place[chosen].add_(before), whose[chosen]))
            before += prod(part.size)

    deal(size, first_parts(size), cells, torch.zeros_like(cells[0]), torch.arange(cells.shape[1]))
    while waiting:
        box = max(waiting, key=prod)
        *inner, place, whose = (torch.cat(columns) for columns in zip(*waiting.pop(box)))
        if prod(box) <= SMALL:
            result[whose] = place + _table(box, walks)[flat(box, inner)]
        else:
            deal(box, parts_of(box), inner, place, whose)
    return result


def _table(size: Size, walks: dict[Size, Tensor]) -> Tensor:
    """The place on the walk of every cell of a walkable box, by row-major number."""
    table = torch.empty(prod(size), dtype=torch.int64)
    table[flat(size, _walk(size, walks))] = torch.arange(prod(size))
    return table


def flat(size: Size, cells: Cells) -> Tensor:
    """Row-major numbers of cells (3, N)."""
    return (cells[0] * size[1] + cells[1]) * size[2] + cells[2]
