"""What an order of tokens is: a permutation and its inverse, applied along a dim and undone again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput


@dataclass(frozen=True, eq=False, repr=False)
class Order:
    """Tokens in another order: the i-th is number ``permutation[i]`` of those that came.

    ``permutation`` (N,) holds every number from 0 to N - 1 once; (B, N) is an order for each sample of a batch. Both it
    and ``inverse``, for which ``inverse[permutation]`` is 0 to N - 1, are int64 tensors.

    Raises InvalidInput for a permutation of another shape or dtype, or one that leaves numbers out.

    Example:
        >>> order = Order(torch.tensor([2, 0, 1]))
        >>> order.apply(torch.tensor([10, 11, 12]), 0)
        tensor([12, 10, 11])
        >>> order.undo(torch.tensor([12, 10, 11]), 0)
        tensor([10, 11, 12])
    """

    permutation: Tensor
    inverse: Tensor

    def __init__(self, permutation: Tensor) -> None:
        if not isinstance(permutation, Tensor):
            raise InvalidInput(f"Order: expected permutation to be a tensor. Got {type(permutation).__name__}.")
        if permutation.dtype != torch.int64 or permutation.dim() not in (1, 2):
            raise InvalidInput(
                "Order: expected an int64 permutation of shape (N,) or (B, N). "
                f"Got {permutation.dtype} of shape {tuple(permutation.shape)}; convert it with .long()."
            )
        straight = torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)
        if not torch.equal(permutation.sort(-1).values, straight):
            raise InvalidInput(
                f"Order: expected each number from 0 to {permutation.shape[-1] - 1} once. Got a permutation that "
                "leaves some out; argsort gives one from any keys."
            )
        self._hold(permutation, _inverse(permutation))

    def _hold(self, permutation: Tensor, inverse: Tensor) -> None:
        object.__setattr__(self, "permutation", permutation)
        object.__setattr__(self, "inverse", inverse)

    @classmethod
    def batch(cls, orders: Sequence[Order], length: int | None = None) -> Order:
        """One order (B, length) for a padded batch whose samples have ``orders`` of their own; padding stays last.

        ``length`` is that of the longest sample unless given.

        Raises InvalidInput for no orders, for orders of batches, and for a length that is less than a sample's.

        Example:
            >>> Order.batch([Order(torch.tensor([1, 0])), Order(torch.tensor([2, 0, 1]))]).permutation
            tensor([[1, 0, 2],
                    [2, 0, 1]])
        """
        if not orders or any(not isinstance(order, Order) or order.is_batch for order in orders):
            raise InvalidInput("Order.batch: expected at least one order, each of a single sample, of shape (N,).")
        longest = max(len(order) for order in orders)
        length = longest if length is None else length
        if length < longest:
            raise InvalidInput(
                f"Order.batch: expected a length of at least {longest}, the longest order. Got {length}."
            )
        rows = torch.arange(length, device=orders[0].permutation.device).repeat(len(orders), 1)
        for row, order in zip(rows, orders):
            row[: len(order)] = order.permutation
        return cls(rows)

    @property
    def is_batch(self) -> bool:
        """Whether each sample has an order of its own."""
        return self.permutation.dim() == 2

    def __len__(self) -> int:
        return self.permutation.shape[-1]

    def __repr__(self) -> str:
        return f"Order{tuple(self.permutation.shape)}"

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with its ``dim`` in this order; an order of a batch reads the samples of x in dim 0.

        Raises InvalidInput for an x of another length or batch size, or on another device.
        """
        return self._moved(x, dim, self.permutation)

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """``x`` whose ``dim`` is in this order as it was before: ``undo(apply(x, dim), dim)`` is x."""
        return self._moved(x, dim, self.inverse)

    def to(self, device: torch.device | str) -> Order:
        """The same order on another device."""
        return known_order(self.permutation.to(device), self.inverse.to(device))

    def padding_last(self, padding: Tensor) -> Order:
        """This order (B, N), except that tokens where ``padding`` (B, N) is True go last in each sample.

        The others stay in order: padding ends on the right, wherever it was.

        Raises InvalidInput for a padding that is not bool, or of another shape.

        Example:
            >>> padding = torch.tensor([[True, False, False]])
            >>> Order(torch.tensor([2, 0, 1])).padding_last(padding).permutation
            tensor([[2, 1, 0]])
        """
        if not isinstance(padding, Tensor) or padding.dtype != torch.bool or padding.dim() != 2:
            got = f"{padding.dtype}, {tuple(padding.shape)}" if isinstance(padding, Tensor) else type(padding).__name__
            raise InvalidInput(f"Order: expected a bool padding of shape (B, N), True = padding. Got {got}.")
        moved = self.apply(padding, 1)
        visible_first = moved.byte().argsort(dim=1, stable=True)
        permutation = self.permutation.expand_as(moved).gather(1, visible_first)
        return known_order(permutation, _inverse(permutation))

    def _moved(self, x: Tensor, dim: int, numbers: Tensor) -> Tensor:
        if not -x.dim() <= dim < x.dim():
            raise InvalidInput(f"Order: expected a dim of x, which has shape {tuple(x.shape)}. Got dim {dim}.")
        if x.device != numbers.device:
            raise InvalidInput(f"Order: the order is on {numbers.device}, x on {x.device}; move it with .to(x.device).")
        dim %= x.dim()
        if x.shape[dim] != len(self):
            raise InvalidInput(
                f"Order: the order is of {len(self):,} places, dim {dim} of x has {x.shape[dim]:,}; make the order of "
                "the grid or the points that these tokens stand on."
            )
        own = [dim]
        if self.is_batch:
            own = [0, dim]
            if dim == 0 or x.shape[0] != numbers.shape[0]:
                raise InvalidInput(
                    f"Order: an order of {numbers.shape[0]} samples expects as many in dim 0 of x, and its tokens in "
                    f"another dim. Got x of shape {tuple(x.shape)} and dim {dim}."
                )
        index = numbers.view([x.shape[d] if d in own else 1 for d in range(x.dim())])
        return x.gather(dim, index.expand_as(x))  # index_select is slow backward: it adds row by row


def _inverse(permutation: Tensor) -> Tensor:
    straight = torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(-1, permutation, straight)


def known_order(permutation: Tensor, inverse: Tensor) -> Order:
    """The order of a permutation and its inverse that are known to be right: nothing is checked, no device waits."""
    order = object.__new__(Order)
    order._hold(permutation, inverse)
    return order
