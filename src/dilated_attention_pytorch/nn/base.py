"""What the attention layers share: masks as biases, the choice of backend, and attention weights as a dense tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import check_backend_name
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Pattern


def check_op(op: object) -> str:
    """The backend that ``op`` names; None is "auto". InvalidInput for anything that is not a name.

    Example:
        >>> check_op(None), check_op("dense")
        ('auto', 'dense')
    """
    if op is None:
        return "auto"
    if not isinstance(op, str):
        kind = op.__name__ if isinstance(op, type) else type(op).__name__
        raise InvalidInput(
            f"expected op to be the name of a backend of attend ('dense', 'sdpa', ...) or None. Got {kind}; operators "
            "of xformers are not taken any more: use op=None, which picks the fastest backend that can."
        )
    check_backend_name(op)
    return op


def check_dropout(name: str, p: float) -> float:
    """``p`` when it is a probability below 1, else InvalidInput that names the option."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0.0 <= p < 1.0:
        raise InvalidInput(f"expected {name} in [0, 1). Got {p!r}.")
    return float(p)


def bias_from_mask(name: str, mask: Tensor, like: Tensor, *, true_takes_part: bool) -> Tensor:
    """``mask`` as a bias for ``attend``: a boolean mask becomes 0 and -inf, a float mask stays; in lse's precision.

    ``true_takes_part`` is F.scaled_dot_product_attention's meaning of a boolean mask; nn.MultiheadAttention's is the
    opposite. Raises InvalidInput for other dtypes.

    Example:
        >>> keep = torch.tensor([True, False])
        >>> bias_from_mask("mask", keep, torch.zeros(1), true_takes_part=True).tolist()
        [0.0, -inf]
    """
    if mask.dtype == torch.bool:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        hidden = ~mask if true_takes_part else mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(hidden, -torch.inf)
    if not mask.is_floating_point():
        raise InvalidInput(f"expected {name} of dtype bool or float. Got {mask.dtype}; convert it with .bool().")
    return mask


def dense_weights(q: Tensor, k: Tensor, pattern: Pattern, **options: Any) -> Tensor:
    """Attention weights (B, H, Nq, Nk) of ``attend(q, k, v, pattern, **options)`` for any v; O(Nq Nk) memory.

    Weight (i, j) is ``C_ij exp(s_ij) / sum_j C_ij exp(s_ij)``: attention over values that are the rows of the unit
    matrix. A row that sees no key has weights 0.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> dense_weights(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), Causal())
        tensor([[[[1.0000, 0.0000],
                  [0.5000, 0.5000]]]])
    """
    batch, key_length, kv_heads, _ = k.shape
    unit = torch.eye(key_length, dtype=q.dtype, device=q.device)  # (Nk, Dv = Nk)
    values = unit[None, :, None, :].expand(batch, key_length, kv_heads, key_length)
    out: Tensor = attend(q, k, values, pattern, **{**options, "backend": "dense"})
    return out.permute(0, 2, 1, 3)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers give for ``x``: autocast's where it is on, else x's own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
