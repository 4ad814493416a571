"""Block-sparse attention as layers: a table of blocks, given or built for the length at hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.compiling import run_eagerly
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import PatternAttention, check_max_length, place_rows
from dilated_attention_pytorch.nn.multihead import MultiheadPatternAttention
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import (
    BlockSparse,
    Causal,
    Pattern,
    axial,
    dilated_sparse,
    global_local,
    hierarchical,
    local_window,
    random_blocks,
    strided,
)
from dilated_attention_pytorch.scores import Score

LAYOUTS: dict[str, Callable[..., Pattern]] = {
    builder.__name__: builder
    for builder in (axial, dilated_sparse, global_local, hierarchical, local_window, random_blocks, strided)
}
"""The builders that layers know by name."""

LAYOUTS_KEPT = 16
"""How many tables of blocks are kept for all layers together; equal layers share them."""


class BlockSparseAttention(PatternAttention):
    """Attention of ready-made heads in which blocks of queries see some blocks of keys, without parameters.

    ``kind`` names a builder of `dilated_attention_pytorch.patterns` ("local_window", "dilated_sparse", "global_local",
    "axial", "strided", "random_blocks", "hierarchical"), and ``options`` are its options: ``block_size``, and
    ``density`` or the kind's own size. Or ``kind`` is a function called as builders are, ``kind(query_length,
    key_length, **options)``, that returns a pattern; ``pattern`` is one ready-made, for every length. ``per_head``
    gives each head a table of its own.

    The table is built for the length of each call, and the last few are kept. With ``max_length`` (tokens) it is built
    once, for that length, and shorter calls see its beginning: then a token's blocks do not depend on the length of the
    call, as decoding, padding and documents need where the kind is given by ``density``.

    Other options as in `DilatedAttention`. Raises InvalidInput for options that the kind does not have; for sizes that
    do not fit a length, when it is first met.

    Example:
        >>> q = k = v = torch.randn(1, 1000, 4, 16)
        >>> attention = BlockSparseAttention("local_window", block_size=64, density=0.2)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 16])
    """

    def __init__(
        self,
        kind: str | Callable[..., Pattern] | None = None,
        *,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | tuple[str, ...] | None = None,
        pattern: Pattern | None = None,
        score: Score | None = None,
        per_head: bool = False,
        max_length: int | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        super().__init__(softmax_scale, attention_dropout, op, score, context_parallel)
        self.kind, self.pattern, self.per_head = kind, pattern, per_head
        self.max_length = check_max_length(max_length)
        self.options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
        if pattern is not None:
            if kind is not None or per_head or max_length is not None or options:
                raise InvalidInput(
                    "pattern= replaces kind, per_head, max_length and the kind's options: leave those out."
                )
            if not isinstance(pattern, Pattern):
                raise InvalidInput(
                    f"expected pattern to be a Pattern, such as Window(256). Got {type(pattern).__name__}."
                )
            self.causal_pattern = pattern & Causal()
            return
        _check_options(self._builder(), self.options, per_head)

    def choose_pattern(self, query: Tensor, key: Tensor, is_causal: bool, query_start: int | None) -> Pattern:
        """The table for these lengths, causal on request."""
        if self.pattern is not None:
            return self.causal_pattern if is_causal else self.pattern
        pattern = self._built(query, key, query_start)
        return pattern & Causal() if is_causal else pattern

    @run_eagerly("BlockSparseAttention builds tables on the host: give it pattern=, or compile without fullgraph")
    def _built(self, query: Tensor, key: Tensor, query_start: int | None) -> Pattern:
        ends = tuple(max(end, 1) for end in place_rows(query, key, query_start, self.max_length, self.context_parallel))
        heads, options = query.shape[2] if self.per_head else None, tuple(self.options.items())
        builder = self._builder()
        if self.max_length is None:
            return _layout(builder, *_whole_blocks(builder, self.options, *ends), heads, options)
        return _beginning(_layout(builder, self.max_length, self.max_length, heads, options), *ends)

    def _builder(self) -> Callable[..., Pattern]:
        if callable(self.kind):
            return self.kind
        if self.kind not in LAYOUTS:
            raise InvalidInput(
                f"expected kind to be one of {tuple(LAYOUTS)}, a function of lengths, or pattern=. Got {self.kind!r}."
            )
        return LAYOUTS[self.kind]

    def extra_repr(self) -> str:
        """The kind and its options, or the pattern."""
        if self.pattern is not None:
            return f"{self.pattern.text()}, backend={self.backend!r}"
        words = [f"{name}={value!r}" for name, value in self.options.items()]
        kind = self.kind if isinstance(self.kind, str) else getattr(self.kind, "__name__", repr(self.kind))
        return ", ".join((kind, *words, f"per_head={self.per_head}", f"max_length={self.max_length}"))


class MultiheadBlockSparseAttention(MultiheadPatternAttention):
    """Projections, block-sparse attention, sub-LayerNorm and output projection.

    ``kind``, ``pattern``, ``per_head``, ``max_length`` and ``options`` are those of `BlockSparseAttention`, the others
    those of `MultiheadDilatedAttention`. ``position="xpos"`` counts from the middle of ``max_length``, and needs it.

    Example:
        >>> layer = MultiheadBlockSparseAttention(64, 4, "global_local", block_size=32, window=64, position="rotary")
        >>> layer(torch.randn(2, 200, 64), is_causal=True).shape
        torch.Size([2, 200, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kind: str | Callable[..., Pattern] | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        op: str | tuple[str, ...] | None = None,
        *,
        num_kv_heads: int | None = None,
        position: str = "none",
        pattern: Pattern | None = None,
        per_head: bool = False,
        max_length: int | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        if position == "xpos" and max_length is None:
            raise InvalidInput("xpos counts from the middle of max_length: give max_length=, or use 'rotary'.")
        attention = BlockSparseAttention(
            kind,
            attention_dropout=dropout,
            op=op,
            pattern=pattern,
            per_head=per_head,
            max_length=max_length,
            context_parallel=context_parallel,
            **options,
        )
        super().__init__(
            embed_dim,
            num_heads,
            attention,
            bias=bias,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
            num_kv_heads=num_kv_heads,
            position=position,
            segment_lengths=None if max_length is None else (max_length,),
        )


@lru_cache(maxsize=LAYOUTS_KEPT)
def _layout(
    builder: Callable[..., Pattern], query_end: int, key_length: int, heads: int | None, options: tuple[Any, ...]
) -> Pattern:
    """What the builder gives for these lengths; a builder of squares gets the longer one."""
    words = dict(options)
    if heads is not None:
        words["num_heads"] = heads
    if builder is axial:
        return builder(max(query_end, key_length), **words)
    return builder(query_end, key_length, **words)


def _whole_blocks(builder: Callable[..., Pattern], options: dict[str, Any], *lengths: int) -> tuple[int, ...]:
    """Lengths rounded up to whole blocks, where only the number of blocks matters: decoding then keeps its table."""
    if builder is axial or builder not in LAYOUTS.values():
        return lengths
    size = options.get("block_size", inspect.signature(builder).parameters["block_size"].default)
    if not isinstance(size, int) or size < 1:
        return lengths  # the builder says what is wrong
    return tuple(-(-n // size) * size for n in lengths)


def _beginning(pattern: Pattern, query_end: int, key_length: int) -> Pattern:
    """The pattern with no more of its table than these positions need."""
    if not isinstance(pattern, BlockSparse):
        return pattern
    rows, columns = (-(-end // size) for end, size in zip((query_end, key_length), pattern.block_size))
    return BlockSparse(pattern.block_size, pattern.layout[..., :rows, :columns])


def _check_options(builder: Callable[..., Pattern], options: dict[str, Any], per_head: bool) -> None:
    name = getattr(builder, "__name__", repr(builder))
    known = inspect.signature(builder).parameters
    own = [word for word, p in known.items() if p.kind is p.KEYWORD_ONLY and word != "num_heads"]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = sorted(set(options) - set(own))
    if unknown and not open_ended:
        raise InvalidInput(f"{name} has the options {own}. Got {unknown}; per_head=True gives each head a table.")
    if per_head and "num_heads" not in known and not open_ended:
        raise InvalidInput(f"{name} gives all heads one table: leave out per_head.")
    for word, value in options.items():
        try:
            hash(value)
        except TypeError as error:
            raise InvalidInput(
                f"expected {word} to be a number, a text or a tuple. Got {type(value).__name__}."
            ) from error
