"""PyTorch's own fused kernels, called on the pieces of a strided plan."""

from dilated_attention_pytorch.backends.sdpa.backend import SdpaBackend

__all__ = ["SdpaBackend"]
