"""PyTorch's fused dense kernels behind one face: out and lse forward, gradients from a global out and lse backward.

Tensors are (batch, heads, N, D). Every query row sees at least one key, causal problems are square, no length is 0, the
last dim has stride 1 and Dv equals D: pieces are made so, since the kernels fail silently otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

aten = torch.ops.aten


class Kernel(ABC):
    """One fused kernel of PyTorch's."""

    name: ClassVar[str]

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse (batch, heads, N)); ``mask`` is an additive float mask that broadcasts to the logits."""

    @abstractmethod
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        is_causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this problem's pairs; out and lse may be those of more keys."""


class CpuFlash(Kernel):
    """``aten::_scaled_dot_product_flash_attention_for_cpu``: float32 and float64 at full rate, half types slower."""

    name = "flash_attention_for_cpu"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        is_causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv


class CudaFlash(Kernel):
    """``aten::_scaled_dot_product_flash_attention``: half types on Ampere and later, without masks."""

    name = "flash_attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert mask is None
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        is_causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert mask is None
        rng = torch.empty(2, dtype=torch.uint64, device=q.device)
        nothing = torch.empty((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, rng, nothing, scale=scale
        )
        return dq, dk, dv


class CudaEfficient(Kernel):
    """``aten::_scaled_dot_product_efficient_attention``: float32 and half types on every CUDA device, with masks."""

    name = "efficient_attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, self._bias(mask, q, k), True, 0.0, is_causal, scale=scale
        )
        return out, lse[:, :, : q.shape[2]]  # the kernel pads rows to a multiple of 32

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        is_causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32))
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout,
            q,
            k,
            v,
            self._bias(mask, q, k),
            out,
            padded,
            zero,
            zero,
            0.0,
            [True, True, True, False],
            is_causal,
            scale=scale,
        )
        return dq, dk, dv

    @staticmethod
    def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask for every head, its rows aligned to 16 bytes as the kernel asks."""
        if mask is None:
            return None
        width = k.shape[2]
        aligned = torch.nn.functional.pad(mask.to(q.dtype), (0, -width % 8))[..., :width]
        return aligned.expand(q.shape[0], q.shape[1], q.shape[2], width)


def choose_kernel(
    device_type: str, dtype: torch.dtype, head_dim: int, has_masks: bool, capability: tuple[int, int] | None = None
) -> Kernel | str:
    """The kernel for this device and dtype, or the reason why there is none. ``capability`` is a CUDA device's.

    Example:
        >>> choose_kernel("cpu", torch.float32, 64, False).name
        'flash_attention_for_cpu'
        >>> choose_kernel("cuda", torch.float64, 64, False, (9, 0))
        "PyTorch has no fused float64 kernel on CUDA; use backend='dense'"
    """
    if device_type == "cpu":
        return CpuFlash()
    if device_type != "cuda":
        return f"no fused kernel of PyTorch's that returns an lse is known for {device_type}; use backend='dense'"
    if dtype == torch.float64:
        return "PyTorch has no fused float64 kernel on CUDA; use backend='dense'"
    half = dtype in (torch.float16, torch.bfloat16)
    major = (capability or (0, 0))[0]
    if half and major >= 8 and head_dim % 8 == 0 and head_dim <= 256 and not has_masks:
        return CudaFlash()
    if dtype == torch.bfloat16 and major < 8:
        return "bfloat16 needs a CUDA device of capability 8.0 or later; use float16 or backend='dense'"
    if head_dim % (8 if half else 4) != 0:
        return f"head_dim {head_dim} is not a multiple of {8 if half else 4}, which the CUDA kernels need"
    return CudaEfficient()
