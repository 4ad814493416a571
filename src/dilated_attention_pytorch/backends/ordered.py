"""Any backend that walks tiles computes an OrderedPlan through these: rows are moved, computed, and moved back."""

from __future__ import annotations

from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.plans.orders import OrderedPlan
from dilated_attention_pytorch.problem import Problem


def forward_in_order(backend: Backend, problem: Problem, plan: OrderedPlan) -> tuple[Tensor, Tensor]:
    """`Backend.forward` of the plan's tiles; out and lse are in row order again."""
    out, lse = backend.forward(plan.order.applied(problem), plan.tiles)
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
    found = backend.backward(order.applied(problem), plan.tiles, dout, dlse, out, lse)
    bias = found.bias
    if bias is not None:
        bias = bias if bias.shape[-1] == 1 else order.restored_keys(bias, -1)
        bias = bias if bias.dim() < 2 or bias.shape[-2] == 1 else order.restored_queries(bias, -2)
    dq, (dk, dv) = order.restored_queries(found.q, 1), (order.restored_keys(x, 1) for x in (found.k, found.v))
    return Gradients(dq, dk, dv, bias)
