"""What the attention layers share: attention of heads under a pattern, masks as biases, weights as a dense tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import check_backend_name
from dilated_attention_pytorch.compiling import run_eagerly
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.nn.shards import ShardRows, as_context, over_ranks, whole_shapes
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import Documents, Pattern
from dilated_attention_pytorch.problem import check_inputs
from dilated_attention_pytorch.scores import Score

WEIGHTS_LIMIT = 8192
"""Tokens whose attention weights may be asked for as a dense matrix; of longer sequences some rows may."""


class PatternAttention(nn.Module):
    """Attention of ready-made heads; which pattern a call has is the subclass's choice.

    ``softmax_scale`` None is 1/sqrt(D). ``attention_dropout`` acts in training mode only. ``op`` names a backend of
    `attend`, or several, of which each call takes the first that can; None picks one. With ``context_parallel``, a
    `ContextParallel` or a mesh of one dim, queries, keys, values and the result are this rank's shards; over one rank
    that is the whole, and calls are as without it. Raises InvalidInput for a probability out of range, or an ``op``
    that is no name.
    """

    def __init__(
        self,
        softmax_scale: float | None,
        attention_dropout: float,
        op: str | tuple[str, ...] | None,
        score: Score | None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.attention_dropout = check_dropout("attention_dropout", attention_dropout)
        self.backend = check_op(op)
        self.score = score
        self.context_parallel = context_parallel  # type: ignore[assignment]  # the setter takes meshes too

    @property
    def context_parallel(self) -> ContextParallel | None:
        """How the tokens are dealt over ranks; None: every call has whole sequences. May be set at any time."""
        return self._context_parallel

    @context_parallel.setter
    def context_parallel(self, context: ContextParallel | DeviceMesh | None) -> None:
        self._context_parallel = self.checked_context(context)

    def checked_context(self, context: ContextParallel | DeviceMesh | None) -> ContextParallel | None:
        """What ``context_parallel`` becomes when it is set to ``context``; InvalidInput for what this layer cannot."""
        return as_context(context)

    def choose_pattern(self, query: Tensor, key: Tensor, is_causal: bool, query_start: int | None) -> Pattern:
        """The pattern of a call, before documents restart it."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_start: int | None = None,
        documents: Documents | None = None,
        need_weights: bool = False,
        rows: ShardRows | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention (B, Nq, H, Dv) of ``query (B, Nq, H, D)`` over ``key (B, Nk, Hkv, D)``, ``value (B, Nk, Hkv, Dv)``.

        ``attention_mask`` broadcasts to (B, H, Nq, Nk) as in F.scaled_dot_product_attention: True takes part, floats
        are added. ``key_padding_mask (B, Nk)``: True is padding, on the right. ``query_start`` is the position of the
        first query; None makes queries the last rows. The pattern restarts in each of ``documents``. With
        ``need_weights`` also the weights (B, H, Nq, Nk), without dropout, in O(Nq Nk) memory.

        Where ``context_parallel`` deals over several ranks, tensors and the padding mask are shards, ``query_start``
        and documents speak of whole sequences, and attention_mask and need_weights are refused. ``rows`` are those of
        queries and keys where they are known: ranks then do not agree on this call, nor check that they ask alike.
        """
        if need_weights:
            check_weights(query, key)
        pattern = self.choose_pattern(query, key, is_causal, query_start)
        if documents is not None:
            pattern = documents.of(pattern)
        if over_ranks(self.context_parallel) is not None:
            _check_shards(attention_mask, need_weights)
            return self._attend_shards(query, key, value, pattern, key_padding_mask, query_start, rows)
        return self._attend(query, key, value, pattern, attention_mask, key_padding_mask, query_start, need_weights)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        attention_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        query_start: int | None,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        bias = None
        if attention_mask is not None:
            bias = bias_from_mask("attention_mask", attention_mask, query, true_takes_part=True)
        options: dict[str, Any] = {
            "scale": self.softmax_scale,
            "bias": bias,
            "score": self.score,
            "key_padding_mask": key_padding_mask,
            "query_start": query_start,
        }
        dropout_p = self.attention_dropout if self.training else 0.0
        call = partial(attend, query, key, value, pattern, dropout_p=dropout_p, **options)
        out = first_that_can(self.backend, call)
        return (out, dense_weights(query, key, pattern, **options)) if need_weights else out

    @run_eagerly("attention over several ranks sends and receives on the host: compile without fullgraph")
    def _attend_shards(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        key_padding_mask: Tensor | None,
        query_start: int | None,
        rows: ShardRows | None,
    ) -> Tensor:
        assert self.context_parallel is not None
        dropout_p = self.attention_dropout if self.training else 0.0
        if dropout_p > 0:
            rows = None  # ranks must agree on a seed
        call = partial(
            self.context_parallel.attend,
            query,
            key,
            value,
            pattern,
            scale=self.softmax_scale,
            score=self.score,
            key_padding_mask=key_padding_mask,
            query_start=query_start,
            dropout_p=dropout_p,
            total_length=None if rows is None else rows.length,
        )
        return first_that_can(self.backend, call)


def _check_shards(attention_mask: Tensor | None, need_weights: bool) -> None:
    if attention_mask is not None:
        raise InvalidInput(
            "a mask over pairs (Nq, Nk) is not dealt over ranks: with context_parallel say who sees whom by the "
            "pattern, key_padding_mask or documents."
        )
    if need_weights:
        raise InvalidInput(
            "attention weights (Nq, Nk) are not dealt over ranks: ask for them in one process, or with "
            "context_parallel=None."
        )


def first_that_can(backend: str | tuple[str, ...], call: Callable[..., Tensor]) -> Tensor:
    """``call(backend=name)`` with the first of these names that raises no NoBackend; the last one's is raised.

    Each attempt with dropout draws a seed from torch's generator.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> x, bias = torch.zeros(1, 2, 1, 4), torch.zeros(2, 2)  # a bias is nothing for fused kernels
        >>> first_that_can(("sdpa", "dense"), partial(attend, x, x, x, Causal(), bias=bias)).shape
        torch.Size([1, 2, 1, 4])
    """
    names = (backend,) if isinstance(backend, str) else backend
    for name in names[:-1]:
        try:
            return call(backend=name)
        except NoBackend:
            continue
    return call(backend=names[-1])


def check_op(op: object) -> str | tuple[str, ...]:
    """The backend that ``op`` names, or those; None is "auto". InvalidInput for anything that is not a name.

    Example:
        >>> check_op(None), check_op("dense")
        ('auto', 'dense')
    """
    if op is None:
        return "auto"
    if isinstance(op, tuple) and op:
        for name in op:
            check_op(name)
        return op
    if not isinstance(op, str):
        kind = op.__name__ if isinstance(op, type) else type(op).__name__
        raise InvalidInput(
            f"expected op to be the name of a backend of attend ('dense', 'sdpa', ...), a tuple of such, or None. "
            f"Got {kind}; operators of xformers are not taken any more: use op=None, which picks the fastest backend "
            "that can."
        )
    check_backend_name(op)
    return op


def check_dropout(name: str, p: float) -> float:
    """``p`` when it is a probability below 1, else InvalidInput that names the option."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0.0 <= p < 1.0:
        raise InvalidInput(f"expected {name} in [0, 1). Got {p!r}.")
    return float(p)


