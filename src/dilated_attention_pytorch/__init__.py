"""Long-context attention that is exact, on any device, at any length: LongNet's dilated attention and its relatives."""

from dilated_attention_pytorch.attention import attend, longnet_attention
from dilated_attention_pytorch.compat import TorchscaleCompat
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.explanation import Explanation, explain
from dilated_attention_pytorch.merging import merge
from dilated_attention_pytorch.patterns import Causal, Dilated, Documents, Full, Pattern, Window, longnet
from dilated_attention_pytorch.reference import reference_attention
from dilated_attention_pytorch.scores import Relative, Softcap

__version__ = "0.3.0"

__all__ = [
    "Causal",
    "Dilated",
    "Documents",
    "Explanation",
    "Full",
    "InvalidInput",
    "NoBackend",
    "Pattern",
    "Relative",
    "Softcap",
    "TorchscaleCompat",
    "Window",
    "attend",
    "explain",
    "longnet",
    "longnet_attention",
    "merge",
    "reference_attention",
]
