"""How well an order keeps what is near on the grid near in the sequence, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.orderings.order import Order


def neighbourhood_share(order: Order, shape: Sequence[int], segment_length: int, size: int) -> float:
    """The share of a cell's neighbourhood that lies in the cell's own segment, from 0 to 1, mean over all cells.

    The grid has this ``shape``, and the order is cut into segments of ``segment_length`` tokens; the last may be
    shorter. The neighbourhood is the ``size`` x ``size`` cells around a cell (three times ``size`` in three
    dimensions), itself among them and those past the grid's edge not.

    Raises InvalidInput for an order of another size than the grid's, a segment below 1 token, or an even size.

    Example:
        >>> from dilated_attention_pytorch.orderings import hilbert_order, raster_order
        >>> [round(neighbourhood_share(order((4, 4)), (4, 4), 4, 3), 3) for order in (raster_order, hilbert_order)]
        [0.417, 0.694]
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise InvalidInput(f"expected size to be odd and at least 1, as in 3 (3 x 3 cells). Got {size!r}.")
    _check(order, shape, segment_length)
    segment = (order.inverse.cpu() // segment_length).view(*shape)
    own = torch.zeros(tuple(shape), dtype=torch.float64)
    inside = torch.zeros_like(own)
    for shift in product(range(-(size // 2), size // 2 + 1), repeat=len(shape)):
        here = tuple(slice(max(0, -s), max(0, side - max(0, s))) for s, side in zip(shift, shape))
        there = tuple(slice(max(0, s), max(0, side + min(0, s))) for s, side in zip(shift, shape))
        own[here] += segment[here] == segment[there]
        inside[here] += 1
    return float((own / inside).mean())


def mean_segment_distance(order: Order, shape: Sequence[int], segment_length: int) -> float:
    """The mean distance on the grid, in cells, of two different tokens of one segment, over all such pairs.

    The grid has this ``shape``, and the order is cut into segments of ``segment_length`` tokens; the last may be
    shorter. 0 where no segment has two tokens.

    Raises InvalidInput for an order of another size than the grid's, or a segment below 1 token.

    Example:
        >>> from dilated_attention_pytorch.orderings import hilbert_order, raster_order
        >>> [round(mean_segment_distance(order((4, 4)), (4, 4), 4), 3) for order in (raster_order, hilbert_order)]
        [1.667, 1.138]
    """
    _check(order, shape, segment_length)
    numbers = order.permutation.cpu().split(segment_length)
    distances = [_distances(torch.stack(torch.unravel_index(segment, tuple(shape)), 1)) for segment in numbers]
    pairs = sum(len(segment) * (len(segment) - 1) for segment in numbers)
    return sum(distances) / max(pairs, 1)


def _distances(cells: Tensor) -> float:
    """The sum of distances over ordered pairs of cells (N, 2 or 3)."""
    where = cells.double()
    return float(torch.cdist(where, where, compute_mode="donot_use_mm_for_euclid_dist").sum())


def _check(order: Order, shape: Sequence[int], segment_length: int) -> None:
    if isinstance(segment_length, bool) or not isinstance(segment_length, int) or segment_length < 1:
        raise InvalidInput(f"expected a segment_length of at least 1 token. Got {segment_length!r}.")
    cells = torch.Size(shape).numel()
    if order.is_batch or len(order) != cells:
        raise InvalidInput(
            f"expected the order of a grid of shape {tuple(shape)}, {cells:,} places. Got {order!r}; make it with the "
            "same shape."
        )
