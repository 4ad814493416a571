"""What the library needs memory for, and which of it comes from the process's pool: what was measured to gain.

`dilated-attention bench --only pools` measures each use with the pool and without; docs/memory.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory.poison import poisoned
from dilated_attention_pytorch.memory.shared import get_global_memory_pool
from dilated_attention_pytorch.memory.snapshot import MIB

LEAST_BYTES = 32 * MIB
"""Smaller buffers come from the C library, which keeps them at hand: glibc's malloc learns to keep up to this size."""


@dataclass(frozen=True)
class Use:
    """What memory is for, on which shelf of the pool it would be, and whether it comes from there."""

    what: str
    pool_type: str
    pooled: bool


USES: dict[str, Use] = {
    "results": Use("outputs and gradients of attention", "default", True),
    "work": Use("rows packed and summed within a call on strided pieces", "default", True),
    "tiles": Use("rows packed and gathered within a call on tile plans", "sparse", True),
    "ring": Use("keys, values and gradients that a ring receives", "ring", True),
    "exchange": Use("rows that a gather or an all-to-all receives", "distributed", False),
}
"""By name; a use is pooled where that gained 3 % in time or 10 % in peak memory, and nowhere lost as much in either."""

_pooled: ContextVar[frozenset[str]] = ContextVar("pooled", default=frozenset(n for n, u in USES.items() if u.pooled))


@contextmanager
def pooled_uses(names: Iterable[str]) -> Iterator[None]:
    """Within it, calls of this thread take memory from the pool for these of `USES` only; with (), for none.

    Raises InvalidInput for a name that is no use.

    Example:
        >>> with pooled_uses(()):
        ...     x = empty((4096, 4096), torch.float32, "cpu", "results")
    """
    chosen = frozenset(names)
    unknown = sorted(chosen - set(USES))
    if unknown:
        raise InvalidInput(f"pooled_uses: expected names among {', '.join(USES)}. Got {', '.join(unknown)}.")
    token = _pooled.set(chosen)
    try:
        yield
    finally:
        _pooled.reset(token)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, use: str | None = None) -> Tensor:
    """A new contiguous tensor whose contents mean nothing, for a use of `USES`; None is memory of no pool."""
    shape = tuple(shape)
    if _from_pool(shape, dtype, device, use):
        assert use is not None
        return get_global_memory_pool().get_buffer(shape, dtype, "cpu", pool_type=USES[use].pool_type)
    return poisoned(torch.empty(shape, dtype=dtype, device=device))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, use: str | None = None) -> Tensor:
    """As `empty`, and zero: memory of the pool is cleared, other memory comes clear from the system.

    Example:
        >>> zeros((2,), torch.float32, "cpu")
        tensor([0., 0.])
    """
    shape = tuple(shape)
    if _from_pool(shape, dtype, device, use):
        return empty(shape, dtype, device, use).zero_()
    return torch.zeros(shape, dtype=dtype, device=device)


def _from_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, use: str | None) -> bool:
    large = math.prod(shape) * dtype.itemsize >= LEAST_BYTES
    return large and use in _pooled.get() and torch.device(device).type == "cpu"
