"""Orders of the cells of a grid, of points on a grid, and of a sequence that is folded on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.orderings.hilbert import Size, flat, places, walk
from dilated_attention_pytorch.orderings.order import Order

LONGEST_SIDE = {2: 1 << 31, 3: 1 << 21}
"""The cells of a grid with sides up to these are numbered in 64 bits."""


def hilbert_order(shape: Sequence[int] | None = None, *, points: Tensor | None = None) -> Order:
    """The order of a grid's cells along a Hilbert curve, in which neighbours on the curve are neighbours on the grid.

    ``shape`` is that of a grid of two or three sides, each of any size from 1; a cell's number is its row-major index.
    ``points`` (N, 2) or (N, 3) are integer coordinates of the only cells that exist: then a number is a row of points,
    and they stand in the order in which the curve of the grid meets them. Without a shape the grid is the smallest box
    that holds the points.

    Every step of the curve goes to an adjacent cell, never diagonally, whatever the sides (`orderings.hilbert`);
    between points it is as long as the gap. On a square whose side is a power of two it is Hilbert's curve.

    Raises InvalidInput for neither shape nor points, sides below 1 or above 2^31 (2^21 in three dimensions), and points
    that are not integers, negative, repeated or outside the shape.

    Example:
        >>> hilbert_order((2, 3)).permutation
        tensor([0, 1, 2, 5, 4, 3])
        >>> hilbert_order(points=torch.tensor([[9, 5], [7, 7], [7, 5]])).permutation
        tensor([2, 0, 1])
    """
    if points is None and shape is not None:
        size = _checked_shape(shape)
        return Order(flat(size, walk(size)))
    return _order(places, shape, points)


def morton_order(shape: Sequence[int] | None = None, *, points: Tensor | None = None) -> Order:
    """The order of a grid's cells, or of points, by Morton's code: the bits of the coordinates, interleaved.

    In any 2^k x 2^k cells that start at multiples of 2^k it goes through one quarter after another, but leaps between
    them. Parameters and errors are those of `hilbert_order`; coordinates count from the first cell of the grid. (G. M.
    Morton, A computer oriented geodetic data base, IBM, 1966.)

    Example:
        >>> morton_order((2, 4)).permutation
        tensor([0, 1, 4, 5, 2, 3, 6, 7])
    """
    return _order(_morton_places, shape, points)


def raster_order(shape: Sequence[int] | None = None, *, points: Tensor | None = None) -> Order:
    """The order of a grid's cells row by row, which is the order they come in; points are sorted row by row.

    Parameters and errors are those of `hilbert_order`.

    Example:
        >>> raster_order(points=torch.tensor([[1, 0], [0, 5], [0, 2]])).permutation
        tensor([2, 1, 0])
    """
    return _order(flat, shape, points)


def snake_order(shape: Sequence[int] | None = None, *, points: Tensor | None = None) -> Order:
    """The order of a grid's cells row by row, every second row backwards, so that each step goes to an adjacent cell.

    In three dimensions every second plane is gone through backwards too. Parameters and errors are those of
    `hilbert_order`.

    Example:
        >>> snake_order((2, 3)).permutation
        tensor([0, 1, 2, 5, 4, 3])
    """
    return _order(_snake_places, shape, points)


ORDERS: dict[str, Callable[..., Order]] = {
    "hilbert": hilbert_order,
    "morton": morton_order,
    "raster": raster_order,
    "snake": snake_order,
}


def folded_order(length: int, width: int | None = None, *, curve: str = "hilbert", snake: bool = False) -> Order:
    """The order of a sequence that is laid on a grid row by row and read along a curve.

    Token i lies in row ``i // width``, in column ``i % width``, or with ``snake`` that column from the right in every
    second row, so that the sequence never leaps. Rows are ``ceil(length / width)``; the last may stay partly empty. The
    width is ``ceil(sqrt(length))`` unless given. ``curve`` is "hilbert", "morton", "raster" or "snake".

    Raises InvalidInput for a length or width below 1, and for an unknown curve.

    Example:
        >>> folded_order(8).permutation  # 0 1 2 | 3 4 5 | 6 7
        tensor([0, 3, 6, 7, 5, 4, 1, 2])
    """
    if curve not in ORDERS:
        raise InvalidInput(f"folded_order: expected curve to be one of {tuple(ORDERS)}. Got {curve!r}.")
    if not _is_count(length) or not (width is None or _is_count(width)):
        raise InvalidInput(
            "folded_order: expected a length of at least 1, and a width of at least 1 or None. "
            f"Got {length!r} and {width!r}."
        )
    width = math.isqrt(length - 1) + 1 if width is None else width
    token = torch.arange(length)
    row, column = token // width, token % width
    if snake:
        column = torch.where(row % 2 == 1, width - 1 - column, column)
    return ORDERS[curve]((-(-length // width), width), points=torch.stack((row, column), 1))


def _order(places_of: Callable[[Size, Tensor], Tensor], shape: Sequence[int] | None, points: Tensor | None) -> Order:
    """The order of cells by what ``places_of(size, cells)`` says of them, which differs from cell to cell."""
    if points is None:
        if shape is None:
            raise InvalidInput("expected the shape of a grid, or points=, the cells that exist. Got neither.")
        size = _checked_shape(shape)
        return Order(places_of(size, _all_cells(size)).argsort())
    size, cells = _checked_points(shape, points)
    found, permutation = places_of(size, cells).sort()
    repeated = (found.diff() == 0).nonzero()
    if len(repeated):
        raise InvalidInput(
            f"expected each point once. Got {points[permutation[repeated[0, 0]]].tolist()} again; "
            "torch.unique(points, dim=0) keeps one of each."
        )
    return Order(permutation.to(points.device))


def _morton_places(size: Size, cells: Tensor) -> Tensor:
    """The bits of the coordinates in turn, the first coordinate's the highest; sides of 1 take no bits."""
    wide = [(side, cell) for side, cell in zip(size, cells) if side > 1]
    code = torch.zeros_like(cells[0])
    for side, cell in wide:
        code = (code << 1) | _spread(cell, (side - 1).bit_length(), len(wide))
    return code


