"""Every name that the front desk promises imports from where it was promised, with its signature and defaults."""

import inspect
from importlib import import_module

import pytest

from dilated_attention_pytorch import core, memory

NAMES = {
    "config": "DilatedAttentionConfig MultiheadConfig RingAttentionConfig SparseAttentionConfig DistributedConfig "
    "MemoryPoolConfig",
    "factory": "create_dilated_attention create_multihead_dilated_attention create_block_sparse_attention "
    "create_adaptive_sparse_attention register_attention register_multihead_attention",
    "presets": "PRESETS create_attention_from_preset suggest_branches",
    "base": "BaseDilatedAttention BaseMultiheadDilatedAttention",
    "validation": "ValidationMixin",
    "constants": "GPU_TYPE detect_gpu_type get_current_optimal_settings HAS_FLASH_ATTN HAS_FLASH_ATTN_3 HAS_XFORMERS "
    "HAS_TRITON HAS_SDPA",
    "attention_utils": "optimize_attention_computation create_dilated_mask create_block_diagonal_mask "
    "create_4d_causal_mask compute_attention_scores standard_attention compute_alibi_bias compute_rotary_embeddings "
    "apply_rotary_embeddings split_attention_heads merge_attention_heads get_attention_backend_info",
    "memory_pool": "get_global_memory_pool reset_global_memory_pool get_memory_pool_info clear_memory_pool "
    "UnifiedMemoryPool",
    "layers": "DilatedAttention MultiheadDilatedAttention ImprovedDilatedAttention ImprovedMultiheadDilatedAttention "
    "RingDilatedAttention RingMultiheadDilatedAttention DistributedMultiheadDilatedAttention "
    "BlockSparseRingDilatedAttention BlockSparseRingMultiheadDilatedAttention "
    "BlockSparseRingDistributedDilatedAttention SparsePatternConfig DilatedTransformerEncoderLayer "
    "DilatedTransformerDecoderLayer LongNet LongNetLM",
}
PAIRS = [(module, name) for module, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_a_name_is_in_its_module_and_in_core(module: str, name: str) -> None:
    there, here = getattr(import_module(f"{core.__name__}.{module}"), name), getattr(core, name)
    assert there is here or there == here  # facts about the machine are values
    assert name in core.__all__
    assert name in dir(core)


BRANCHES = "segment_lengths, dilation_rates, dropout=0.0, use_tf32=True, device=None, dtype=None"
CREATED = "segment_lengths=None, dilation_rates=None"
MULTIHEAD = (
    "dropout=0.0, bias=True, layer_norm=True, layer_norm_eps=1e-05, gamma_init=1.0, device=None, dtype=None, op=None"
)
SIGNATURES = {
    core.DilatedAttentionConfig: BRANCHES,
    core.MultiheadConfig: "embed_dim, num_heads, bias=True, layer_norm=True, layer_norm_eps=1e-05, gamma_init=1.0, "
    "device=None, dtype=None",
    core.RingAttentionConfig: f"{BRANCHES}, block_size=1024, ring_size=None, use_checkpointing=True, "
    "use_memory_pool=True, max_cached_buffers=50",
    core.SparseAttentionConfig: f"{BRANCHES}, pattern_type='dilated_sparse', sparsity_ratio=0.25, block_size=128, "
    "enable_adaptive=False, min_sparsity=0.1, max_sparsity=0.9, density=None",
    core.DistributedConfig: "world_size=None, rank=None, backend='nccl', sequence_parallel=False, "
    "model_parallel=False, pipeline_parallel=False, gradient_checkpointing=False, communication_optimization=True, "
    "bucket_size_mb=25, enable_async_communication=True, gradient_compression_ratio=None, zero_stage=0",
    core.MemoryPoolConfig: "hot_cache_size=50, hot_cache_threshold=10, allow_buffer_slicing=True, "
    "cleanup_threshold_mb=100, max_pool_size_mb=1024, enable_statistics=True, device=None",
    core.create_dilated_attention: f"kind='auto', {CREATED}, **options",
    core.create_multihead_dilated_attention: f"kind='auto', embed_dim=768, num_heads=12, {CREATED}, "
    "multihead_config=None, attention_config=None, **options",
    core.create_block_sparse_attention: "sparsity_ratio=0.9, pattern_type='dilated_sparse', embed_dim=768, "
    "num_heads=12, **options",
    core.create_adaptive_sparse_attention: "embed_dim=768, num_heads=12, min_sparsity=0.1, max_sparsity=0.9, **options",
    core.create_attention_from_preset: "name, embed_dim, num_heads, kind='auto', **options",
    core.optimize_attention_computation: "q, k, v, is_causal=False, attention_mask=None, dropout_p=0.0",
    core.DilatedAttention: f"{CREATED}, softmax_scale=None, attention_dropout=0.0, op=None",
    core.MultiheadDilatedAttention: "embed_dim, num_heads, dilation_rates=None, segment_lengths=None, " + MULTIHEAD,
    memory.UnifiedMemoryPool.get_buffer: "shape, dtype=torch.float32, device=None, pinned=False, pool_type='default'",
}


@pytest.mark.parametrize("known", SIGNATURES, ids=lambda known: known.__qualname__)
def test_signatures_and_defaults_are_those_promised(known) -> None:
    kept = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(known).parameters.values()
        if p.kind is not p.KEYWORD_ONLY and p.name != "self"
    ]
    assert ", ".join(map(str, kept)) == SIGNATURES[known]


def test_the_first_words_of_the_language_model_s_signature() -> None:
    parameters = list(inspect.signature(core.LongNetLM).parameters.values())[:3]
    assert [(p.name, p.default) for p in parameters] == [
        ("num_tokens", inspect.Parameter.empty),
        ("d_model", 768),
        ("nhead", 12),
    ]
    names = {"small", "medium", "large", "longnet-base", "gigapath", "code", "genome"}
    assert set(core.PRESETS) == names | {f"longvit-{size}k" for size in (1, 4, 8, 16, 32)}
