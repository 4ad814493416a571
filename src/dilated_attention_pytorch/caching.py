"""A bounded cache that threads share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from dilated_attention_pytorch.errors import InvalidInput

Value = TypeVar("Value")


class BoundedCache:
    """The last ``size`` values asked for; safe among threads. A copy, or what a pickle gives, starts empty.

    Raises InvalidInput for a size below 1.

    Example:
        >>> cache = BoundedCache(2)
        >>> [cache.get(key, lambda: key * 10) for key in (1, 2, 1, 3)], len(cache)
        ([10, 20, 10, 30], 2)
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidInput(f"a cache keeps at least 1 value, got size={size!r}")
        self.size = size
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of ``key``: the one kept, or a new one, which takes the place of the one least lately asked for.

        ``compute`` runs outside the lock, so it may ask for other keys; threads that miss together get one value.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]  # type: ignore[no-any-return]
        value = compute()
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Nothing is kept."""
        with self._lock:
            self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
