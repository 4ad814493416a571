"""A short problem in one call of a fused kernel, with the logarithm of the counts as its mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.backends.base import Gradients
from dilated_attention_pytorch.backends.kernel import Kernel
from dilated_attention_pytorch.problem import Problem


def masked_forward(problem: Problem, log_counts: Tensor, kernel: Kernel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of every query against every key; computed in ``dtype``, out in that of the problem's results."""
    q, k, v = _heads_first(problem, dtype)
    out, lse = kernel.forward(q, k, v, problem.scale, False, log_counts.to(dtype))
    unseen = _unseen(log_counts)
    out = out.masked_fill(unseen.unsqueeze(-1), 0).transpose(1, 2)
    return out.to(problem.result_dtype).contiguous(), lse.masked_fill(unseen, -torch.inf).contiguous()


def masked_backward(
    problem: Problem,
    log_counts: Tensor,
    kernel: Kernel,
    dtype: torch.dtype,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    """The gradients, given the global out and lse; a gradient of lse is one more column, as on strided pieces."""
    p = problem
    q, k, v = _heads_first(p, dtype)
    grad, result = (x.to(dtype).transpose(1, 2) for x in (dout, out))
    if dlse is not None:
        q, k, v, grad, result = (pad(x, (0, kernel.columns)) for x in (q, k, v, grad, result))
        grad[..., p.q.shape[3]] = 1
        result[..., p.q.shape[3]] = -dlse.to(dtype)
    row_lse = lse.masked_fill(_unseen(log_counts), torch.inf)  # exp(logit - inf) is 0: no gradient
    grads = kernel.backward(grad, q, k, v, result, row_lse.contiguous(), p.scale, False, log_counts.to(dtype))
    dq, dk, dv = (x[..., : p.q.shape[3]].transpose(1, 2).contiguous() for x in grads)
    if p.kv_group > 1:
        dk, dv = (x.unflatten(2, (-1, p.kv_group)).sum(3) for x in (dk, dv))
    dq, dk, dv = (x.to(p.result_dtype).contiguous() for x in (dq, dk, dv))  # the operator's fake kernel promises it
    return Gradients(dq, dk, dv)


def _heads_first(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, H, N, D) in ``dtype``, key-value heads repeated for their query heads."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    if problem.kv_group > 1:
        k, v = (x.repeat_interleave(problem.kv_group, 1) for x in (k, v))
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # type: ignore[return-value]


def _unseen(log_counts: Tensor) -> Tensor:
    """Rows without any key: (B or 1, H, Nq)."""
    return log_counts.amax(-1) == -torch.inf