def check_max_length(max_length: int | None) -> int | None:
    """``max_length`` when it is a number of tokens or None, else InvalidInput."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise InvalidInput(f"expected max_length of at least 1 token, or None. Got {max_length!r}.")
    return max_length


def place_rows(
    query: Tensor,
    key: Tensor,
    query_start: int | None,
    max_length: int | None = None,
    context: ContextParallel | None = None,
) -> tuple[int, int]:
    """One past the last position of the queries, and of the keys, of tensors that fit together.

    Over several ranks of a ``context`` tensors are shards, and positions those of the whole. Raises InvalidInput where
    tensors do not fit, or go beyond ``max_length``.

    Example:
        >>> place_rows(torch.zeros(1, 2, 1, 4), torch.zeros(1, 9, 1, 4), None)
        (9, 9)
    """
    context = over_ranks(context)
    if context is not None:
        query, key = whole_shapes(context, query, key)
    _, start = check_inputs(query, key, key, query_start=query_start)
    ends = start + query.shape[1], key.shape[1]
    if max_length is not None and max(ends) > max_length:
        raise InvalidInput(f"expected at most max_length = {max_length} tokens. Got positions up to {max(ends) - 1}.")
    return ends


def bias_from_mask(name: str, mask: Tensor, like: Tensor, *, true_takes_part: bool) -> Tensor:
    """``mask`` as a bias for ``attend``: a boolean mask becomes 0 and -inf, a float mask stays; in lse's precision.

    ``true_takes_part`` is F.scaled_dot_product_attention's meaning of a boolean mask; nn.MultiheadAttention's is the
    opposite. Raises InvalidInput for other dtypes.

    Example:
        >>> keep = torch.tensor([True, False])
        >>> bias_from_mask("mask", keep, torch.zeros(1), true_takes_part=True).tolist()
        [0.0, -inf]
    """
    check_mask_dtype(name, mask)
    if mask.dtype == torch.bool:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        hidden = ~mask if true_takes_part else mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(hidden, -torch.inf)
    return mask


def check_mask_dtype(name: str, mask: Tensor) -> None:
    """Raise InvalidInput for a mask that is neither boolean nor floating."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InvalidInput(f"expected {name} of dtype bool or float. Got {mask.dtype}; convert it with .bool().")


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
    return weights_of(q, k, lambda v: attend(q, k, v, pattern, **{**options, "backend": "dense"}))


