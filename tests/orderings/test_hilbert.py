"""The curve goes through every cell of every box by adjacent steps, and is Hilbert's where Hilbert's exists."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.orderings import hilbert
from dilated_attention_pytorch.orderings.hilbert import first_parts, flat, parts_of, places, walk


def check_walk(size: tuple[int, int, int]) -> None:
    """Each cell once, from cell 0, by steps of one cell along one axis."""
    cells = walk(size)
    assert torch.equal(flat(size, cells).sort().values, torch.arange(prod(size))), size
    assert cells[:, 0].tolist() == [0, 0, 0]
    assert (cells.diff(dim=1).abs().sum(0) == 1).all(), size


def is_walkable(size: tuple[int, int, int]) -> bool:
    return size[0] % 2 == 0 or (all(side % 2 for side in size) and (size[0] > 1 or prod(size) == 1))


@pytest.fixture
def cut_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are cut down to 2 x 2 x 2 cells, so that small sizes meet every rule."""
    monkeypatch.setattr(hilbert, "SMALL", 8)


def test_all_rectangles_up_to_33_have_adjacent_steps_only() -> None:
    for sides in product(range(1, 34), repeat=2):
        check_walk((*sides, 1))


def test_all_boxes_up_to_9_have_adjacent_steps_only() -> None:
    for size in product(range(1, 10), repeat=3):
        check_walk(size)


@given(st.tuples(st.integers(1, 300), st.integers(1, 300), st.just(1)) | st.tuples(*[st.integers(1, 40)] * 3))
@settings(max_examples=30, deadline=None)
def test_larger_boxes_have_adjacent_steps_only(size: tuple[int, int, int]) -> None:
    check_walk(size)


@pytest.mark.parametrize("size", [(1, 5000, 1), (5000, 1, 1), (2, 4099, 1), (4099, 2, 3), (3, 5, 1201), (4, 3, 1001)])
def test_long_strips_have_adjacent_steps_only(size: tuple[int, int, int]) -> None:
    check_walk(size)


@pytest.mark.parametrize("size", [(401, 4, 1), (401, 3, 2), (6, 401, 5)])
def test_a_long_odd_strip_is_walked_once_and_not_there_and_back(size: tuple[int, int, int]) -> None:
    along = walk(size)[size.index(401)]
    assert along[-1] == 400
    assert (along.cummax(0).values - along).max() <= 4 * max(side for side in size if side != 401)
    crossing = (along == along[len(along) // 2]).nonzero().squeeze(1)
    assert crossing[-1] - crossing[0] == len(crossing) - 1, "the middle slab is gone through in one go"


@pytest.mark.usefixtures("cut_to_the_end")
@pytest.mark.parametrize("size", [(9, 7, 5), (6, 9, 4), (1, 37, 20), (31, 2, 7), (8, 8, 8), (4, 9, 12), (30, 31, 1)])
def test_places_are_the_inverse_of_the_walk(size: tuple[int, int, int]) -> None:
    cells = walk(size)
    mixed = torch.randperm(prod(size))
    before = cells[:, mixed].clone()
    given_cells = before.clone()
    assert torch.equal(places(size, given_cells), mixed)
    assert torch.equal(given_cells, before), "the cells given are left as they are"


def test_places_in_a_box_that_could_not_be_built() -> None:
    size = ((1 << 21) - 1, 1 << 21, (1 << 21) - 5)  # 2^63 cells
    corner = torch.tensor([0, 5, (1 << 21) - 20])
    near = torch.stack(torch.meshgrid(*[torch.arange(6)] * 3, indexing="ij")).flatten(1) + corner[:, None]
    found = places(size, near)
    assert len(found.unique()) == near.shape[1]
    assert found.min() >= 0
    steps = near[:, found.argsort()].diff(dim=1).abs().sum(0)
    follows = found.sort().values.diff() == 1
    assert follows.sum() > 150
    assert (steps[follows] == 1).all()


def classical(side: int) -> torch.Tensor:
    """Hilbert's curve by its definition: four quarters, the first and last turned; numbers of cells (side, side)."""
    if side == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    quarter, cells = classical(side // 2), side * side // 4
    left = torch.cat((quarter.T, quarter + cells), 0)
    right = torch.cat((quarter.T.flip(0, 1) + 3 * cells, quarter + 2 * cells), 0)
    return torch.cat((left, right), 1)


@pytest.mark.parametrize("side", [2, 4, 8, 32, 128])
def test_squares_of_powers_of_two_have_the_classical_curve(side: int) -> None:
    cells = walk((side, side, 1))
    numbers = torch.empty(side, side, dtype=torch.int64)
    numbers[cells[0], cells[1]] = torch.arange(side * side)
    assert torch.equal(numbers, classical(side))


@pytest.mark.parametrize("side", [4, 16])
def test_every_octant_of_a_cube_is_left_once(side: int) -> None:
    cells = walk((side,) * 3) // (side // 2)
    octants = (cells[0] * 4 + cells[1] * 2 + cells[2]).unique_consecutive()
    assert sorted(octants.tolist()) == list(range(8))


@pytest.mark.usefixtures("cut_to_the_end")
def test_every_cut_leaves_walkable_boxes_that_join() -> None:
    kinds = set()
    for size in product(range(1, 13), repeat=3):
        assert all(is_walkable(part.size) for part in first_parts(size)), size
        if not is_walkable(size):
            continue
        parts = parts_of(size)
        kinds.add(len(parts))
        assert all(is_walkable(part.size) for part in parts), (size, parts)
        if parts:
            assert sum(prod(part.size) for part in parts) == prod(size)
            first = parts[0].outward(torch.zeros(3, 1, dtype=torch.int64))
            last = parts[-1].outward(torch.tensor([[parts[-1].size[0] - 1], [0], [0]]))
            assert first.flatten().tolist() == [0, 0, 0]
            assert last.flatten().tolist() == [size[0] - 1, 0, 0]
    assert kinds == {0, 2, 3, 5}


def test_a_part_knows_its_cells() -> None:
    size = (6, 8, 8)
    for part in parts_of(size):
        own = torch.stack(torch.meshgrid(*map(torch.arange, part.size), indexing="ij")).flatten(1)
        outer = part.outward(own)
        every = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).flatten(1)
        held = set(map(tuple, every[:, part.holds(every, size)].T.tolist()))
        assert held == set(map(tuple, outer.T.tolist()))
        assert torch.equal(torch.stack(part.inward(list(outer))), own)
