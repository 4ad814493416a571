"""Kernels of our own in Triton, for CUDA, ROCm and XPU from one source. Triton itself is imported at first use."""

from dilated_attention_pytorch.backends.triton.backend import TritonBackend
from dilated_attention_pytorch.backends.triton.config import TritonOptions

__all__ = ["TritonBackend", "TritonOptions"]
