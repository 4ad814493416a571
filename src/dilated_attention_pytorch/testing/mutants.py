"""Wrong backends. Each breaks one thing that others have got wrong, and the contract must fail each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.backends import Backend, DenseBackend, Gradients
from dilated_attention_pytorch.compat import branch_patterns
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import empty
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import Index
from dilated_attention_pytorch.plans import DensePlan, Plan
from dilated_attention_pytorch.problem import Problem


class HeadLeftZero(DenseBackend):
    """Never writes the last head (one known library leaves two of its twelve default heads zero)."""

    name = "head_left_zero"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(problem, plan)
        out[:, :, -1] = 0
        return out, lse


class ScaleForgotten(DenseBackend):
    """Computes softmax(q k^T) v."""

    name = "scale_forgotten"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        return super().forward(replace(problem, scale=1.0), plan)

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        return super().backward(replace(problem, scale=1.0), plan, dout, dlse, out, lse)


@dataclass(frozen=True, eq=False)
class _Union(Pattern):
    inner: Pattern

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return (self.inner.count(head, num_heads, q, k) > 0) * 1


class UnionForSum(DenseBackend):
    """Sees a key once however many branches bring it."""

    name = "union_for_sum"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        return super().forward(problem, DensePlan(_Union(plan.pattern)))

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        return super().backward(problem, DensePlan(_Union(plan.pattern)), dout, dlse, out, lse)


def _branch_plans(plan: Plan) -> list[DensePlan]:
    try:
        return [DensePlan(p) for p in branch_patterns(plan.pattern)]
    except InvalidInput:  # not LongNet's: one branch
        return [DensePlan(plan.pattern)]


class MeanForMerge(DenseBackend):
    """Takes the mean of the branches' outputs instead of weighing them by their denominators."""

    name = "mean_for_merge"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        _, lse = super().forward(problem, plan)
        outs = [super(MeanForMerge, self).forward(problem, p)[0] for p in _branch_plans(plan)]
        return torch.stack(outs).mean(0), lse


class DetachedMerge(DenseBackend):
    """Lets no gradient flow through the weights of the branches, as torchscale does."""

    name = "detached_merge"

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        branches = _branch_plans(plan)
        if len(branches) == 1:
            return super().backward(problem, plan, dout, dlse, out, lse)
        total: Gradients | None = None
        for branch in branches:
            branch_out, _ = super().forward(problem, branch)
            share = super().backward(problem, branch, dout, dlse, branch_out, lse)
            total = share if total is None else total.plus(share)
        assert total is not None
        return total


class OwnDenominator(DenseBackend):
    """Differentiates with the part's own out and lse instead of the global ones it is given (wrong in a ring)."""

    name = "own_denominator"

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        return super().backward(problem, plan, dout, dlse, *super().forward(problem, plan))


class DividedBySum(DenseBackend):
    """Divides outputs by their sum over tokens, as versions 0.1 and 0.2 did; it leaks the future."""

    name = "divided_by_sum"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(problem, plan)
        return out / out.sum(1, keepdim=True), lse


class Offsets32(DenseBackend):
    """Computes the element offset of a row in 31 bits (a real kernel would read wild memory; this wraps around)."""

    name = "offsets_32"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        return super().forward(_wrapped(problem), plan)

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        return super().backward(_wrapped(problem), plan, dout, dlse, out, lse)


def _wrapped(problem: Problem) -> Problem:
    def rows(x: Tensor) -> Tensor:
        b, n, h, d = x.shape
        if n * x.stride(1) < 2**31:
            return x
        starts = (x.storage_offset() + i * x.stride(1) % 2**31 for i in range(n))
        return torch.cat([x.as_strided((b, 1, h, d), x.stride(), start) for start in starts], 1)

    return replace(problem, q=rows(problem.q), k=rows(problem.k), v=rows(problem.v))


class PaddingIgnored(DenseBackend):
    """Sees padded keys."""

    name = "padding_ignored"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        return super().forward(replace(problem, key_lengths=None), plan)


class InputScaledInPlace(DenseBackend):
    """Saves a buffer by scaling q where it stands."""

    name = "input_scaled_in_place"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        problem.q.mul_(problem.scale)
        return super().forward(replace(problem, scale=1.0), plan)


class RowsLeftUnwritten(DenseBackend):
    """Leaves rows that see no key as the allocator gave them."""

    name = "rows_left_unwritten"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(problem, plan)
        rows = (lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
        return torch.where(rows, empty(out.shape, out.dtype, out.device), out).contiguous(), lse


class LseGradientDropped(DenseBackend):
    """Differentiates out only."""

    name = "lse_gradient_dropped"

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        return super().backward(problem, plan, dout, None, out, lse)


class LseInBits(DenseBackend):
    """Gives lse to base 2, as kernels keep it inside."""

    name = "lse_in_bits"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(problem, plan)
        return out, lse / torch.log(torch.tensor(2.0))


class HalfPrecisionSums(DenseBackend):
    """Rounds the float32 inputs to bfloat16 on the way, as tensor cores do when they are allowed to."""

    name = "half_precision_sums"

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        p = problem
        q, k, v = (x.to(torch.bfloat16).to(x.dtype) for x in (p.q, p.k, p.v))
        return super().forward(replace(p, q=q, k=k, v=v), plan)


MUTANTS: tuple[Backend, ...] = (
    HeadLeftZero(),
    ScaleForgotten(),
    UnionForSum(),
    MeanForMerge(),
    DetachedMerge(),
    OwnDenominator(),
    DividedBySum(),
    Offsets32(),
    PaddingIgnored(),
    InputScaledInPlace(),
    RowsLeftUnwritten(),
    LseGradientDropped(),
    LseInBits(),
    HalfPrecisionSums(),
)
"""One of each wrong kind."""
