"""The front desk: configs, factories, presets, checks and facts, by the names that users of 0.1 and 0.2 know.

Every name is imported when it is first asked for.
"""

from importlib import import_module
from typing import Any

_ATTENTION_UTILITIES = (
    "apply_rotary_embeddings",
    "combine_masks",
    "compute_alibi_bias",
    "compute_attention_scores",
    "compute_rotary_embeddings",
    "create_4d_causal_mask",
    "create_block_diagonal_mask",
    "create_dilated_mask",
    "get_attention_backend_info",
    "merge_attention_heads",
    "optimize_attention_computation",
    "split_attention_heads",
    "standard_attention",
)
_BASE = ("BaseDilatedAttention", "BaseMultiheadDilatedAttention")
_CONFIG = (
    "DilatedAttentionConfig",
    "DistributedConfig",
    "MultiheadConfig",
    "RingAttentionConfig",
    "SparseAttentionConfig",
)
_CONSTANTS = (
    "APEX_VERSION",
    "CURRENT_OPTIMAL_SETTINGS",
    "DEEPSPEED_VERSION",
    "FAIRSCALE_VERSION",
    "FLASH_ATTN_VERSION",
    "GPU_TYPE",
    "HAS_APEX",
    "HAS_DEEPSPEED",
    "HAS_FAIRSCALE",
    "HAS_FLASH_ATTN",
    "HAS_FLASH_ATTN_3",
    "HAS_SDPA",
    "HAS_SDPA_KERNEL",
    "HAS_TRITON",
    "HAS_XFORMERS",
    "TORCH_VERSION",
    "TRITON_VERSION",
    "XFORMERS_VERSION",
    "detect_gpu_type",
    "get_current_optimal_settings",
)
_FACTORY = (
    "create_adaptive_sparse_attention",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    "register_attention",
    "register_multihead_attention",
)
_LAYERS = (
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DilatedAttention",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "DistributedMultiheadDilatedAttention",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "LongNet",
    "LongNetLM",
    "MultiheadDilatedAttention",
    "RingDilatedAttention",
    "RingMultiheadDilatedAttention",
    "SparsePatternConfig",
)
_MEMORY = (
    "MemoryPoolConfig",
    "UnifiedMemoryPool",
    "clear_memory_pool",
    "get_global_memory_pool",
    "get_memory_pool_info",
    "reset_global_memory_pool",
)
_PRESETS = ("PRESETS", "create_attention_from_preset", "describe_branches", "suggest_branches")

_ROOM = __name__.rpartition(".")[0]
_WHERE = {
    **dict.fromkeys(_ATTENTION_UTILITIES, f"{__name__}.attention_utils"),
    **dict.fromkeys(_BASE, f"{__name__}.base"),
    **dict.fromkeys(_CONFIG, f"{__name__}.config"),
    **dict.fromkeys(_CONSTANTS, f"{__name__}.constants"),
    **dict.fromkeys(_FACTORY, f"{__name__}.factory"),
    **dict.fromkeys(_LAYERS, f"{__name__}.layers"),
    **dict.fromkeys(_MEMORY, f"{_ROOM}.memory"),
    **dict.fromkeys(_PRESETS, f"{__name__}.presets"),
    "ValidationMixin": f"{__name__}.validation",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