def _spread(numbers: Tensor, bits: int, gap: int) -> Tensor:
    """``numbers`` of so many bits with their bits ``gap`` apart: halves are moved apart, then halves of halves."""
    width = 1 << (bits - 1).bit_length()
    while width > 1 and gap > 1:
        width //= 2
        kept = sum(((1 << width) - 1) << start for start in range(0, 63, width * gap)) & ((1 << 63) - 1)
        numbers = (numbers | numbers << width * (gap - 1)) & kept
    return numbers


def _snake_places(size: Size, cells: Tensor) -> Tensor:
    """Row-major places, but backwards along an axis wherever what comes before it is odd."""
    place = torch.zeros_like(cells[0])
    for side, cell in zip(size, cells):
        place = place * side + torch.where(place % 2 == 1, side - 1 - cell, cell)
    return place


def _all_cells(size: Size) -> Tensor:
    """The cells of a grid by their row-major numbers, (3, cells)."""
    number = torch.arange(math.prod(size))
    return torch.stack((number // (size[1] * size[2]), number // size[2] % size[1], number % size[2]))


def _checked_shape(shape: Sequence[int]) -> Size:
    """The three sides of a grid, the third 1 in two dimensions."""
    sides = tuple(shape)
    if len(sides) not in LONGEST_SIDE or not all(map(_is_count, sides)) or max(sides) > LONGEST_SIDE[len(sides)]:
        raise InvalidInput(
            f"expected the shape of a grid: two sides from 1 to {LONGEST_SIDE[2]:,}, or three from 1 to "
            f"{LONGEST_SIDE[3]:,}. Got {sides}; a sequence without a grid is folded by folded_order(length)."
        )
    return (sides[0], sides[1], sides[2] if len(sides) == 3 else 1)


def _checked_points(shape: Sequence[int] | None, points: Tensor) -> tuple[Size, Tensor]:
    """The grid that points lie on, and their cells (3, N) on it, on the CPU."""
    if not isinstance(points, Tensor):
        raise InvalidInput(f"expected points to be a tensor. Got {type(points).__name__}; torch.tensor it.")
    if points.is_floating_point() or points.is_complex() or points.dtype == torch.bool:
        raise InvalidInput(
            f"expected points with integer coordinates. Got {points.dtype}; divide by the cell and .long()."
        )
    if points.dim() != 2 or points.shape[1] not in LONGEST_SIDE or len(points) == 0:
        raise InvalidInput(f"expected points of shape (N, 2) or (N, 3), at least one. Got {tuple(points.shape)}.")
    cells = points.cpu().to(torch.int64).T.contiguous()
    low, high = cells.amin(1), cells.amax(1)
    if low.min() < 0:
        bad = points[int((points < 0).any(1).nonzero()[0, 0])]
        raise InvalidInput(
            f"expected coordinates of at least 0. Got {bad.tolist()}; subtract the smallest: points - points.amin(0)."
        )
    if shape is None:
        cells -= low[:, None]
        size = _checked_shape((high - low + 1).tolist())
    else:
        size = _checked_shape(shape)
        if len(shape) != len(cells) or any(top >= side for top, side in zip(high.tolist(), size)):
            raise InvalidInput(
                f"expected points inside the shape {tuple(shape)}. Got coordinates up to {high.tolist()}; leave the "
                "shape out for the smallest box that holds them."
            )
    return size, cells if len(cells) == 3 else torch.cat((cells, torch.zeros_like(cells[:1])))


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
