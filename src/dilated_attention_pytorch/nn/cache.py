"""The key-value cache of decoding: buffers that double when they are full."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput

FIRST_CAPACITY = 64


class LayerCache:
    """The keys and values that one layer has seen, in row order, positions already applied.

    ``length`` rows are valid. Buffers are (B, capacity, Hkv, D); the capacity doubles, so that N appends of one row
    copy fewer than 2 N rows. It holds no gradients.

    Example:
        >>> cache = LayerCache()
        >>> keys, values = cache.append(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4))
        >>> cache.length, keys.shape
        (3, torch.Size([1, 3, 2, 4]))
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Rows (tokens) that the buffers hold before they grow again."""
        return 0 if self._keys is None else self._keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(x.nbytes for x in (self._keys, self._values) if x is not None)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Views of all rows, the new ``keys`` and ``values (B, N, Hkv, D)`` as the last.

        Raises InvalidInput when the rows need gradients, or differ from the cached ones in anything but N.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise InvalidInput("a key-value cache holds no gradients; call under torch.no_grad(), or without a cache.")
        needed = self.length + keys.shape[1]
        self._keys = _room_for(self._keys, keys, self.length, needed)
        self._values = _room_for(self._values, values, self.length, needed)
        self._keys[:, self.length : needed] = keys
        self._values[:, self.length : needed] = values
        self.length = needed
        return self._keys[:, :needed], self._values[:, :needed]

    def truncate(self, length: int) -> None:
        """Forget every row from ``length`` on; the buffers stay. Raises InvalidInput for more rows than there are."""
        if not 0 <= length <= self.length:
            raise InvalidInput(f"expected to truncate to between 0 and {self.length} rows. Got {length}.")
        self.length = length


class KeyValueCache:
    """One `LayerCache` for each layer of a model; ``length`` tokens have been seen by all of them.

    Example:
        >>> cache = KeyValueCache(num_layers=2)
        >>> cache.length, len(cache.layers)
        (0, 2)
    """

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise InvalidInput(f"expected a cache of at least 1 layer. Got {num_layers}.")
        self.layers = tuple(LayerCache() for _ in range(num_layers))
        self.tokens: Tensor | None = None  # (B, length), for models whose input layer looks back

    @property
    def length(self) -> int:
        """Tokens seen by every layer."""
        return min(layer.length for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on, in all layers."""
        for layer in self.layers:
            layer.truncate(length)
        if self.tokens is not None:
            self.tokens = self.tokens[:, :length]


def _room_for(buffer: Tensor | None, rows: Tensor, length: int, needed: int) -> Tensor:
    if buffer is None:
        capacity = max(needed, FIRST_CAPACITY)
        return rows.new_empty((rows.shape[0], capacity, *rows.shape[2:]))
    expected = (buffer.shape[0], *buffer.shape[2:])
    got = (rows.shape[0], *rows.shape[2:])
    if expected != got or buffer.dtype != rows.dtype or buffer.device != rows.device:
        raise InvalidInput(
            f"the cache holds rows of (B, Hkv, D) = {expected}, {buffer.dtype} on {buffer.device}. Got {got}, "
            f"{rows.dtype} on {rows.device}; start another cache for another batch or model."
        )
    if needed <= buffer.shape[1]:
        return buffer
    grown = buffer.new_empty((buffer.shape[0], max(needed, 2 * buffer.shape[1]), *buffer.shape[2:]))
    grown[:, :length] = buffer[:, :length]
    return grown
