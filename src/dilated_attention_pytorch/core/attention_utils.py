"""Attention utilities under the names of version 0.2; each is a thin use of the rooms above.

Tensors are (..., N, H, D) unless said otherwise. A boolean mask says in all of them what to leave out: True = ignored,
as key padding does in nn.MultiheadAttention. A float mask is added to the logits. Masks broadcast to (..., H, Nq, Nk).
Version 0.2 made masks that were True where a pair takes part, and read them in both ways.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.core import constants
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import bias_from_mask
from dilated_attention_pytorch.nn.positions import Rotary, alibi_slopes, rotate
from dilated_attention_pytorch.patterns import Causal, Dilated, Full
from dilated_attention_pytorch.patterns.base import dense_counts
from dilated_attention_pytorch.scores import Relative

__all__ = [
    "apply_rotary_embeddings",
    "combine_masks",
    "compute_alibi_bias",
    "compute_attention_scores",
    "compute_rotary_embeddings",
    "create_4d_causal_mask",
    "create_block_diagonal_mask",
    "create_dilated_mask",
    "get_attention_backend_info",
    "merge_attention_heads",
    "optimize_attention_computation",
    "split_attention_heads",
    "standard_attention",
]

Device = torch.device | str | None


def optimize_attention_computation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention (..., Nq, H, Dv) of each head over all keys, on the fastest backend that can: `attend`.

    ``q (..., Nq, H, D)``, ``k (..., Nk, Hkv, D)``, ``v (..., Nk, Hkv, Dv)`` with the same leading dims. When causal,
    queries are the last rows of the keys. ``attention_mask`` broadcasts to (..., H, Nq, Nk), True = ignored, floats are
    added. ``dropout_p`` acts on every call: pass 0 in evaluation. Raises InvalidInput for what `attend` refuses.

    Example:
        >>> x = torch.randn(2, 3, 10, 4, 8)
        >>> optimize_attention_computation(x, x, x, is_causal=True).shape
        torch.Size([2, 3, 10, 4, 8])
    """
    return _attend(q, k, v, is_causal, attention_mask, dropout_p, "auto")


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`optimize_attention_computation` by the plain ``dense`` backend, on any device.

    Example:
        >>> x = torch.zeros(1, 3, 1, 2)
        >>> v = torch.tensor([1.0, 3.0, 5.0]).view(1, 3, 1, 1)
        >>> standard_attention(x, x, v, is_causal=True).flatten().round(decimals=4)
        tensor([1., 2., 3.])
    """
    return _attend(q, k, v, is_causal, attention_mask, dropout_p, "dense")


def compute_attention_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Logits (..., Nq, Nk) of ``q (..., Nq, D)`` and ``k (..., Nk, D)``, -inf where a pair is left out.

    Heads are a leading dim here, as in 0.2. ``scale`` None is 1/sqrt(D). When causal, queries are the last rows.

    Example:
        >>> x = torch.ones(2, 4)
        >>> compute_attention_scores(x, x, is_causal=True).tolist()
        [[2.0, -inf], [2.0, 2.0]]
    """
    if q.dim() < 2 or k.dim() < 2 or q.shape[-1] != k.shape[-1]:
        raise InvalidInput(
            f"expected q (..., Nq, D) and k (..., Nk, D) of one D. Got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    nq, nk = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        if nk < nq:
            raise InvalidInput(f"causal queries are the last rows of the keys: {nq} queries, {nk} keys.")
        i = torch.arange(nk - nq, nk, device=q.device)
        hidden = _hidden(Causal(), i, torch.arange(nk, device=q.device))
        scores = scores.masked_fill(hidden, -torch.inf)
    if attention_mask is not None:
        scores = scores + bias_from_mask("attention_mask", attention_mask, q, true_takes_part=False).to(scores.dtype)
    return scores


def combine_masks(attention_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """One mask that leaves out what either does; with a float ``attention_mask`` padded keys become -inf in it.

    ``attention_mask`` broadcasts to (B, H, Nq, Nk); ``key_padding_mask (B, Nk)`` is boolean, True = padding. Raises
    InvalidInput for a padding mask of another kind.

    Example:
        >>> combine_masks(torch.tensor([[0.5, 0.25]]), torch.tensor([[False, True]]))
        tensor([[[[0.5000,   -inf]]]])
    """
    if key_padding_mask is None:
        return attention_mask
    if key_padding_mask.dtype != torch.bool or key_padding_mask.dim() != 2:
        raise InvalidInput(
            f"expected key_padding_mask (B, Nk), bool, True = padding. Got {tuple(key_padding_mask.shape)}, "
            f"{key_padding_mask.dtype}."
        )
    padding = key_padding_mask[:, None, None, :]
    if attention_mask is None:
        return padding
    if attention_mask.dtype == torch.bool:
        return attention_mask | padding
    return attention_mask.masked_fill(padding, -torch.inf)


def create_dilated_mask(
    seq_len: int,
    segment_length: int,
    dilation_rate: int,
    device: Device = None,
    *,
    head: int = 0,
    num_heads: int = 1,
) -> Tensor:
    """Mask (N, N) of one LongNet branch, True = ignored: all but pairs on the head's grid in one segment (`Dilated`).

    Version 0.2 drew a window around each query with a grid of its own; LongNet's grid starts at the segment.

    Example:
        >>> (~create_dilated_mask(4, 4, 2)).int().tolist()
        [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    """
    places = torch.arange(seq_len, device=device)
    return _hidden(Dilated(segment_length, dilation_rate), places, places, head, num_heads)


def create_block_diagonal_mask(seq_len: int, block_size: int, device: Device = None, overlap: int = 0) -> Tensor:
    """Mask (N, N), True = ignored: all but pairs in one block, or within ``overlap`` tokens of the other's block.

    Example:
        >>> (~create_block_diagonal_mask(4, 2, overlap=1)).int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    """
    if overlap < 0:
        raise InvalidInput(f"expected overlap of at least 0 tokens. Got {overlap}.")
    places = torch.arange(seq_len, device=device)
    hidden = _hidden(Dilated(block_size, 1), places, places)
    if overlap == 0:
        return hidden
    start = (places // block_size * block_size).unsqueeze(1)
    near = (places >= start - overlap) & (places < start + block_size + overlap)
    return hidden & ~(near | near.T)


def create_4d_causal_mask(seq_len: int, device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float mask (1, 1, N, N): 0 where a key is not after the query, -inf where it is.

    Example:
        >>> create_4d_causal_mask(2).tolist()
        [[[[0.0, -inf], [0.0, 0.0]]]]
    """
    places = torch.arange(seq_len, device=device)
    mask = torch.zeros(seq_len, seq_len, dtype=dtype, device=device)
    return mask.masked_fill(_hidden(Causal(), places, places), -torch.inf)[None, None]


def compute_alibi_bias(
    seq_len: int, num_heads: int, device: Device = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """ALiBi's bias (H, N, N), ``-slope_h |i - j|`` with slopes ``2^(-8 (h + 1) / H)`` (arXiv 2108.12409, section 3).

    Layers have it as ``position="alibi"``, without the matrix.

    Example:
        >>> compute_alibi_bias(3, 8)[0].tolist()
        [[0.0, -0.5, -1.0], [-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]]
    """
    i = torch.arange(seq_len, device=device)
    zeros = torch.zeros(num_heads, seq_len, seq_len, device=device)
    head = torch.arange(num_heads, device=device).view(-1, 1, 1)
    rule = Relative(slopes=alibi_slopes(num_heads).to(zeros.device))
    return (rule.value(zeros, head, i.unsqueeze(1), i) + 0.0).to(dtype)  # + 0.0: no negative zeros


def compute_rotary_embeddings(
    seq_len: int,
    dim: int,
    device: Device = None,
    base: float = 10000,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, dim) of ``n base^(-2 i / dim)``; column i and column ``i + dim/2`` turn together.

    The pairing is that of `apply_rotary_embeddings` and of the layers' ``position="rotary"`` (arXiv 2104.09864, eq.
    34). Angles are float64 where the device has it. Raises InvalidInput for an odd ``dim``.

    Example:
        >>> cos, sin = compute_rotary_embeddings(2, 4)
        >>> sin[1]
        tensor([0.8415, 0.0100, 0.8415, 0.0100])
    """
    table = Rotary(dim, float(base)).table(seq_len, dtype=dtype, device=device)
    cos, sin = table.query_cos.squeeze(1), table.query_sin.squeeze(1)
    return cos.to(dtype), (sin * _signs(sin)).to(dtype)


def apply_rotary_embeddings(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``q (..., N, H, D)`` and ``k`` turned by the tables (N, D) of `compute_rotary_embeddings`.

    Example:
        >>> cos, sin = compute_rotary_embeddings(3, 4)
        >>> x = torch.ones(1, 3, 2, 4)
        >>> q, k = apply_rotary_embeddings(x, x, cos, sin)
        >>> q[0, 1, 0]
        tensor([-0.3012,  0.9900,  1.3818,  1.0099])
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() < 3 or cos.shape != sin.shape or tuple(cos.shape) != (x.shape[-3], x.shape[-1]):
            raise InvalidInput(
                f"expected cos and sin of shape (N, D) for {name} (..., N, H, D) = {tuple(x.shape)}. "
                f"Got {tuple(cos.shape)} and {tuple(sin.shape)}."
            )
    turn = cos.unsqueeze(-2), (sin * _signs(sin)).unsqueeze(-2)
    return rotate(q, *turn), rotate(k, *turn)


def split_attention_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """``tensor (..., N, E)`` as heads (..., N, H, E/H). Raises InvalidInput where H does not divide E.

    Example:
        >>> split_attention_heads(torch.zeros(2, 5, 12), 3).shape
        torch.Size([2, 5, 3, 4])
    """
    if num_heads < 1 or tensor.shape[-1] % num_heads != 0:
        raise InvalidInput(f"embed_dim ({tensor.shape[-1]}) must be divisible by num_heads ({num_heads}).")
    return tensor.reshape(*tensor.shape[:-1], num_heads, tensor.shape[-1] // num_heads)


def merge_attention_heads(tensor: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Heads (..., N, H, D) as embeddings (..., N, H * D). Raises InvalidInput for other numbers than the tensor's.

    Example:
        >>> merge_attention_heads(torch.zeros(2, 5, 3, 4), 3, 4).shape
        torch.Size([2, 5, 12])
    """
    if tuple(tensor.shape[-2:]) != (num_heads, head_dim):
        raise InvalidInput(
            f"expected heads (..., N, {num_heads}, {head_dim}). Got {tuple(tensor.shape)}; they are (..., N, H, D)."
        )
    return tensor.flatten(-2)


def get_attention_backend_info() -> dict[str, Any]:
    """What this machine offers: names of backends, versions and libraries; looked up when called.

    `explain` says for a problem which backends can serve it, and why the others cannot.

    Example:
        >>> get_attention_backend_info()["has_sdpa"]
        True
    """
    info: dict[str, Any] = {
        "backends": tuple(backend.name for backend in BACKENDS),
        "has_flash_attention": constants.HAS_FLASH_ATTN,
        "has_xformers": constants.HAS_XFORMERS,
        "has_sdpa": constants.HAS_SDPA,
        "torch_version": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
    }
    if info["cuda_available"]:
        info["gpu_name"] = torch.cuda.get_device_name()
        info["gpu_capability"] = torch.cuda.get_device_capability()
    return info


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    attention_mask: Tensor | None,
    dropout_p: float,
    backend: str,
) -> Tensor:
    lead = q.shape[:-3]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() < 3 or x.shape[:-3] != lead:
            raise InvalidInput(
                f"expected q, k, v (..., N, H, D) with the same leading dims. Got {name} {tuple(x.shape)}, "
                f"q {tuple(q.shape)}."
            )
    q4, k4, v4 = (x.reshape(math.prod(lead), *x.shape[-3:]) for x in (q, k, v))
    bias = None
    if attention_mask is not None:
        bias = bias_from_mask("attention_mask", attention_mask, q, true_takes_part=False)
        bias = _flat_bias(bias, lead, (q.shape[-2], q.shape[-3], k.shape[-3]))
    pattern = Causal() if is_causal else Full()
    out: Tensor = attend(q4, k4, v4, pattern, bias=bias, dropout_p=dropout_p, backend=backend)
    return out.reshape(*lead, *out.shape[1:])


def _flat_bias(bias: Tensor, lead: torch.Size, pairs: tuple[int, int, int]) -> Tensor:
    """A bias that broadcasts to (..., H, Nq, Nk) with its leading dims joined; InvalidInput where it does not."""
    full = (*lead, *pairs)
    try:
        fits = torch.broadcast_shapes(bias.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise InvalidInput(
            f"expected attention_mask to broadcast to (..., H, Nq, Nk) = {full}. Got {tuple(bias.shape)}; a padding "
            "mask (B, Nk) becomes mask[:, None, None, :]."
        )
    if bias.dim() <= 3:
        return bias
    return bias.expand(*lead, *bias.shape[-3:]).reshape(math.prod(lead), *bias.shape[-3:])


def _hidden(pattern: Causal | Dilated, i: Tensor, j: Tensor, head: int = 0, num_heads: int = 1) -> Tensor:
    """Pairs (Nq, Nk) that the pattern gives no count."""
    heads = torch.tensor(head, device=i.device).view(1, 1)
    return dense_counts(pattern, heads, num_heads, i.unsqueeze(1), j) == 0


def _signs(sin: Tensor) -> Tensor:
    """-1 for the first half of the columns, 1 for the second: `rotate` takes sines so signed, and back."""
    signs = torch.ones_like(sin[0]) if sin.shape[0] else sin.new_ones(sin.shape[-1])
    signs[: sin.shape[-1] // 2] = -1
    return signs
