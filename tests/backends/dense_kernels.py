"""Dense attention that stands in for kernels of other libraries; tensors are (batch, heads, N, D)."""

import math

import torch

from dilated_attention_pytorch.testing import CASES, ContractReport
from dilated_attention_pytorch.testing.contract import check_case


def hidden(nq, nk, is_causal, window=(-1, -1)):
    """What a causal flag (last row with last key) and a window hide, as flash-attn documents them: (Nq, Nk) bool."""
    place = torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)  # 0 on the aligned diagonal
    left, right = window[0], 0 if is_causal else window[1]
    mask = torch.zeros(nq, nk, dtype=torch.bool)
    if left >= 0:
        mask |= place > left
    if right >= 0:
        mask |= -place > right
    return mask


def dense(q, k, v, scale, mask=None):
    """(out in q's dtype, lse float32); the mask is boolean (hidden) or additive."""
    logits = _logits(q, k, scale, mask)
    out = torch.softmax(logits, -1) @ v.to(logits.dtype)
    return out.to(q.dtype), logits.logsumexp(-1)


def dense_backward(dout, q, k, v, out, lse, scale, mask=None):
    """(dq, dk, dv) from a global out and lse, in the inputs' dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = (_logits(q, k, scale, mask) - lse[..., None]).exp()
    dout, value, out = dout.to(wide), v.to(wide), out.to(wide)
    inner = weights * (dout @ value.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True))
    dq, dk = scale * inner @ k.to(wide), scale * inner.transpose(-1, -2) @ q.to(wide)
    return dq.to(q.dtype), dk.to(k.dtype), (weights.transpose(-1, -2) @ dout).to(v.dtype)


def _logits(q, k, scale, mask):
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    if mask is None:
        return logits
    return logits.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(wide)


WALKED = (
    "causal",
    "longnet",
    "not_nesting",
    "sparse_rows",
    "longnet_causal-grouped_heads",
    "longnet_causal-padded",
    "longnet_causal-last_dim_strided",
    "longnet_causal-queries_past_keys",
    "not_nesting-decode",
    "documents_of",
)
WINDOWED = ("window", "window_causal", "longnet_window", "window_causal-placed", "sum_with_window")


def check_cases(backend, names, dtypes):
    """All laws for these cases; the report."""
    report = ContractReport()
    cases = {case.name: case for case in CASES}
    for name in names:
        for dtype in dtypes:
            check_case(backend, cases[name], dtype, "cpu", report)
    return report
