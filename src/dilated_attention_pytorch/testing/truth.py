"""What a problem's results should be: the reference at any positions, and plain PyTorch in the problem's own dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.dropout import dropout_factors
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans import DensePlan
from dilated_attention_pytorch.problem import Problem, positions_tensor
from dilated_attention_pytorch.reference import reference_attention


@dataclass(frozen=True)
class Result:
    """Out (B, Nq, H, Dv), lse (B, H, Nq) and the gradients; without these where only the forward pass was run."""

    out: Tensor
    lse: Tensor
    grads: Gradients | None

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that messages use."""
        found = {"out": self.out, "lse": self.lse}
        if self.grads is None:
            return found
        found |= {"dq": self.grads.q, "dk": self.grads.k, "dv": self.grads.v}
        return found if self.grads.bias is None else found | {"dbias": self.grads.bias}

    def forward_only(self) -> Result:
        """The same without gradients."""
        return Result(self.out, self.lse, None)

    def errors(self, expected: Result, dout: Tensor) -> dict[str, float]:
        """``max |x - ref| / max(max |ref|, max |dout|, 1e-3)`` of each tensor; rows with lse -inf must agree in it."""
        top = float(dout.abs().max()) if dout.numel() else 0.0
        named, errors = expected.named(), {}
        for name, x in self.named().items():
            y = named[name]
            both = (x == -torch.inf) & (y == -torch.inf)
            x, y = torch.where(both, 0.0, x.double()), torch.where(both, 0.0, y.double())
            size = max(float(y.abs().max()) if y.numel() else 0.0, top, 1e-3)
            errors[name] = float((x - y).abs().max()) / size if y.numel() else 0.0
        return errors


def truth(problem: Problem, pattern: Pattern, dout: Tensor, dlse: Tensor | None) -> Result:
    """`reference_attention` and its gradients by autograd, in float64, for positions of any kind.

    Rows that do not start at 0 or leave places out are set into longer tensors, whose other keys are hidden by -inf.
    """
    p = problem
    leaves = [x.detach().double().requires_grad_() for x in (p.q, p.k, p.v)]
    q, k, v = leaves
    bias = None if p.bias is None else p.bias.detach().double().requires_grad_()
    rows, columns = (positions_tensor(x, p.q.device) for x in (p.query_positions, p.key_positions))
    start, key_end, full_bias = p.query_positions[0].start, p.key_length, bias
    placed = not torch.equal(columns, torch.arange(p.key_length, device=columns.device))
    placed = placed or not torch.equal(rows, torch.arange(start, start + p.query_length, device=rows.device))
    if placed:
        start, end, key_end = 0, int(rows.max()) + 1, int(columns.max()) + 1
        full = torch.full((p.batch, p.num_heads, end, key_end), -torch.inf, dtype=torch.float64, device=rows.device)
        given = torch.zeros((), dtype=torch.float64, device=rows.device) if bias is None else bias
        at = (slice(None), slice(None), rows[:, None], columns)
        full[at] = given.expand(p.batch, p.num_heads, p.query_length, p.key_length)
        full_bias = full
        q = q.new_zeros(p.batch, end, *q.shape[2:]).index_copy(1, rows, q)
        k, v = (x.new_zeros(p.batch, key_end, *x.shape[2:]).index_copy(1, columns, x) for x in (k, v))
    mask = None
    if p.key_lengths is not None:
        mask = torch.arange(key_end, device=rows.device) >= torch.tensor(p.key_lengths, device=rows.device)[:, None]
    out, lse = reference_attention(
        q,
        k,
        v,
        pattern,
        scale=p.scale,
        bias=full_bias,
        score=p.score,
        key_padding_mask=mask,
        dropout_p=p.dropout_p,
        seed=p.seed,
        query_start=start,
    )
    if placed:
        out, lse = out[:, rows], lse[..., rows]
    return Result(out.detach(), lse.detach(), _differentiate(out, lse, leaves, bias, dout, dlse))


def given_out(problem: Problem, pattern: Pattern, expected: Result, out: Tensor, dout: Tensor) -> Result:
    """The `truth` as an exact backward pass finds it that is given ``out``, rounded to a half type, say.

    Backward reads out in ``delta_i = <dout_i, out_i>`` only, and the gradient of a logit is ``P_ij (dP_ij - delta_i)``.
    What delta is off by therefore acts as a gradient of lse, of the other sign: the derivative of lse_i is P_ij, too.
    """
    off = ((out.double() - expected.out) * dout.double()).sum(-1).transpose(1, 2)
    added = truth(problem, pattern, torch.zeros_like(dout), -off).grads
    assert expected.grads is not None
    assert added is not None
    return Result(expected.out, expected.lse, expected.grads.plus(added))


def plain(problem: Problem, pattern: Pattern, dout: Tensor, dlse: Tensor | None) -> Result:
    """Softmax attention as one writes it in PyTorch, in the problem's dtype throughout: the yardstick of half types."""
    p = problem
    leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
    bias = None if p.bias is None else p.bias.detach().clone().requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in leaves)
    k, v = (x.repeat_interleave(p.kv_group, dim=1) for x in (k, v))
    logits = p.scale * (q @ k.transpose(2, 3))
    head = torch.arange(p.num_heads, device=q.device).view(-1, 1, 1)
    i, j = (positions_tensor(x, q.device) for x in (p.query_positions, p.key_positions))
    if p.score is not None:
        logits = p.score.value(logits, head, i.view(-1, 1), j)
    if bias is not None:
        logits = logits + bias
    counts = DensePlan(pattern).expand(p).to(logits.dtype)
    logits = logits + counts.log()
    unseen = (logits == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(unseen, 0.0), -1).masked_fill(unseen, 0.0)
    lse = torch.logsumexp(logits.masked_fill(unseen, 0.0), -1).masked_fill(unseen[..., 0], -torch.inf)
    if p.dropout_p > 0 and p.seed is not None:
        row = torch.arange(p.batch, device=q.device).view(-1, 1, 1, 1) * p.num_heads + head
        weights = weights * dropout_factors(p.seed, p.dropout_p, row, i.view(-1, 1), j).to(weights)
    out = (weights @ v).transpose(1, 2)
    return Result(out.detach(), lse.detach(), _differentiate(out, lse, leaves, bias, dout, dlse))


def _differentiate(
    out: Tensor, lse: Tensor, leaves: list[Tensor], bias: Tensor | None, dout: Tensor, dlse: Tensor | None
) -> Gradients:
    wanted = leaves if bias is None else [*leaves, bias]
    outputs, given = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, given = [out, lse], [*given, dlse.to(lse.dtype)]
    return Gradients(*torch.autograd.grad(outputs, wanted, given))
