"""PyTorch's fused dense kernels behind the face of `Kernel`, and the choice among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.kernel import Kernel, Mask, aligned_mask, rows_first, window_of
from dilated_attention_pytorch.plans.strided import Band

aten = torch.ops.aten

CUDNN_ROWS = 512
"""Shortest queries and keys for cuDNN (tokens): it plans every new shape anew, and short pieces differ the most."""


class CpuFlash(Kernel):
    """``aten::_scaled_dot_product_flash_attention_for_cpu``: float32 and float64 at full rate, half types slower."""

    name = "flash_attention_for_cpu"
    columns = 1
    max_batch = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
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
        mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv


class CudaFlash(Kernel):
    """``aten::_flash_attention_forward``: half types on Ampere and later, D up to 256, with windows, without masks."""

    name = "flash_attention"
    takes_bands = True
    max_head_dim = 256

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        nq, nk = q.shape[2], k.shape[2]
        out, lse, *_ = aten._flash_attention_forward(
            *rows_first(q, k, v), None, None, nq, nk, 0.0, is_causal, False, scale=scale, **_window(mask, nq, nk)
        )
        return out.transpose(1, 2), lse[:, :, :nq]

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
        mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        nq, nk = q.shape[2], k.shape[2]
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            *rows_first(dout, q, k, v, out),
            lse.contiguous(),  # its rows are found by arithmetic, not by strides
            None,
            None,
            nq,
            nk,
            0.0,
            is_causal,
            rng,
            rng[:0],
            scale=scale,
            **_window(mask, nq, nk),
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class CudaCudnn(Kernel):
    """``aten::_scaled_dot_product_cudnn_attention``: half types on Hopper and Blackwell, D up to 128, without masks."""

    name = "cudnn_attention"
    max_head_dim = 128

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        assert mask is None
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
        return out, lse.reshape(q.shape[:3])  # (batch, heads, N, 1)

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
        mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert mask is None
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous().unsqueeze(-1),
            zero,
            zero,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            is_causal,
            scale=scale,
        )
        return dq, dk, dv


class CudaEfficient(Kernel):
    """``aten::_scaled_dot_product_efficient_attention``: float32 and half types on every CUDA device, with masks."""

    name = "efficient_attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, aligned_mask(mask, q, k), True, 0.0, is_causal, scale=scale
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
        mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # as its forward pads
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout,
            q,
            k,
            v,
            aligned_mask(mask, q, k),
            out,
            padded.contiguous(),
            zero,
            zero,
            0.0,
            [True, True, True, False],
            is_causal,
            scale=scale,
        )
        return dq, dk, dv


def _window(mask: Mask, query_length: int, key_length: int) -> dict[str, int]:
    if mask is None:
        return {}
    assert isinstance(mask, Band)
    left, right = window_of(mask, query_length, key_length)
    return {"window_size_left": left, "window_size_right": right}


class Need(NamedTuple):
    """What the pieces of a plan ask of a kernel.

    ``masks`` is additive masks, ``shortest`` the least number of queries or keys of a piece (tokens).
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    masks: bool = False
    bands: bool = False
    shortest: int = CUDNN_ROWS
    capability: tuple[int, int] = (0, 0)
    is_rocm: bool = False
    deterministic: bool = False


def choose_kernel(need: Need, wanted: str = "auto") -> Kernel | str:
    """The kernel that serves this need, or the reason why there is none; ``wanted`` names one on CUDA.

    Example:
        >>> choose_kernel(Need("cpu", torch.float32, 64)).name
        'flash_attention_for_cpu'
        >>> choose_kernel(Need("cuda", torch.float16, 64, capability=(9, 0))).name
        'cudnn_attention'
        >>> choose_kernel(Need("cuda", torch.float64, 64, capability=(9, 0)))
        "PyTorch has no fused float64 kernel on CUDA; use backend='dense'"
    """
    if need.device_type == "cpu":
        return CpuFlash()
    if need.device_type != "cuda":
        return f"no fused kernel of PyTorch's that returns an lse is known for {need.device_type}; use backend='dense'"
    if need.dtype == torch.float64:
        return "PyTorch has no fused float64 kernel on CUDA; use backend='dense'"
    if need.dtype == torch.bfloat16 and need.capability < (8, 0):
        return "bfloat16 needs a CUDA device of capability 8.0 or later; use float16 or backend='dense'"
    multiple = 4 if need.dtype == torch.float32 else 8
    if need.head_dim % multiple != 0:
        return f"head_dim {need.head_dim} is not a multiple of {multiple}, which the CUDA kernels need"
    for kernel, against in ((CudaCudnn(), _against_cudnn(need)), (CudaFlash(), _against_flash(need))):
        if wanted in ("auto", kernel.name) and against is None:
            return kernel
        if wanted == kernel.name:
            return f"{kernel.name}: {against}; use SdpaOptions(kernel='auto')"
    return CudaEfficient()


def _against_flash(need: Need) -> str | None:
    if need.dtype == torch.float32 or need.capability < (8, 0):
        return "needs float16 or bfloat16 and a CUDA device of capability 8.0 or later"
    if need.masks:
        return "has no masks"
    if need.bands and need.is_rocm:
        return "has windows on NVIDIA's devices only"
    if need.head_dim > 256:
        return f"needs a head_dim of at most 256 ({need.head_dim})"
    if 192 < need.head_dim <= 224 and need.capability not in ((8, 0), (9, 0), (10, 0)):
        return f"its backward lacks head_dim {need.head_dim} on capability {need.capability}"
    return None


def _against_cudnn(need: Need) -> str | None:
    if need.is_rocm or need.dtype == torch.float32 or need.capability[0] not in (9, 10):
        return "needs float16 or bfloat16 on a CUDA device of capability 9 or 10"
    if need.deterministic:
        return "is not deterministic, which torch.use_deterministic_algorithms asks for"
    if need.masks or need.bands:
        return "is used without masks and windows only"
    if need.head_dim > 128:
        return f"needs a head_dim of at most 128 ({need.head_dim})"
    if need.shortest < CUDNN_ROWS:
        return f"is used for pieces of at least {CUDNN_ROWS} tokens ({need.shortest})"
    return None
