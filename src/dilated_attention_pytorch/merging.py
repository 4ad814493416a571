"""Joining partial results (out, lse) of the same queries over disjoint sets of keys, by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One (out, lse) that equals attention over all the parts' keys together; differentiable.

    Each part is ``out (B, N, H, Dv)`` with ``lse (B, H, N)``, natural logarithm. A part that saw no key has lse -inf
    and adds nothing; a row that no part saw has out 0 and lse -inf. This is eq. 8-10 of LongNet (arXiv 2307.02486).

    Raises InvalidInput when no part is given or shapes differ.

    Example:
        >>> one = (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1))
        >>> two = (torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))
        >>> out, lse = merge(one, two)
        >>> out.flatten().tolist(), round(lse.item(), 4)
        ([0.5, 0.5], 0.6931)
    """
    if not parts:
        raise InvalidInput("merge: expected at least one (out, lse). Got none.")
    for out, lse in parts:
        b, n, h, _ = out.shape
        if out.shape != parts[0][0].shape or lse.shape != (b, h, n):
            raise InvalidInput(
                "merge: expected every out of one shape (B, N, H, Dv) and every lse of shape (B, H, N). "
                f"Got out {tuple(out.shape)} and lse {tuple(lse.shape)} beside out {tuple(parts[0][0].shape)}."
            )
    stacked = torch.stack([lse for _, lse in parts])
    peak = stacked.detach().amax(0)
    peak = torch.where(torch.isfinite(peak), peak, torch.zeros_like(peak))
    mass = torch.exp(stacked - peak)  # 0 where a part saw nothing
    total = mass.sum(0)
    seen = total > 0
    safe_total = torch.where(seen, total, torch.ones_like(total))
    lse = torch.where(seen, peak + safe_total.log(), torch.full_like(total, -torch.inf))
    weights = (mass / safe_total).transpose(2, 3).unsqueeze(-1)  # (parts, B, N, H, 1)
    out = sum(w.to(o.dtype) * o for w, (o, _) in zip(weights, parts))
    assert isinstance(out, Tensor)
    return out, lse


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a part into the running ``out (..., D)`` and ``lse (...)`` in place.

    The weight of the part is ``sigmoid(part_lse - lse)``: 1 where nothing was seen before, which `lerp` takes exactly,
    and 0 where the part saw nothing (part_lse -inf). The running ``lse`` may be in float64 whatever ``out`` is in: in
    float32 it is rounded at every merge, and over many parts these roundings are larger than the parts' own errors.

    Example:
        >>> out, lse = torch.zeros(1, 2), torch.zeros(1, dtype=torch.float64)
        >>> merge_into(out, lse, torch.ones(1, 2), torch.zeros(1))
        >>> out.tolist(), round(lse.item(), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    weight = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -torch.inf, 0)
    out.lerp_(part_out, weight.unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))
