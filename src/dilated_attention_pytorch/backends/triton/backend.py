"""The backend of the Triton kernels: reasons, options, and the calls of forward and backward."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.backends.ordered import backward_in_order, forward_in_order
from dilated_attention_pytorch.backends.triton.arguments import arithmetic, common_arguments, strides, unit_stride
from dilated_attention_pytorch.backends.triton.calls import calls, run, statistics_call
from dilated_attention_pytorch.backends.triton.config import TritonOptions, family_of
from dilated_attention_pytorch.memory import empty
from dilated_attention_pytorch.plans import OrderedPlan, Plan, StridedPlan, TilePlan
from dilated_attention_pytorch.problem import Problem
from dilated_attention_pytorch.scores import Relative

LONGEST = 1 << 29
"""Positions stay below this, so that int32 arithmetic on them cannot overflow."""
GRID_LIMIT = 65535
"""CUDA's limit for the second and third axis of a grid."""


class TritonBackend(Backend):
    """Kernels of our own in Triton: q, k and v are read in place, and no branch's own result is ever stored.

    One source serves CUDA, ROCm and XPU. With TRITON_INTERPRET=1 set before Python starts, the same kernels run on CPU
    tensors, slowly; that is how they are tested where there is no GPU.
    """

    name = "triton"
    plans = (StridedPlan, OrderedPlan, TilePlan)
    options_type = TritonOptions
    options: TritonOptions

    def import_error(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'dilated-attention-pytorch[triton]'"
        return None

    def candidates(self, problem: Problem) -> tuple[TritonOptions, ...]:
        """The table's choice, the other ways to split branches into launches, and neighbours of its tiles."""
        head_dim = max(problem.q.shape[3], problem.v.shape[3])
        first = self.options.blocks(family_of(problem.q.device), "list", arithmetic(problem), head_dim)
        found = [self.options, *(replace(self.options, split=split) for split in ("together", "apart"))]
        for block_m, block_n, num_warps in (
            (first.block_m, min(2 * first.block_n, 128), first.num_warps),
            (min(2 * first.block_m, 256), first.block_n, 8),
            (first.block_m, first.block_n, 12 - first.num_warps if first.num_warps in (4, 8) else first.num_warps),
        ):
            found.append(replace(self.options, block_m=block_m, block_n=block_n, num_warps=num_warps))
        found.append(replace(self.options, backward_block_m=64, backward_block_n=64, backward_num_warps=4))
        return tuple(dict.fromkeys(found))

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        p = problem
        reasons = _device_reasons(p)
        if p.q.dtype == torch.float64:
            reasons.append("float64 has no kernel here; use backend='sdpa'")
        for name, size in (("D", p.q.shape[3]), ("Dv", p.v.shape[3])):
            if size > 256:
                reasons.append(f"{name} ({size}) must be at most 256; use backend='dense'")
        if p.bias is not None:
            reasons.append(
                "the kernels take no bias tensor; use backend='dense', or score=Relative for a bias of i - j"
            )
        if p.dropout_p > 0 and p.of_heads is not None:
            reasons.append("the kernels number the heads of dropout from 0; use backend='dense' for a slice of heads")
        if p.score is not None and not isinstance(p.score, Relative):
            reasons.append(f"the kernels have no score rule {type(p.score).__name__}; use backend='dense'")
        last = max((run.start + run.step * run.length for run in (*p.query_positions, *p.key_positions)), default=0)
        if last > LONGEST:
            reasons.append(f"positions ({last}) must stay below {LONGEST}; split the keys and merge() the parts")
        if p.batch > GRID_LIMIT or p.num_heads > GRID_LIMIT:
            reasons.append(
                f"samples ({p.batch}) and heads ({p.num_heads}) must be at most {GRID_LIMIT}; split the batch"
            )
        if isinstance(plan, TilePlan) and any(size < 16 or size & (size - 1) for size in plan.block_size):
            reasons.append(f"blocks {plan.block_size} must be powers of two from 16; plan with such a block_size")
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        if isinstance(plan, OrderedPlan):
            return forward_in_order(self, problem, plan)
        p, common = problem, common_arguments(problem, interpreting())
        out = empty((p.batch, p.query_length, p.num_heads, p.v.shape[3]), p.result_dtype, p.q.device)
        lse = empty((p.batch, p.num_heads, p.query_length), torch.float32, p.q.device)
        for call in calls(p, plan, "forward", self.options):
            run(_kernel(call.kernel), p, call.grid, common | call.arguments | {"OUT": out, "LSE": lse})
        return out, lse

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        if isinstance(plan, OrderedPlan):
            return backward_in_order(self, problem, plan, dout, dlse, out, lse)
        p, common = problem, common_arguments(problem, interpreting())
        dout = unit_stride(dout)
        call = statistics_call(p, unit_stride(out), lse, dout, dlse)
        run(_kernel(call.kernel), p, call.grid, call.arguments)
        common |= {"DOUT": dout, **strides("g", dout)} | {name: call.arguments[name] for name in ("ORIGIN", "DELTA")}
        dq, dk, dv = (empty(x.shape, p.result_dtype, x.device) for x in (p.q, p.k, p.v))
        common |= {"DQ": dq, "DK": dk, "DV_OUT": dv, "softmax_scale": p.scale}
        for task in ("queries", "keys"):
            for call in calls(p, plan, task, self.options):
                run(_kernel(call.kernel), p, call.grid, common | call.arguments)
        return Gradients(dq, dk, dv)


def _kernel(name: str) -> Any:
    """A kernel by its name; Triton is imported when the first is asked for."""
    kind = "forward" if name.startswith("forward") else "backward"
    return getattr(importlib.import_module(f"dilated_attention_pytorch.backends.triton.{kind}"), name)


def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on the CPU.

    Asked for every problem on a CPU, it imports Triton only where that variable is set.
    """
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if not asked or importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped, import-not-found]

    return isinstance(_kernel("forward_list"), InterpretedFunction)


def _device_reasons(problem: Problem) -> list[str]:
    device = problem.q.device
    if device.type == "cpu":
        if interpreting():
            return []
        return ["the kernels run on cuda and xpu devices, not on cpu; move the tensors there, or use backend='sdpa'"]
    if device.type not in ("cuda", "xpu"):
        return [f"the kernels run on cuda and xpu devices, not on {device.type}; use backend='dense'"]
    if device.type == "cuda" and torch.version.hip is None and problem.q.dtype == torch.bfloat16:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            name = ".".join(map(str, capability))
            return [f"bfloat16 needs compute capability 8.0 or higher, this GPU has {name}; use float16"]
    return []
