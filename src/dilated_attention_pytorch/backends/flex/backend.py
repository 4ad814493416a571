"""PyTorch's FlexAttention on tables of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients, Options
from dilated_attention_pytorch.backends.flex.kernel import flex
from dilated_attention_pytorch.backends.flex.tables import row_positions, table_bytes, tables_of
from dilated_attention_pytorch.backends.ordered import backward_in_order, forward_in_order
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.plans import Plan, TilePlan, TileRanges
from dilated_attention_pytorch.plans.orders import OrderedPlan, chosen_rows
from dilated_attention_pytorch.problem import Problem
from dilated_attention_pytorch.scores import score_from_text

EAGER_PAIRS = 1 << 26
"""Eager flex_attention holds several numbers for every pair of rows; up to so many pairs it is allowed to."""
TABLE_LIMIT = 1 << 30
"""The most that the block lists of one plan may take (bytes)."""
LEAST_DIM = 16
"""The smallest head dim of FlexAttention's GPU kernels."""
GPU_BLOCK = 128
"""FlexAttention's GPU kernels step through blocks by tiles that divide this (rows)."""


@dataclass(frozen=True)
class FlexOptions(Options):
    """``compiled``: True for generated kernels, False for PyTorch's eager reference, None for kernels where they give
    out, lse and gradients (CUDA, XPU) and eager on the CPU.
    """

    compiled: bool | None = None

    def __post_init__(self) -> None:
        if self.compiled not in (None, True, False):
            raise InvalidInput(f"FlexOptions: expected compiled to be True, False or None. Got {self.compiled!r}.")


