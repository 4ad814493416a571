"""The truth: dense attention from counts, in float64, on one screen. Every backend is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.compat import TorchscaleCompat, appended_rows, branch_patterns
from dilated_attention_pytorch.dropout import dropout_factors
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import dense_counts
from dilated_attention_pytorch.problem import check_inputs
from dilated_attention_pytorch.scores import Score


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    score: Score | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    query_start: int | None = None,
    compat: TorchscaleCompat | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the definition in float64: memory and time O(B H Nq Nk), differentiable by autograd.

    ``q (B, Nq, H, D)``, ``k (B, Nk, Hkv, D)``, ``v (B, Nk, Hkv, Dv)``; out (B, Nq, H, Dv), lse (B, H, Nq), natural log.
    A row that sees no key has out 0, lse -inf and gradients 0. ``seed`` (int64, one element) is needed with dropout.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> x = torch.zeros(1, 3, 1, 2)
        >>> reference_attention(x, x, x, Causal())[1].exp().flatten().round().tolist()
        [1.0, 2.0, 3.0]
    """
    scale, start = check_inputs(
        q, k, v, scale=scale, bias=bias, score=score, key_padding_mask=key_padding_mask, query_start=query_start
    )
    (b, nq, h, _), nk = q.shape, k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(h // x.shape[2], dim=2) for x in (k, v))
    head = torch.arange(h, device=q.device).view(-1, 1, 1)
    i = torch.arange(start, start + nq, device=q.device).view(-1, 1)
    j = torch.arange(nk, device=q.device)

    s = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if score is not None:
        s = score.value(s, head, i, j)
    if bias is not None:
        s = s + bias.double()
    keep = torch.ones_like(s)
    if dropout_p > 0:
        assert seed is not None, "dropout needs a seed"
        row = torch.arange(b, device=q.device).view(-1, 1, 1, 1) * h + head
        keep = dropout_factors(seed, dropout_p, row, i, j)

    def partial(p: Pattern) -> tuple[Tensor, Tensor]:
        counts = dense_counts(p, head, h, i, j).expand(b, h, nq, nk).double()
        if key_padding_mask is not None:
            counts = counts * ~key_padding_mask[:, None, None, :]
        zeros = torch.zeros((), dtype=torch.float64, device=q.device)
        if compat is not None and compat.zero_keys:
            zeros = sum((appended_rows(x, head, h, i, nk) for x in branch_patterns(p)), zeros)[..., 0]
        visible = (counts > 0) & (s > -torch.inf)
        peak = torch.where(visible, s.detach(), -torch.inf).amax(-1) if nk else s.new_full((b, h, nq), -torch.inf)
        peak = torch.maximum(peak, torch.where(zeros > 0, 0.0, -torch.inf))
        safe_peak = torch.where(peak > -torch.inf, peak, 0.0)
        mass = torch.where(visible, counts * torch.exp(torch.where(visible, s, 0.0) - safe_peak[..., None]), 0.0)
        total = mass.sum(-1) + zeros * torch.exp(-safe_peak)
        seen = total > 0
        safe_total = torch.where(seen, total, 1.0)
        out = torch.einsum("bhij,bjhd->bihd", keep * mass / safe_total[..., None], v)
        return out, torch.where(seen, safe_peak + safe_total.log(), -torch.inf)

    if compat is None or not compat.detach_mixing:
        return partial(pattern)
    outs, lses = zip(*(partial(p) for p in branch_patterns(pattern)))
    lse = torch.stack(lses).detach().logsumexp(0)
    seen = lse > -torch.inf
    weights = (torch.exp(x - torch.where(seen, lse, 0.0)).detach().transpose(1, 2)[..., None] for x in lses)
    return sum((w * o for w, o in zip(weights, outs)), torch.zeros_like(outs[0])), lse
