"""Projections around attention of heads: what all multihead layers share, whatever their pattern."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import PatternAttention, bias_from_mask
from dilated_attention_pytorch.nn.cache import LayerCache
from dilated_attention_pytorch.nn.old_keys import rename_attention_keys
from dilated_attention_pytorch.nn.positions import Rotation, alibi_slopes, make_positions, rotate
from dilated_attention_pytorch.nn.shards import ShardRows, over_ranks, shard_rows
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import Documents
from dilated_attention_pytorch.scores import Relative


class MultiheadPatternAttention(nn.Module):
    """Projections, ``attention`` of the heads, sub-LayerNorm and output projection.

    ``layer_norm`` puts MAGNETO's sub-LayerNorm before the output projection; value and output projections start
    Xavier-normal with gain ``gamma_init``, query and key with gain 1, biases 0 (arXiv 2210.06423, figure 2).
    ``num_kv_heads`` below ``num_heads`` shares keys and values among groups of heads. ``position`` is "none", "rotary",
    "xpos" (for causal attention), which counts from the middle of the largest of ``segment_lengths``, or "alibi", which
    becomes the ``score`` of ``attention``.

    Where ``attention.context_parallel`` deals over several ranks, queries, keys, values and the result are this rank's
    shards.

    Raises InvalidInput for sizes that do not divide, or options that do not go together.

    Example:
        >>> from dilated_attention_pytorch.nn.attention import DilatedAttention
        >>> layer = MultiheadPatternAttention(64, 4, DilatedAttention([32], [1]), position="rotary")
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention: PatternAttention,
        *,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_kv_heads: int | None = None,
        position: str = "none",
        segment_lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = check_heads(embed_dim, num_heads, self.num_kv_heads)
        self.gamma_init, self.position = gamma_init, position
        self.positions = make_positions(position, self.head_dim, segment_lengths)
        if position == "alibi":
            attention.score = Relative(slopes=alibi_slopes(num_heads))
        self.attention = attention
        self.kv_dim = self.num_kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(embed_dim, embed_dim + 2 * self.kv_dim, bias=bias, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype) if layer_norm else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as MAGNETO starts them."""
        query, key, value = self.qkv_proj.weight.split((self.embed_dim, self.kv_dim, self.kv_dim))
        nn.init.xavier_normal_(query)
        nn.init.xavier_normal_(key)
        nn.init.xavier_normal_(value, gain=self.gamma_init)
        nn.init.xavier_normal_(self.out_proj.weight, gain=self.gamma_init)
        for linear in (self.qkv_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
        *,
        position_ids: Tensor | None = None,
        rotation: Rotation | None = None,
        query_start: int | None = None,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
        **inner: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The layer's output (B, Nq, E) for ``query (B, Nq, E)``, ``key`` and ``value (B, Nk, E)``; None is the query.

        ``key_padding_mask (B, Nk)``: True is padding, on the right. ``attn_mask`` as in nn.MultiheadAttention: (Nq,
        Nk) or (B*H, Nq, Nk), True is NOT allowed, floats are added. With ``need_weights``: (output, weights), the
        exact normalised weights (B, Nq, Nk), or (B, H, Nq, Nk) when not averaged over heads; without dropout, O(Nq Nk)
        memory, so of at most 8192 tokens, or of some rows of more: ``layer(x[:, i:j], x, x, query_start=i, ...)``.

        ``position_ids`` (N,) or (B, N) place the rows for rotary and xPos (self-attention only; default: in order);
        ``rotation`` is a ready table from ``positions.table``, shared by the layers of a model. ``query_start`` is the
        row of the first query among the keys; None makes queries the last rows. Pattern and positions restart in each
        of ``documents``, so that a packed sample equals the sample alone. ``cache`` is read, and keeps the new keys and
        values: self-attention under torch.no_grad(), in one process. Where tokens are dealt over ranks, documents and
        ``query_start`` are those of the whole sequence, and position_ids those of this rank's rows. ``inner`` are
        further keywords of ``attention``, the layer of heads: ``rows`` of `PatternAttention.forward`, ``selected`` of
        `AdaptiveSparseAttention.forward`.

        Raises InvalidInput for shapes, dtypes and options that do not fit; nothing is cached then.
        """
        is_self = (key is None or key is query) and (value is None or value is query)
        key, value = query if key is None else key, query if value is None else value
        self._check_rows(query=query, key=key, value=value)
        self._check_placing(is_self, position_ids, rotation, documents)
        if cache is not None:
            _check_cached(is_self, key_padding_mask, query_start, documents, self.attention.context_parallel)
        q, k, v = self._project(query, key, value, is_self)
        past = 0 if cache is None else cache.length
        if self.positions is not None:
            if rotation is None:
                rotation = self._rotation(q, k, is_self, query_start, past, position_ids, documents)
            q, k = rotate(q, rotation.query_cos, rotation.query_sin), rotate(k, rotation.key_cos, rotation.key_sin)
        bias = None if attn_mask is None else self._bias(attn_mask, q, past + k.shape[1])
        if cache is not None:
            k, v = cache.append(k, v)
        try:
            out = self.attention(
                q,
                k,
                v,
                is_causal,
                bias,
                key_padding_mask=key_padding_mask,
                query_start=query_start,
                documents=documents,
                need_weights=need_weights,
                **inner,
            )
        except BaseException:
            if cache is not None:
                cache.truncate(past)
            raise
        if need_weights:
            out, weights = out
            return self._finish(out), weights.mean(1) if average_attn_weights else weights
        return self._finish(out)

    def extra_repr(self) -> str:
        """The options that the sub-modules do not show."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, position={self.position!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        rename_attention_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_self: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of queries, keys and values, (B, N, H or Hkv, D); one matrix product in self-attention."""
        sizes = (self.embed_dim, self.kv_dim, self.kv_dim)
        if is_self:
            q, k, v = self.qkv_proj(query).split(sizes, -1)
        else:
            weights = self.qkv_proj.weight.split(sizes)
            biases = (None, None, None) if self.qkv_proj.bias is None else self.qkv_proj.bias.split(sizes)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # type: ignore[return-value]

    def _rotation(
        self,
        q: Tensor,
        k: Tensor,
        is_self: bool,
        query_start: int | None,
        past: int,
        position_ids: Tensor | None,
        documents: Documents | None,
    ) -> Rotation:
        """The table of these rows; ``past`` is the row of the first key."""
        assert self.positions is not None
        table = partial(self.positions.table, documents=documents, dtype=q.dtype, device=q.device)
        context = over_ranks(self.attention.context_parallel)
        if context is None:
            queries, keys = ShardRows(q.shape[1], None), ShardRows(k.shape[1], None)
        else:
            keys = shard_rows(context, k)
            queries = keys if is_self else shard_rows(context, q)
        first = max(past + keys.length - queries.length, 0) if query_start is None else query_start
        of_keys = table(keys.length, at=keys.at, start=past, position_ids=position_ids)
        if first == past and (is_self or (context is None and queries.length == keys.length)):
            return of_keys
        return Rotation(*table(queries.length, at=queries.at, start=first)[:2], *of_keys[2:])

    def _bias(self, attn_mask: Tensor, q: Tensor, key_length: int) -> Tensor:
        batch, query_length, heads, _ = q.shape
        full = (batch * heads, query_length, key_length)
        if tuple(attn_mask.shape) not in (full, full[1:]):
            raise InvalidInput(
                f"expected attn_mask of shape (Nq, Nk) = {full[1:]} or (B*H, Nq, Nk) = {full}. "
                f"Got {tuple(attn_mask.shape)}."
            )
        bias = bias_from_mask("attn_mask", attn_mask, q, true_takes_part=False)
        return bias if bias.dim() == 2 else bias.view(batch, heads, query_length, key_length)

    def _finish(self, heads: Tensor) -> Tensor:
        x = heads.flatten(2)  # (B, Nq, E)
        return self.out_proj(x if self.norm is None else self.norm(x))  # type: ignore[no-any-return]

    def _check_rows(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.embed_dim:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise InvalidInput(
                    f"expected {name} of shape (B, N, embed_dim = {self.embed_dim}). Got {got}; "
                    "a single sample needs a batch dim: x[None]."
                )

    def _check_placing(
        self, is_self: bool, position_ids: Tensor | None, rotation: Rotation | None, documents: Documents | None
    ) -> None:
        if (position_ids is not None or rotation is not None) and self.positions is None:
            raise InvalidInput(
                f"position={self.position!r} has no use for position_ids or rotation; leave them out, or build the "
                "layer with position='rotary'."
            )
        if position_ids is not None and (not is_self or rotation is not None):
            raise InvalidInput("position_ids place the rows of self-attention: leave out key, value and rotation.")
        if documents is not None and not is_self:
            raise InvalidInput("documents are those of self-attention: leave out key and value.")


def _check_cached(
    is_self: bool,
    key_padding_mask: Tensor | None,
    query_start: int | None,
    documents: Documents | None,
    context: ContextParallel | None,
) -> None:
    if over_ranks(context) is not None:
        raise InvalidInput(
            "a cache holds every row, and no rank does: decode in one process, with context_parallel None."
        )
    if not is_self or query_start is not None:
        raise InvalidInput("a cache serves self-attention: leave out key, value and query_start.")
    if key_padding_mask is not None or documents is not None:
        raise InvalidInput(
            "padding and documents would lie between cached rows: leave out key_padding_mask and documents, or cache."
        )


def check_heads(embed_dim: int, num_heads: int, num_kv_heads: int) -> int:
    """The dim of a head, where the sizes are numbers that divide; else InvalidInput."""
    if num_heads < 1 or embed_dim < 1 or num_kv_heads < 1:
        raise InvalidInput(
            "expected embed_dim, num_heads and num_kv_heads of at least 1. "
            f"Got {embed_dim}, {num_heads} and {num_kv_heads}."
        )
    if embed_dim % num_heads != 0:
        raise InvalidInput(
            f"embed_dim ({embed_dim}) must be divisible by num_heads ({num_heads}). "
            f"Got head_dim={embed_dim / num_heads:.2f}"
        )
    if num_heads % num_kv_heads != 0:
        raise InvalidInput(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads}).")
    return embed_dim // num_heads
