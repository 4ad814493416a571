"""Uninitialised memory, and buffers that one call uses again for each of its chunks.

Tests call `fill_with_nan`, so that a backend that reads memory before writing it is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_poison: ContextVar[bool] = ContextVar("poison", default=False)


@contextmanager
def fill_with_nan() -> Iterator[None]:
    """Within it, memory from `empty` and `Workspace` holds NaN instead of whatever was there.

    Example:
        >>> with fill_with_nan():
        ...     empty((2,), torch.float32, "cpu")
        tensor([nan, nan])
    """
    token = _poison.set(True)
    try:
        yield
    finally:
        _poison.reset(token)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A new tensor whose contents mean nothing."""
    return poisoned(torch.empty(tuple(shape), dtype=dtype, device=device))


is_poisoned = _poison.get  # whether it is within `fill_with_nan`


def poisoned(x: Tensor) -> Tensor:
    """The tensor, of NaN within `fill_with_nan`; integers and booleans, which have no NaN, are left as they are."""
    return x.fill_(torch.nan) if _poison.get() and (x.is_floating_point() or x.is_complex()) else x


class Workspace:
    """Named buffers that grow to the largest request and are handed out again; for one call on one thread.

    It keeps the memory of a call at one chunk, however many chunks there are (docs/speed.md has the figures). Unlike
    a pool it hands out the same memory again while an earlier view lives: its caller has finished with that view.

    Example:
        >>> work = Workspace(torch.float32, "cpu")
        >>> a = work.take("q", (4, 8))
        >>> work.take("q", (2, 8)).data_ptr() == a.data_ptr()
        True
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The buffer of this name as a contiguous tensor of this shape; its earlier contents are lost."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return poisoned(buffer[:size].view(tuple(shape)))
