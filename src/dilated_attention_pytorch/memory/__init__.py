"""Where work buffers come from."""

from dilated_attention_pytorch.memory.config import MemoryPoolConfig
from dilated_attention_pytorch.memory.poison import fill_with_nan
from dilated_attention_pytorch.memory.pool import UnifiedMemoryPool
from dilated_attention_pytorch.memory.shared import (
    clear_memory_pool,
    get_global_memory_pool,
    get_memory_pool_info,
    reset_global_memory_pool,
)
from dilated_attention_pytorch.memory.snapshot import PoolSnapshot, PoolStatistics
from dilated_attention_pytorch.memory.uses import USES, Use, empty, pooled_uses, zeros
from dilated_attention_pytorch.memory.workspace import Workspace

__all__ = [
    "USES",
    "MemoryPoolConfig",
    "PoolSnapshot",
    "PoolStatistics",
    "UnifiedMemoryPool",
    "Use",
    "Workspace",
    "clear_memory_pool",
    "empty",
    "fill_with_nan",
    "get_global_memory_pool",
    "get_memory_pool_info",
    "pooled_uses",
    "reset_global_memory_pool",
    "zeros",
]
