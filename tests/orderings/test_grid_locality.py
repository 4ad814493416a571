"""The figures of locality are what they say, and Hilbert's order beats raster's in them."""

import math
from itertools import product

import pytest
import torch

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.orderings import (
    Order,
    hilbert_order,
    mean_segment_distance,
    morton_order,
    neighbourhood_share,
    raster_order,
    snake_order,
)


@pytest.mark.parametrize(("shape", "size"), [((5, 7), 3), ((5, 7), 1), ((3, 4), 9), ((3, 4, 2), 3)])
def test_the_share_counted_cell_by_cell(shape, size) -> None:
    order = Order(torch.randperm(math.prod(shape)))
    cells = list(product(*map(range, shape)))
    segment = {cell: int(place) // 6 for cell, place in zip(cells, order.inverse)}
    shares = []
    for cell in cells:
        near = [other for other in cells if max(abs(a - b) for a, b in zip(cell, other)) <= size // 2]
        shares.append(sum(segment[cell] == segment[other] for other in near) / len(near))
    assert neighbourhood_share(order, shape, 6, size) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 3)])
def test_the_distance_counted_pair_by_pair(shape) -> None:
    order = Order(torch.randperm(math.prod(shape)))
    cells = torch.tensor(list(product(*map(range, shape))))[order.permutation].tolist()
    segments = [cells[i : i + 8] for i in range(0, len(cells), 8)]
    pairs = [math.dist(a, b) for segment in segments for i, a in enumerate(segment) for b in segment[:i]]
    assert mean_segment_distance(order, shape, 8) == pytest.approx(sum(pairs) / len(pairs))


def test_a_segment_of_one_token_holds_no_pair() -> None:
    assert mean_segment_distance(raster_order((3, 3)), (3, 3), 1) == 0
    assert neighbourhood_share(raster_order((3, 3)), (3, 3), 9, 3) == 1


@pytest.mark.parametrize(
    ("shape", "segment_length"), [((64, 64), 64), ((64, 64), 100), ((60, 37), 64), ((12, 13, 14), 64)]
)
def test_hilbert_beats_raster_and_snake(shape, segment_length) -> None:
    hilbert, raster, snake = (make(shape) for make in (hilbert_order, raster_order, snake_order))
    distance = mean_segment_distance(hilbert, shape, segment_length)
    share = neighbourhood_share(hilbert, shape, segment_length, 3)
    for other in (raster, snake):
        assert distance < 0.6 * mean_segment_distance(other, shape, segment_length)
        assert share > 1.15 * neighbourhood_share(other, shape, segment_length, 3)


def test_hilbert_is_at_least_as_local_as_morton() -> None:
    shape = (64, 64)
    assert mean_segment_distance(hilbert_order(shape), shape, 64) == mean_segment_distance(
        morton_order(shape), shape, 64
    )
    assert mean_segment_distance(hilbert_order(shape), shape, 96) < mean_segment_distance(
        morton_order(shape), shape, 96
    )


@pytest.mark.parametrize(
    ("order", "segment_length", "size", "says"),
    [
        (raster_order((4, 4)), 4, 2, "odd"),
        (raster_order((4, 4)), 4, 0, "odd"),
        (raster_order((4, 4)), 0, 3, "segment_length"),
        (raster_order((4, 5)), 4, 3, "16 places. Got Order"),
        (Order.batch([raster_order((4, 4))]), 4, 3, "16 places"),
    ],
)
def test_bad_questions_are_refused(order, segment_length, size, says) -> None:
    with pytest.raises(InvalidInput, match=says):
        neighbourhood_share(order, (4, 4), segment_length, size)
    if says != "odd":
        with pytest.raises(InvalidInput, match=says):
            mean_segment_distance(order, (4, 4), segment_length)
