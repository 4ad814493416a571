"""Any backend that walks tiles computes an OrderedPlan through these: rows are moved, computed, and moved back.

Tables that are made in parts are computed part by part. A part is a plan of the whole problem that sees the keys of its
own rows alone: the others have out 0, lse -inf and gradients 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.plans import OrderedPlan, TilePlan
from dilated_attention_pytorch.problem import Problem


def forward_in_order(backend: Backend, problem: Problem, plan: OrderedPlan) -> tuple[Tensor, Tensor]:
    """`Backend.forward` of the plan's tiles; out and lse are in row order again."""
    ordered, parts = plan.order.applied(problem), plan.parts()
    out, lse = backend.forward(ordered, next(parts))
    for tiles in parts:
        more, more_lse = backend.forward(ordered, tiles)
        seen = more_lse != -torch.inf
        out = torch.where(seen.transpose(1, 2).unsqueeze(-1), more, out)
        lse = torch.where(seen, more_lse, lse)
    return plan.order.restored_queries(out, 1), plan.order.restored_queries(lse, 2)


def backward_in_order(
    backend: Backend,
    problem: Problem,
    plan: OrderedPlan,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    """`Backend.backward` of the plan's tiles; takes and gives everything in row order."""
    order = plan.order
    out, lse = order.ordered_queries(out, 1), order.ordered_queries(lse, 2)
    dout, dlse = order.ordered_gradients(dout, 1), None if dlse is None else order.ordered_gradients(dlse, 2)
    ordered, parts = order.applied(problem), plan.parts()
    if not isinstance(plan.tiles, TilePlan):
        ordered = replace(ordered, partial=True)  # sums of rounded shares would add up their errors
    found = backend.backward(ordered, next(parts), dout, dlse, out, lse)
    for tiles in parts:
        found = found.plus(backend.backward(ordered, tiles, dout, dlse, out, lse))
    bias = found.bias
    if bias is not None:
        bias = bias if bias.shape[-1] == 1 else order.restored_keys(bias, -1)
        bias = bias if bias.dim() < 2 or bias.shape[-2] == 1 else order.restored_queries(bias, -2)
    dq, (dk, dv) = order.restored_queries(found.q, 1), (order.restored_keys(x, 1) for x in (found.k, found.v))
    dq, dk, dv = (x.to(problem.result_dtype) for x in (dq, dk, dv))
    return Gradients(dq, dk, dv, bias)
