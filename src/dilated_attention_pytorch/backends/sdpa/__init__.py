"""PyTorch's own fused kernels, called on the pieces of a strided plan."""

from dilated_attention_pytorch.backends.sdpa.backend import SdpaBackend, SdpaOptions

__all__ = ["SdpaBackend", "SdpaOptions"]
