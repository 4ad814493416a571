"""Long-context attention that is exact, on any device, at any length: LongNet's dilated attention and its relatives.

Layers, models, selectors, orders and what runs on many devices are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dilated_attention_pytorch.attention import attend, longnet_attention
from dilated_attention_pytorch.compat import TorchscaleCompat
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.explanation import Explanation, explain
from dilated_attention_pytorch.merging import merge
from dilated_attention_pytorch.old_paths import install as install_old_paths
from dilated_attention_pytorch.patterns import BlockSparse, Causal, Dilated, Documents, Full, Pattern, Window, longnet
from dilated_attention_pytorch.reference import reference_attention
from dilated_attention_pytorch.scores import Relative, Softcap

if TYPE_CHECKING:
    from dilated_attention_pytorch.core import (
        BlockSparseRingDilatedAttention,
        BlockSparseRingDistributedDilatedAttention,
        BlockSparseRingMultiheadDilatedAttention,
        DistributedMultiheadDilatedAttention,
        ImprovedDilatedAttention,
        ImprovedMultiheadDilatedAttention,
        RingDilatedAttention,
        RingMultiheadDilatedAttention,
        SparsePatternConfig,
        create_adaptive_sparse_attention,
        create_attention_from_preset,
        create_block_sparse_attention,
        create_dilated_attention,
        create_multihead_dilated_attention,
        register_attention,
        register_multihead_attention,
        suggest_branches,
    )
    from dilated_attention_pytorch.models import LongNet, LongNetEncoder, LongNetLM
    from dilated_attention_pytorch.nn import (
        AdaptiveSparseAttention,
        BlockSparseAttention,
        DilatedAttention,
        DilatedTransformerDecoderLayer,
        DilatedTransformerEncoderLayer,
        MultiheadAdaptiveSparseAttention,
        MultiheadBlockSparseAttention,
        MultiheadDilatedAttention,
    )
    from dilated_attention_pytorch.orderings import hilbert_order
    from dilated_attention_pytorch.parallel import ContextParallel, context_parallel_attend
    from dilated_attention_pytorch.selection import Selector

install_old_paths()

__version__ = "0.3.0"

_LATER = {
    "AdaptiveSparseAttention": "nn",
    "BlockSparseAttention": "nn",
    "BlockSparseRingDilatedAttention": "core",
    "BlockSparseRingDistributedDilatedAttention": "core",
    "BlockSparseRingMultiheadDilatedAttention": "core",
    "ContextParallel": "parallel",
    "DilatedAttention": "nn",
    "DilatedTransformerDecoderLayer": "nn",
    "DilatedTransformerEncoderLayer": "nn",
    "DistributedMultiheadDilatedAttention": "core",
    "ImprovedDilatedAttention": "core",
    "ImprovedMultiheadDilatedAttention": "core",
    "LongNet": "models",
    "LongNetEncoder": "models",
    "LongNetLM": "models",
    "MultiheadAdaptiveSparseAttention": "nn",
    "MultiheadBlockSparseAttention": "nn",
    "MultiheadDilatedAttention": "nn",
    "RingDilatedAttention": "core",
    "RingMultiheadDilatedAttention": "core",
    "Selector": "selection",
    "SparsePatternConfig": "core",
    "context_parallel_attend": "parallel",
    "create_adaptive_sparse_attention": "core",
    "create_attention_from_preset": "core",
    "create_block_sparse_attention": "core",
    "create_dilated_attention": "core",
    "create_multihead_dilated_attention": "core",
    "hilbert_order": "orderings",
    "register_attention": "core",
    "register_multihead_attention": "core",
    "suggest_branches": "core",
}

__all__ = [
    "AdaptiveSparseAttention",
    "BlockSparse",
    "BlockSparseAttention",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "Causal",
    "ContextParallel",
    "Dilated",
    "DilatedAttention",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "DistributedMultiheadDilatedAttention",
    "Documents",
    "Explanation",
    "Full",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "InvalidInput",
    "LongNet",
    "LongNetEncoder",
    "LongNetLM",
    "MultiheadAdaptiveSparseAttention",
    "MultiheadBlockSparseAttention",
    "MultiheadDilatedAttention",
    "NoBackend",
    "Pattern",
    "Relative",
    "RingDilatedAttention",
    "RingMultiheadDilatedAttention",
    "Selector",
    "Softcap",
    "SparsePatternConfig",
    "TorchscaleCompat",
    "Window",
    "attend",
    "context_parallel_attend",
    "create_adaptive_sparse_attention",
    "create_attention_from_preset",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    "explain",
    "hilbert_order",
    "longnet",
    "longnet_attention",
    "merge",
    "reference_attention",
    "register_attention",
    "register_multihead_attention",
    "suggest_branches",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
