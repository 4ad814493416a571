"""The pool of this process, made when it is first asked for."""

from __future__ import annotations

import threading
from typing import Any

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory.config import MemoryPoolConfig
from dilated_attention_pytorch.memory.pool import UnifiedMemoryPool

_lock = threading.Lock()
_pool: UnifiedMemoryPool | None = None


def get_global_memory_pool(config: MemoryPoolConfig | None = None) -> UnifiedMemoryPool:
    """The one pool of this process; ``config`` holds if this call makes it, or equals the one it has.

    Raises InvalidInput for another config while there is a pool.

    Example:
        >>> get_global_memory_pool() is get_global_memory_pool()
        True
    """
    global _pool
    with _lock:
        if _pool is None:
            _pool = UnifiedMemoryPool(config)
        elif config is not None and config != _pool.config:
            raise InvalidInput(
                f"the global memory pool has the config {_pool.config}: expected none or the same. Got {config}; "
                "call reset_global_memory_pool() first"
            )
        return _pool


def reset_global_memory_pool() -> None:
    """The next call of `get_global_memory_pool` makes a new pool; live buffers of the old one stay valid."""
    global _pool
    with _lock:
        old, _pool = _pool, None
    if old is not None:
        old.clear()


def get_memory_pool_info() -> dict[str, Any]:
    """What the global pool holds: total_buffers, total_memory_mb (MiB), hits, misses, hit_rate, live_buffers, ...

    Example:
        >>> sorted(get_memory_pool_info())[:4]
        ['delegated', 'fragmentation', 'free_memory_mb', 'hit_rate']
    """
    return get_global_memory_pool().get_info()


def clear_memory_pool() -> None:
    """The global pool holds nothing but live buffers."""
    get_global_memory_pool().clear()
