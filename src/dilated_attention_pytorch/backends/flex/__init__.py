"""PyTorch's FlexAttention: any pattern as tables that its kernels read."""

from dilated_attention_pytorch.backends.flex.backend import FlexBackend, FlexOptions

__all__ = ["FlexBackend", "FlexOptions"]
