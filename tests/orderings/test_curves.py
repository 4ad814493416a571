"""Orders of grids, points and folded sequences: what each is, and what is refused."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.orderings import (
    Order,
    folded_order,
    hilbert_order,
    morton_order,
    raster_order,
    snake_order,
)
from dilated_attention_pytorch.orderings.curves import ORDERS

SHAPES = [(1, 1), (1, 7), (6, 1), (4, 4), (5, 6), (13, 9), (3, 4, 5), (1, 5, 2), (4, 4, 4), (3, 3, 3)]
every_order = pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS.keys())


def cells_of(shape: tuple[int, ...]) -> torch.Tensor:
    """The cells of a grid in row-major order, (cells, dims)."""
    return torch.tensor(list(product(*map(range, shape))))


def in_order(order: Order, shape: tuple[int, ...]) -> list[list[int]]:
    return cells_of(shape)[order.permutation].tolist()


def morton_code(cell: list[int]) -> int:
    """The bits of the coordinates in turn, as text."""
    bits = [format(coordinate, "032b") for coordinate in cell]
    return int("".join(bit for level in zip(*bits) for bit in level), 2)


@every_order
@pytest.mark.parametrize("shape", SHAPES)
def test_an_order_is_a_bijection_with_its_inverse(make, shape) -> None:
    order = make(shape)
    straight = torch.arange(math.prod(shape))
    assert order.permutation.dtype == order.inverse.dtype == torch.int64
    assert torch.equal(order.permutation.sort().values, straight)
    assert torch.equal(order.inverse[order.permutation], straight)


@pytest.mark.parametrize("make", [hilbert_order, snake_order])
@given(st.lists(st.integers(1, 24), min_size=2, max_size=2) | st.lists(st.integers(1, 9), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_hilbert_and_snake_step_to_adjacent_cells(make, shape) -> None:
    order = make(shape)
    assert torch.equal(order.permutation.sort().values, torch.arange(math.prod(shape)))
    steps = torch.tensor(in_order(order, shape)).diff(dim=0).abs().sum(1)
    assert (steps == 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_raster_is_row_major_and_snake_turns_every_second_row(shape) -> None:
    assert raster_order(shape).permutation.tolist() == list(range(math.prod(shape)))
    rows = cells_of(shape).view(-1, shape[-1], len(shape))
    got = torch.tensor(in_order(snake_order(shape), shape)).view(rows.shape)
    for number, row in enumerate(got):
        expected = torch.arange(shape[-1])
        assert torch.equal(row[:, -1], expected.flip(0) if number % 2 else expected)
        assert (row[:, :-1] == row[0, :-1]).all()
    assert got[:, 0, 0].tolist() == rows[:, 0, 0].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_morton_sorts_by_interleaved_bits(shape) -> None:
    assert in_order(morton_order(shape), shape) == sorted(cells_of(shape).tolist(), key=morton_code)


def test_morton_of_large_coordinates() -> None:
    for dims, side in ((2, 1 << 31), (3, 1 << 21)):
        points = torch.unique(torch.randint(side, (200, dims)), dim=0)
        points = torch.cat((points, torch.zeros(1, dims, dtype=torch.int64), torch.full((1, dims), side - 1)))
        expected = sorted(points.tolist(), key=morton_code)
        assert points[morton_order(points=points).permutation].tolist() == expected


@every_order
@pytest.mark.parametrize("shape", [(9, 14), (6, 5, 7)])
def test_points_stand_as_the_curve_of_their_grid_meets_them(make, shape) -> None:
    cells = cells_of(shape)
    chosen = torch.randperm(len(cells))[:50]
    rank = make(shape).inverse[chosen]
    assert torch.equal(make(shape, points=cells[chosen]).permutation, rank.argsort())


@every_order
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_points_alone_stand_in_their_smallest_box(make, dtype) -> None:
    shape, corner = (9, 14), torch.tensor([100, 30])
    cells = cells_of(shape)
    inner = torch.randperm(len(cells))[:50]
    chosen = torch.cat((torch.tensor([0, len(cells) - 1]), inner)).unique()
    chosen = chosen[torch.randperm(len(chosen))]
    expected = make(shape, points=cells[chosen]).permutation
    assert torch.equal(make(points=(cells[chosen] + corner).to(dtype)).permutation, expected)


@every_order
def test_points_on_a_vast_slide_build_no_grid(make) -> None:
    for dims in (2, 3):
        points = torch.unique(torch.randint(1 << 20, (300, dims)), dim=0)
        order = make(points=points)
        assert torch.equal(order.permutation.sort().values, torch.arange(len(points)))
        # Points a short way apart stay together: blocks of 2 cells, doubled, are met one after another.
        pairs = torch.cat((points * 2, points * 2 + torch.tensor([0] * (dims - 1) + [1])))
        if make in (hilbert_order, morton_order):
            met = make([1 << 21] * dims, points=pairs).permutation % len(points)
            assert torch.equal(met[::2], met[1::2])


def test_hilbert_of_points_is_that_of_the_whole_grid_at_scale() -> None:
    shape = (130, 77)
    cells = cells_of(shape)
    mixed = torch.randperm(len(cells))
    order = hilbert_order(points=cells[mixed])
    assert torch.equal(mixed[order.permutation], hilbert_order(shape).permutation)


@pytest.mark.parametrize("curve", ORDERS)
@pytest.mark.parametrize("snake", [False, True])
@pytest.mark.parametrize(("length", "width"), [(1, None), (2, None), (16, None), (17, None), (30, 4), (5, 9), (9, 1)])
def test_a_folded_sequence_is_read_along_the_curve(curve, snake, length, width) -> None:
    order = folded_order(length, width, curve=curve, snake=snake)
    across = width or next(n for n in range(1, 99) if n * n >= length)
    grid = torch.full((-(-length // across), across), -1)
    for token in range(length):
        row, column = divmod(token, across)
        grid[row, across - 1 - column if snake and row % 2 else column] = token
    read = grid.flatten()[ORDERS[curve](grid.shape).permutation]
    assert order.permutation.tolist() == read[read >= 0].tolist()


def test_a_sequence_folded_as_a_snake_and_read_as_one_is_as_it_was() -> None:
    assert folded_order(23, 5, curve="snake", snake=True).permutation.tolist() == list(range(23))
    assert folded_order(23, 5, curve="raster").permutation.tolist() == list(range(23))


@every_order
@pytest.mark.parametrize(
    ("shape", "points", "says"),
    [
        (None, None, "Got neither"),
        ((0, 4), None, "sides from 1"),
        ((4, -1), None, "sides from 1"),
        ((4,), None, r"Got \(4,\)"),
        ((2, 2, 2, 2), None, "three from 1"),
        ((2.0, 2), None, "sides from 1"),
        ((True, 2), None, "sides from 1"),
        ((1 << 22, 1, 1), None, "2,097,152"),
        (None, [[0, 0]], "to be a tensor"),
        (None, torch.tensor([[0.0, 1.0]]), "integer coordinates"),
        (None, torch.tensor([[True, False]]), "integer coordinates"),
        (None, torch.tensor([0, 1]), r"\(N, 2\)"),
        (None, torch.empty(0, 2, dtype=torch.int64), "at least one"),
        (None, torch.tensor([[0, 1], [3, -1]]), r"at least 0. Got \[3, -1\]; subtract"),
        (None, torch.tensor([[4, 1], [3, 9], [4, 1]]), r"each point once. Got \[4, 1\]"),
        (None, torch.tensor([[0, 0], [0, 1 << 31]]), "2,147,483,648"),
        ((3, 3), torch.tensor([[0, 1], [2, 3]]), r"inside the shape \(3, 3\). Got coordinates up to \[2, 3\]"),
        ((3, 3), torch.tensor([[0, 1, 0]]), "inside the shape"),
    ],
)
def test_bad_grids_and_points_are_refused(make, shape, points, says) -> None:
    with pytest.raises(InvalidInput, match=says):
        make(shape, points=points)


def test_bad_folds_are_refused() -> None:
    for length, width in ((0, None), (5, 0), (2.5, None), (True, None)):
        with pytest.raises(InvalidInput, match="at least 1"):
            folded_order(length, width)
    with pytest.raises(InvalidInput, match="'peano'"):
        folded_order(9, curve="peano")
