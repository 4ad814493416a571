"""Dilated attention as layers: heads in and out, or embeddings in and out with MAGNETO's sub-LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import PatternAttention
from dilated_attention_pytorch.nn.multihead import MultiheadPatternAttention
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import Causal, Pattern, longnet
from dilated_attention_pytorch.scores import Score


class DilatedAttention(PatternAttention):
    """Dilated attention of ready-made heads, without parameters (LongNet, arXiv 2307.02486, section 2).

    ``segment_lengths`` (tokens) and ``dilation_rates`` are equally long lists of branches; ``pattern`` replaces both.
    ``softmax_scale`` None is 1/sqrt(D). ``attention_dropout`` acts in training mode only, and on the CPU on the slow
    ``dense`` backend, as do masks and ``score``. ``op`` names a backend of `attend`, or several, of which each call
    takes the first that can; None picks one. ``head_offset`` and ``head_groups`` are those of `longnet`. With
    ``context_parallel``, a `ContextParallel` or a mesh of one dim, tokens are dealt over ranks: the layer takes and
    gives this rank's shards (`set_context_parallel`).

    Raises InvalidInput for branches that do not fit, or an ``op`` that is not a backend's name.

    Example:
        >>> q = k = v = torch.randn(1, 100, 4, 16)
        >>> DilatedAttention([32, 64], [1, 2])(q, k, v, is_causal=True).shape
        torch.Size([1, 100, 4, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | tuple[str, ...] | None = None,
        *,
        head_offset: str = "modulo",
        head_groups: bool = False,
        pattern: Pattern | None = None,
        score: Score | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
    ) -> None:
        super().__init__(softmax_scale, attention_dropout, op, score, context_parallel)
        self.pattern = _choose_pattern(segment_lengths, dilation_rates, pattern, head_offset, head_groups)
        self.causal_pattern = self.pattern & Causal()
        self.segment_lengths = None if segment_lengths is None else tuple(segment_lengths)
        self.dilation_rates = None if dilation_rates is None else tuple(dilation_rates)

    def choose_pattern(self, query: Tensor, key: Tensor, is_causal: bool, query_start: int | None) -> Pattern:
        """The branches, causal on request."""
        return self.causal_pattern if is_causal else self.pattern

    def extra_repr(self) -> str:
        """The pattern and the options."""
        return f"{self.pattern.text()}, attention_dropout={self.attention_dropout}, backend={self.backend!r}"


class MultiheadDilatedAttention(MultiheadPatternAttention):
    """Projections, dilated attention, sub-LayerNorm and output projection: a drop-in for nn.MultiheadAttention.

    Mind the order of 0.2: ``dilation_rates`` come before ``segment_lengths``. ``pattern`` replaces both. ``layer_norm``
    puts MAGNETO's sub-LayerNorm before the output projection; value and output projections start Xavier-normal with
    gain ``gamma_init``, query and key with gain 1, biases 0 (arXiv 2210.06423, figure 2). ``dropout`` is attention
    dropout. ``num_kv_heads`` below ``num_heads`` shares keys and values among groups of heads. ``position`` is "none",
    "rotary", "xpos" (for causal attention) or "alibi"; "alibi", masks and dropout run on the slow
    ``dense`` backend. ``context_parallel`` as in `DilatedAttention`.

    Raises InvalidInput for sizes that do not divide, or options that do not go together.

    Example:
        >>> layer = MultiheadDilatedAttention(64, 4, dilation_rates=[1, 2], segment_lengths=[32, 64], position="rotary")
        >>> layer(torch.randn(2, 100, 64), is_causal=True).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int] | None = None,
        segment_lengths: Sequence[int] | None = None,
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
        head_offset: str = "modulo",
        head_groups: bool = False,
        pattern: Pattern | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
    ) -> None:
        if pattern is None and head_groups and segment_lengths is not None and num_heads < len(segment_lengths):
            raise InvalidInput(
                f"head_groups deals {num_heads} heads out among {len(segment_lengths)} branches: expected at least as "
                "many heads. Use more heads, fewer branches, or head_groups=False."
            )
        attention = DilatedAttention(
            segment_lengths,
            dilation_rates,
            attention_dropout=dropout,
            op=op,
            head_offset=head_offset,
            head_groups=head_groups,
            pattern=pattern,
            context_parallel=context_parallel,
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
            segment_lengths=segment_lengths,
        )


def _choose_pattern(
    segment_lengths: Sequence[int] | None,
    dilation_rates: Sequence[int] | None,
    pattern: Pattern | None,
    head_offset: str,
    head_groups: bool,
) -> Pattern:
    if pattern is not None:
        if segment_lengths is not None or dilation_rates is not None or head_groups or head_offset != "modulo":
            raise InvalidInput(
                "pattern= replaces segment_lengths, dilation_rates, head_offset and head_groups: leave those out."
            )
        if not isinstance(pattern, Pattern):
            raise InvalidInput(f"expected pattern to be a Pattern, such as Window(256). Got {type(pattern).__name__}.")
        return pattern
    if segment_lengths is None or dilation_rates is None:
        raise InvalidInput("expected segment_lengths and dilation_rates, or pattern=. Got neither in full.")
    return longnet(segment_lengths, dilation_rates, head_offset=head_offset, head_groups=head_groups)
