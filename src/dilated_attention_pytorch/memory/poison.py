"""NaN in memory whose contents mean nothing: tests ask for it, so that reading before writing is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_poison: ContextVar[bool] = ContextVar("poison", default=False)
is_poisoned = _poison.get  # whether it is within `fill_with_nan`


@contextmanager
def fill_with_nan() -> Iterator[None]:
    """Within it, memory from `empty`, `Workspace` and pools holds NaN instead of whatever was there.

    Example:
        >>> from dilated_attention_pytorch.memory import empty
        >>> with fill_with_nan():
        ...     empty((2,), torch.float32, "cpu")
        tensor([nan, nan])
    """
    token = _poison.set(True)
    try:
        yield
    finally:
        _poison.reset(token)


def poisoned(x: Tensor) -> Tensor:
    """The tensor, of NaN within `fill_with_nan`; integers and booleans, which have no NaN, are left as they are."""
    return x.fill_(torch.nan) if _poison.get() and (x.is_floating_point() or x.is_complex()) else x