def weights_of(q: Tensor, k: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights (B, H, Nq, Nk) of ``attention``, a linear function of values (B, Nk, Hkv, Dv): those of unit vectors.

    Example:
        >>> x = torch.zeros(1, 3, 1, 2)
        >>> weights_of(x, x, lambda v: v.flip(1)).int().tolist()
        [[[[0, 0, 1], [0, 1, 0], [1, 0, 0]]]]
    """
    batch, key_length, kv_heads, _ = k.shape
    columns = max(1, WEIGHTS_LIMIT**2 // max(key_length, 1))  # unit vectors take no more memory than the weights may
    parts = []
    for first in range(0, max(key_length, 1), columns):
        unit = torch.zeros(key_length, min(columns, key_length - first), dtype=q.dtype, device=q.device)
        unit.diagonal(-first).fill_(1)
        parts.append(attention(unit[None, :, None, :].expand(batch, key_length, kv_heads, unit.shape[1])))
    return torch.cat(parts, -1).permute(0, 2, 1, 3)


def check_weights(query: Tensor, key: Tensor) -> None:
    """Raise InvalidInput where weights (Nq, Nk) of ``query (B, Nq, ...)`` are more than those of 8192 tokens.

    Example:
        >>> check_weights(torch.empty(1, 10, 1, 1), torch.empty(1, 100_000, 1, 1))
    """
    if min(query.dim(), key.dim()) < 2:
        return  # not legal; attend says what is
    query_length, key_length = query.shape[1], key.shape[1]
    if query_length > WEIGHTS_LIMIT or query_length * key_length > WEIGHTS_LIMIT**2:
        rows = min(WEIGHTS_LIMIT, WEIGHTS_LIMIT**2 // max(key_length, 1))
        raise InvalidInput(
            f"need_weights gives a dense matrix, of at most {WEIGHTS_LIMIT} tokens. Got {query_length} queries and "
            f"{key_length} keys; ask for chosen rows, up to {rows} at once: layer(x[:, i:j], x, x, query_start=i, "
            "need_weights=True) has the weights of rows i to j - 1."
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers give for ``x``: autocast's where it is on, else x's own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
