"""What a dense kernel is: out and lse forward, gradients from a global out and lse backward.

Tensors are (batch, heads, N, D). Every query row sees at least one key, causal problems are square, no length is 0, the
last dim has stride 1 and Dv equals D: pieces are made so, since the kernels fail silently otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib.util import find_spec
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.plans.strided import Band
from dilated_attention_pytorch.problem import Problem

Mask: TypeAlias = "Tensor | Band | None"
"""An additive float mask that broadcasts to the logits, or the band itself for kernels that take windows."""


class Kernel(ABC):
    """One dense kernel of a library. ``mask`` is a Band only where `takes_bands` is true."""

    name: ClassVar[str]
    takes_bands: ClassVar[bool] = False
    columns: ClassVar[int] = 8
    """Columns by which D grows when a gradient of lse is given: what keeps rows aligned as the kernel asks."""
    max_head_dim: ClassVar[int | None] = None
    max_batch: ClassVar[int | None] = 65535
    """Most (batch x heads) of a call: CUDA's bound on the second and third dims of a launch."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """(out, lse (batch, heads, N)); lse is the natural logarithm, in the accumulate dtype."""

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
        mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this problem's pairs; out and lse may be those of more keys."""


def window_of(band: Band, query_length: int, key_length: int) -> tuple[int, int]:
    """(left, right) as flash-attn counts them: row x sees keys from ``x + c - left`` to ``x + c + right``.

    ``c = key_length - query_length`` aligns the last row with the last key. A piece holds no row without a key, so
    neither is negative.

    Example:
        >>> window_of(Band(diagonal=4, size=5, is_causal=True), 8, 12)
        (4, 0)
    """
    shift = key_length - query_length
    ahead = 0 if band.is_causal else band.size - 1
    left, right = shift - band.diagonal + band.size - 1, band.diagonal + ahead - shift
    assert left >= 0
    assert right >= 0
    return left, right


def rows_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views (batch, N, heads, D) of (batch, heads, N, D), and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def aligned_mask(mask: Mask, q: Tensor, k: Tensor) -> Tensor | None:
    """An additive mask as memory-efficient attention takes it: for every head, its rows aligned to 16 bytes."""
    if mask is None:
        return None
    assert isinstance(mask, Tensor)
    width = k.shape[2]
    aligned = pad(mask.to(q.dtype), (0, -width % 8))[..., :width]
    return aligned.expand(q.shape[0], q.shape[1], q.shape[2], width)


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """A CUDA device's compute capability; None for other devices, meta among them."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def is_installed(package: str) -> bool:
    """Whether a top-level package can be found, without importing it; looked up once."""
    return find_spec(package) is not None


def shared_reasons(problem: Problem) -> list[str]:
    """What no dense kernel of a library can do for us."""
    d, dv = problem.q.shape[3], problem.v.shape[3]
    reasons = []
    if problem.dropout_p > 0:
        reasons.append("the fused kernels' dropout is not ours (one draw per pair); use backend='dense'")
    if problem.bias is not None:
        reasons.append("the fused kernels give no gradient of a bias; use backend='dense'")
    if problem.score is not None:
        reasons.append("the fused kernels have no score rules; use backend='dense'")
    if d != dv:
        reasons.append(f"Dv ({dv}) must equal D ({d}); use backend='dense'")
    if problem.scale <= 0:
        reasons.append(f"the fused kernels mask before they scale and need a scale above 0 ({problem.scale})")
    return reasons
