"""An order goes one way and back, for one sample or a batch, and refuses what is not its size."""

import dataclasses

import pytest
import torch

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.orderings import Order, hilbert_order


def mixed(length: int) -> Order:
    return Order(torch.randperm(length))


@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((2, 7, 3), 1), ((2, 7, 3), -2), ((4, 1, 7), 2), ((7, 0), 0)])
def test_applied_and_undone(shape, dim) -> None:
    order, x = mixed(7), torch.randn(shape)
    moved = order.apply(x, dim)
    assert torch.equal(moved, x.index_select(dim, order.permutation))
    assert torch.equal(order.undo(moved, dim), x)
    assert torch.equal(order.apply(order.undo(x, dim), dim), x)


def test_masks_and_numbers_are_moved_too() -> None:
    order = mixed(9)
    for x in (torch.rand(2, 9) > 0.5, torch.arange(18).view(2, 9)):
        assert torch.equal(order.apply(x, 1), x[:, order.permutation])


@pytest.mark.parametrize(("shape", "dim"), [((3, 6), 1), ((3, 6, 2), 1), ((3, 1, 6, 6), -1), ((3, 2, 6, 6), 2)])
def test_each_sample_of_a_batch_has_its_own(shape, dim) -> None:
    orders = [mixed(6) for _ in range(3)]
    both, x = Order.batch(orders), torch.randn(shape)
    expected = torch.stack([order.apply(sample, dim % x.dim() - 1) for order, sample in zip(orders, x)])
    assert torch.equal(both.apply(x, dim), expected)
    assert torch.equal(both.undo(expected, dim), x)


def test_a_batch_of_unequal_orders_keeps_padding_last() -> None:
    orders = [mixed(4), mixed(7), mixed(1)]
    for length in (None, 9):
        both = Order.batch(orders, length)
        assert both.is_batch
        assert not orders[0].is_batch
        assert len(both) == (length or 7)
        for row, order in zip(both.permutation, orders):
            assert torch.equal(row[: len(order)], order.permutation)
            assert torch.equal(row[len(order) :], torch.arange(len(order), len(both)))
    assert len(orders[1]) == 7


def test_padding_goes_last_and_the_rest_stays_in_order() -> None:
    padding = torch.tensor([[False] * 8, [False] * 5 + [True] * 3, [True, False] * 4, [True] * 8])
    one, many = mixed(8), Order.batch([mixed(8) for _ in range(4)])
    for order in (one, many):
        moved = order.padding_last(padding)
        rows = order.permutation.expand(4, 8).tolist()
        for row, before, hidden in zip(moved.permutation.tolist(), rows, padding.tolist()):
            assert row == [i for i in before if not hidden[i]] + [i for i in before if hidden[i]]
        assert torch.equal(moved.undo(moved.apply(padding, 1), 1), padding)
    orders = [mixed(8), mixed(5)]
    padded = Order.batch(orders)
    assert torch.equal(padded.padding_last(padding[:2]).permutation, padded.permutation)


def test_gradients_come_back_in_their_places() -> None:
    order, x = mixed(6), torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 3, dtype=torch.float64)
    (order.apply(x, 1) * weight).sum().backward()
    assert torch.equal(x.grad, order.undo(weight, 1))


def test_an_order_moves_between_devices_and_never_changes() -> None:
    order = hilbert_order((3, 5))
    meta = order.to("meta")
    assert meta.permutation.device.type == meta.inverse.device.type == "meta"
    same = order.to("cpu")
    assert torch.equal(same.permutation, order.permutation)
    assert torch.equal(same.inverse, order.inverse)
    assert repr(order) == "Order(15,)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        order.permutation = order.inverse


def test_another_size_is_refused() -> None:
    with pytest.raises(InvalidInput, match="the order is of 1,024 places, dim 1 of x has 1,000; make"):
        hilbert_order((32, 32)).apply(torch.zeros(2, 1000), 1)
    with pytest.raises(InvalidInput, match=r"the order is on cpu, x on meta; move it with .to"):
        mixed(4).apply(torch.zeros(4, device="meta"), 0)
    with pytest.raises(InvalidInput, match="Got dim 3"):
        mixed(4).undo(torch.zeros(4, 4), 3)
    batch = Order.batch([mixed(4)] * 2)
    for x, dim in ((torch.zeros(3, 4), 1), (torch.zeros(4, 2), 0)):
        with pytest.raises(InvalidInput, match="2 samples"):
            batch.apply(x, dim)


@pytest.mark.parametrize(
    ("permutation", "says"),
    [
        ([1, 0], "Got list"),
        (torch.tensor([1, 0], dtype=torch.int32), "int32"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), "of shape"),
        (torch.tensor([0, 2, 2]), "from 0 to 2 once"),
        (torch.tensor([[0, 1], [-1, 0]]), "from 0 to 1 once"),
    ],
)
def test_what_is_no_permutation_is_refused(permutation, says) -> None:
    with pytest.raises(InvalidInput, match=says):
        Order(permutation)


def test_bad_batches_and_paddings_are_refused() -> None:
    for orders in ([], [mixed(3).permutation], [Order.batch([mixed(3)])]):
        with pytest.raises(InvalidInput, match="at least one order"):
            Order.batch(orders)
    with pytest.raises(InvalidInput, match="at least 5"):
        Order.batch([mixed(5)], 4)
    for padding in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool), [False]):
        with pytest.raises(InvalidInput, match="bool padding"):
            mixed(3).padding_last(padding)
    with pytest.raises(InvalidInput, match="3 places"):
        mixed(3).padding_last(torch.zeros(2, 4, dtype=torch.bool))
