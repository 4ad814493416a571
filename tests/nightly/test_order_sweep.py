"""Orders over wide ranges of sizes, and the time they take."""

import time
from itertools import product

import pytest
import torch

from dilated_attention_pytorch.orderings import hilbert_order, morton_order, raster_order, snake_order
from dilated_attention_pytorch.orderings.hilbert import flat, walk

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("sizes", [[(*s, 1) for s in product(range(1, 97), repeat=2)], product(range(1, 17), repeat=3)])
def test_every_step_of_the_curve_is_adjacent(sizes) -> None:
    for size in sizes:
        cells = walk(size)
        assert torch.equal(flat(size, cells).sort().values, torch.arange(cells.shape[1])), size
        assert (cells.diff(dim=1).abs().sum(0) == 1).all(), size


@pytest.mark.parametrize("make", [hilbert_order, morton_order, raster_order, snake_order])
@pytest.mark.parametrize("shape", [(1000, 1000), (1024, 1024), (100, 100, 100), (101, 99, 103)])
def test_a_million_places_take_less_than_two_seconds(make, shape) -> None:
    points = torch.unique(torch.randint(1 << 20, (1_000_000, len(shape))), dim=0)
    points = points[torch.randperm(len(points))]
    for options in ({"shape": shape}, {"points": points}):
        start = time.process_time()
        make(**options)
        assert time.process_time() - start < 2
