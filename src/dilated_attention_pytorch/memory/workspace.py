"""Buffers that one call uses again for each of its chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.memory.poison import poisoned
from dilated_attention_pytorch.memory.uses import empty


class Workspace:
    """Named buffers that grow to the largest request and are handed out again; for one call on one thread.

    It keeps the memory of a call at one chunk, however many chunks there are (docs/speed.md has the figures). Unlike
    a pool it hands out the same memory again while an earlier view lives: its caller has finished with that view.
    ``use`` is that of `empty`.

    Example:
        >>> work = Workspace(torch.float32, "cpu")
        >>> a = work.take("q", (4, 8))
        >>> work.take("q", (2, 8)).data_ptr() == a.data_ptr()
        True
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str, use: str | None = None) -> None:
        self._dtype, self._device, self._use = dtype, device, use
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The buffer of this name as a contiguous tensor of this shape; its earlier contents are lost."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = empty((size,), self._dtype, self._device, self._use)
        return poisoned(buffer[:size].view(tuple(shape)))