class FlexBackend(Backend):
    """Any pattern through FlexAttention: counts as score_mod and mask_mod, tiles as its BlockMask.

    Its kernels round their results, so those of a partial problem are rounded numbers in float32.

    Example:
        >>> from dilated_attention_pytorch.patterns import Causal
        >>> from dilated_attention_pytorch.plans import tile_plan
        >>> from dilated_attention_pytorch.problem import make_problem
        >>> x = torch.zeros(1, 3, 1, 2)
        >>> problem = make_problem(x, x, x, scale=1.0, query_start=0)
        >>> out, lse = FlexBackend().forward(problem, tile_plan(Causal(), problem))
        >>> lse.exp().flatten().round().tolist()
        [1.0, 2.0, 3.0]
    """

    name = "flex"
    plans = (OrderedPlan, TilePlan)
    options_type = FlexOptions
    options: FlexOptions

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        reasons = self.reasons_against_out(problem, plan)
        if _kind(problem) == "cpu":
            if self._compiles(problem):
                reasons.append(
                    "torch compiles FlexAttention on the CPU without lse, which attend returns; "
                    "use FlexOptions(compiled=False), or FlexBackend.out for out alone"
                )
            if problem.needs_grad:
                reasons.append(
                    "FlexAttention has no backward on the CPU; call under torch.no_grad() or use backend='sdpa'"
                )
        return reasons

    def reasons_against_out(self, problem: Problem, plan: Plan) -> list[str]:
        """Why `out` cannot compute this plan for this problem; empty means it can."""
        p, kind, reasons = problem, _kind(problem), []
        if kind not in ("cpu", "cuda", "xpu"):
            reasons.append(f"FlexAttention serves cpu, cuda and xpu here, not {kind}; use backend='dense'")
        if p.bias is not None:
            reasons.append("a bias has no place in its tables; use backend='dense'")
        if p.dropout_p > 0:
            reasons.append(f"no dropout (dropout_p is {p.dropout_p}); use backend='dense'")
        if self._compiles(p):
            reasons.extend(_reasons_against_compiled(p))
        else:
            pairs = p.batch * p.num_heads * p.query_length * p.key_length
            if pairs > EAGER_PAIRS:
                reasons.append(
                    f"eager FlexAttention holds all {pairs:,} pairs at once (limit {EAGER_PAIRS:,}); "
                    "use FlexOptions(compiled=True) where a kernel exists, or backend='sdpa'"
                )
        tiles, least = plan.tiles if isinstance(plan, OrderedPlan) else plan, self._least_block(p)
        assert isinstance(tiles, TilePlan | TileRanges)
        if chosen_rows(plan.pattern) is not None and least > tiles.block_size[0] and tiles.grid[2] > 1:
            reasons.append(
                f"its kernels would join {tiles.block_size[0]} rows with those of another choice, to {least}, and sum "
                f"them in another order; choose for blocks of a multiple of {least} rows or use backend='triton'"
            )
        size = table_bytes(tiles, least, p.needs_grad)
        if size > TABLE_LIMIT:
            reasons.append(
                f"its block lists would take {size >> 20} MiB (limit {TABLE_LIMIT >> 20}); "
                "plan with larger blocks or use backend='sdpa'"
            )
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        if isinstance(plan, OrderedPlan):
            return forward_in_order(self, problem, plan)
        if problem.key_length == 0:
            return _nothing_seen(problem)
        out, found = self._call(problem, plan, (problem.q, problem.k, problem.v))
        assert found is not None
        return out.to(problem.result_dtype), found.to(problem.accumulate_dtype).contiguous()

    def out(self, problem: Problem, plan: Plan) -> Tensor:
        """Out (B, Nq, H, Dv) alone, for inference: lse is not computed, so compiled kernels serve the CPU too.

        `reasons_against_out` says what it cannot do.
        """
        if isinstance(plan, OrderedPlan):
            placed = plan.order.applied(problem)
            outs = (self.out(placed, tiles) for tiles in plan.parts())
            return plan.order.restored_queries(reduce(torch.add, outs), 1)  # each row is 0 in all but one
        if problem.key_length == 0:
            return _nothing_seen(problem)[0].to(problem.q.dtype)
        return self._call(problem, plan, (problem.q, problem.k, problem.v), with_lse=False)[0]

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Runs the forward pass again under autograd. The plan's own (out', lse') may be a part of the global ones:
        with w = exp(lse' - lse), autograd is given ``w dout`` for out' and ``w (dout (out' - out) + dlse)`` for lse',
        which are the derivatives of the merge.
        """
        if isinstance(plan, OrderedPlan):
            return backward_in_order(self, problem, plan, dout, dlse, out, lse)
        if problem.key_length == 0:
            dq, dk, dv = (x.new_zeros(x.shape, dtype=problem.result_dtype) for x in _leaves(problem))
            return Gradients(dq, dk, dv)
        dtype = problem.accumulate_dtype
        with _recording():
            leaves = [x.detach().requires_grad_() for x in _leaves(problem)]
            own_out, own_lse = self._call(problem, plan, leaves)
            assert own_lse is not None
        with torch.no_grad():
            share = torch.where(own_lse > -torch.inf, torch.exp(own_lse.to(dtype) - lse), 0)
            share = share.masked_fill(lse == -torch.inf, 0)
            grad = dout.to(dtype)
            grad_lse = (grad * (own_out.detach().to(dtype) - out.to(dtype))).sum(-1).transpose(1, 2)
            grad_lse = share * (grad_lse if dlse is None else grad_lse + dlse.to(dtype))
            grad_out = (share.transpose(1, 2).unsqueeze(-1) * grad).to(own_out.dtype)
        with _recording():
            grads = torch.autograd.grad((own_out, own_lse), leaves, (grad_out, grad_lse.to(own_lse.dtype)))
        dq, dk, dv = (x.to(problem.result_dtype).contiguous() for x in grads)
        return Gradients(dq, dk, dv)

    def _call(
        self, problem: Problem, plan: Plan, tensors: Sequence[Tensor], with_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        p = problem
        q, k, v = (x.contiguous() for x in tensors)  # one layout, so that strides ask for no further kernels
        assert isinstance(plan, TilePlan)
        tables = tables_of(plan, self._least_block(p), q.requires_grad)
        score, rows = p.score, None
        if score is not None:
            score = score_from_text(score.text, [t.to(p.q.device, p.accumulate_dtype) for t in score.tables])
            rows = (row_positions(p.query_positions, q.device), row_positions(p.key_positions, q.device))
        compiled = self._compiles(p)
        out, lse = flex(q, k, v, tables, scale=p.scale, score=score, rows=rows, with_lse=with_lse, compiled=compiled)
        return out.transpose(1, 2).contiguous(), lse

    def _compiles(self, problem: Problem) -> bool:
        return _kind(problem) != "cpu" if self.options.compiled is None else self.options.compiled

    def _least_block(self, problem: Problem) -> int:
        return GPU_BLOCK if _kind(problem) != "cpu" and self._compiles(problem) else 1


def _kind(problem: Problem) -> str:
    return "cpu" if problem.q.device.type == "meta" else problem.q.device.type


def _leaves(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.q, problem.k, problem.v


def _nothing_seen(problem: Problem) -> tuple[Tensor, Tensor]:
    p = problem
    out = p.q.new_zeros((p.batch, p.query_length, p.num_heads, p.v.shape[3]), dtype=p.result_dtype)
    lse = p.q.new_full((p.batch, p.num_heads, p.query_length), -torch.inf, dtype=p.accumulate_dtype)
    return out, lse


def _reasons_against_compiled(problem: Problem) -> list[str]:
    p, reasons = problem, []
    if p.q.dtype == torch.float64:
        reasons.append("FlexAttention compiles no float64; cast to float32 or use FlexOptions(compiled=False)")
    if _kind(p) == "cpu":
        if not torch.cpu._is_avx2_supported():
            reasons.append("torch compiles FlexAttention on CPUs with AVX2 only; use FlexOptions(compiled=False)")
        return reasons
    if find_spec("triton") is None:
        reasons.append("Triton is missing; pip install dilated-attention-pytorch[triton]")
    smallest = min(p.q.shape[3], p.v.shape[3])
    if smallest < LEAST_DIM:
        reasons.append(f"compiled FlexAttention needs head dims of at least {LEAST_DIM}, got {smallest}; pad them")
    return reasons


@contextmanager
def _recording() -> Iterator[None]:
    """Within it autograd records, also inside a custom operator, whose body runs below autograd."""
    guard, keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    with guard(keys.AutogradFunctionality, False), guard(keys.ADInplaceOrView, False), torch.enable_grad():
        yield
