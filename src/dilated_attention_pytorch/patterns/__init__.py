"""Who sees whom: counts from positions. A pattern knows no device, no rank and no length of the tensors."""

from dilated_attention_pytorch.patterns.base import Branch, Pattern, pattern_from_text
from dilated_attention_pytorch.patterns.blocks import BlockSparse
from dilated_attention_pytorch.patterns.dilated import Dilated, longnet
from dilated_attention_pytorch.patterns.documents import Documents
from dilated_attention_pytorch.patterns.heads import SomeHeads, some_heads
from dilated_attention_pytorch.patterns.layouts import (
    axial,
    dilated_sparse,
    global_local,
    hierarchical,
    hybrid,
    local_window,
    random_blocks,
    strided,
)
from dilated_attention_pytorch.patterns.simple import Causal, Full, Window

__all__ = [
    "BlockSparse",
    "Branch",
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "Pattern",
    "SomeHeads",
    "Window",
    "axial",
    "dilated_sparse",
    "global_local",
    "hierarchical",
    "hybrid",
    "local_window",
    "longnet",
    "pattern_from_text",
    "random_blocks",
    "some_heads",
    "strided",
]
