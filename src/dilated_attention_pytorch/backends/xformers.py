"""xFormers' memory-efficient attention on strided pieces (github.com/facebookresearch/xformers)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.backends.kernel import (
    Kernel,
    Mask,
    aligned_mask,
    cuda_capability,
    is_installed,
    rows_first,
    shared_reasons,
)
from dilated_attention_pytorch.backends.strided import StridedWalk
from dilated_attention_pytorch.plans import Plan, StridedPlan
from dilated_attention_pytorch.problem import Problem

INSTALL = "pip install xformers"


class XformersKernel(Kernel):
    """``xformers.ops.memory_efficient_attention_*``; xFormers itself picks the operator below them."""

    name = "memory_efficient_attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        ops = import_module("xformers.ops")
        out, lse = ops.memory_efficient_attention_forward_requires_grad(
            *rows_first(q, k, v), attn_bias=_bias(ops, is_causal, mask, q, k), p=0.0, scale=scale
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[2]]  # some operators pad the rows

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
        ops = import_module("xformers.ops")
        grad, query, key, value, output = rows_first(dout, q, k, v, out)
        dq, dk, dv = ops.memory_efficient_attention_backward(
            grad,
            output,
            lse.contiguous(),
            query,
            key,
            value,
            attn_bias=_bias(ops, is_causal, mask, q, k),
            p=0.0,
            scale=scale,
        )
        dq, dk, dv = rows_first(dq, dk, dv)
        return dq, dk, dv


class XformersBackend(Backend):
    """xFormers' memory-efficient attention, one call per piece of a StridedPlan.

    Its kernels round the results of a piece, so those of a partial problem are sums of rounded pieces in float32.
    """

    name = "xformers"
    plans = (StridedPlan,)

    def import_error(self) -> str | None:
        return None if is_installed("xformers") else f"xformers is not installed: {INSTALL}"

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        reasons = shared_reasons(problem)
        dtype, head_dim = problem.q.dtype, problem.q.shape[3]
        kind = str(dtype).removeprefix("torch.")
        if dtype == torch.float64:
            reasons.append("xformers computes float16, bfloat16 and float32 only, not float64; use backend='dense'")
        multiple = 4 if dtype == torch.float32 else 8
        if head_dim % multiple != 0:
            reasons.append(f"head_dim {head_dim} is not a multiple of {multiple}, as {kind} needs; use backend='dense'")
        capability = cuda_capability(problem.q.device)
        if capability is None:
            reasons.append(f"xformers runs on CUDA devices only, not on {problem.q.device.type}; use backend='sdpa'")
        elif dtype == torch.bfloat16 and capability < (8, 0):
            reasons.append("bfloat16 needs a CUDA device of capability 8.0 or later; use float16")
        if problem.needs_grad and torch.are_deterministic_algorithms_enabled():
            reasons.append("xformers' backward is not deterministic; use backend='dense', or allow it in torch")
        if not reasons:
            try:
                import_module("xformers.ops")
            except ImportError as error:  # built for another torch
                reasons.append(f"xformers does not import ({error}); {INSTALL}")
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        assert isinstance(plan, StridedPlan)
        return StridedWalk(XformersKernel(), problem.q.dtype).forward(problem, plan)

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        assert isinstance(plan, StridedPlan)
        return StridedWalk(XformersKernel(), problem.q.dtype).backward(problem, plan, dout, dlse, out, lse)


def _bias(ops: Any, is_causal: bool, mask: Mask, q: Tensor, k: Tensor) -> Any:
    """What ``attn_bias`` takes: its causal mask, an additive mask, or None."""
    return ops.LowerTriangularMask() if is_causal else aligned_mask(mask, q, k)
