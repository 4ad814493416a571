"""Transformer blocks and stacks: pre-LayerNorm with MAGNETO's sub-LayerNorm (arXiv 2210.06423), dilated attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.attention import MultiheadDilatedAttention
from dilated_attention_pytorch.nn.base import check_dropout, compute_dtype
from dilated_attention_pytorch.nn.cache import KeyValueCache, LayerCache
from dilated_attention_pytorch.nn.old_keys import DECODER_BLOCK, ENCODER_BLOCK, rename_block_keys
from dilated_attention_pytorch.nn.positions import Rotation
from dilated_attention_pytorch.nn.shards import ShardRows, over_ranks, shard_rows
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import Documents, Full, Pattern

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def activation_name(activation: str | Callable[[Tensor], Tensor]) -> str:
    """The name of an activation given by name or as torch.nn.functional's function, so that configs can hold it.

    Example:
        >>> activation_name(F.relu), activation_name("gelu")
        ('relu', 'gelu')
    """
    for name, function in ACTIVATIONS.items():
        if activation == name or activation is function:
            return name
    raise InvalidInput(
        f"expected activation to be one of {tuple(ACTIVATIONS)}, or F.gelu and such. Got {activation!r}."
    )


def stack_gain(num_layers: int) -> float:
    """MAGNETO's gain of a stack alone, encoder-only or decoder-only: ``sqrt(ln(2 L))`` (figure 2)."""
    return math.sqrt(math.log(2 * num_layers))


def encoder_decoder_gains(num_encoder_layers: int, num_decoder_layers: int) -> tuple[float, float]:
    """MAGNETO's gains of encoder and decoder: ``sqrt(ln(3 M) ln(2 N) / 3)``, ``sqrt(ln(3 M))`` (figure 2).

    Example:
        >>> [round(gain, 3) for gain in encoder_decoder_gains(12, 12)]
        [1.948, 1.893]
    """
    decoder = math.log(3 * num_decoder_layers)
    return math.sqrt(decoder * math.log(2 * num_encoder_layers) / 3), math.sqrt(decoder)


class FeedForward(nn.Module):
    """``LayerNorm, Linear, activation, sub-LayerNorm, Linear``; (B, N, E) to (B, N, E), without the residual.

    Both weights start Xavier-normal with gain ``gamma_init``.

    Example:
        >>> FeedForward(8, 32)(torch.ones(1, 2, 8)).shape
        torch.Size([1, 2, 8])
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.gamma_init = activation_name(activation), gamma_init
        self.norm = nn.LayerNorm(d_model, eps=layer_norm_eps, device=device, dtype=dtype)
        self.linear1 = nn.Linear(d_model, dim_feedforward, device=device, dtype=dtype)
        self.sub_norm = nn.LayerNorm(dim_feedforward, eps=layer_norm_eps, device=device, dtype=dtype)
        self.linear2 = nn.Linear(dim_feedforward, d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(check_dropout("dropout", dropout))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as MAGNETO starts them."""
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_normal_(linear.weight, gain=self.gamma_init)
            nn.init.zeros_(linear.bias)
        self.norm.reset_parameters()
        self.sub_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """What the block adds to its residual stream, dropped out."""
        x = self.dropout(ACTIVATIONS[self.activation](self.linear1(self.norm(x))))
        return self.dropout(self.linear2(self.sub_norm(x)))  # type: ignore[no-any-return]


class DilatedTransformerEncoderLayer(nn.Module):
    """A block of dilated self-attention and feed-forward, each in a residual; decoder-only models stack it too.

    The first eleven parameters are those of 0.2. ``dropout`` acts on what the two parts add; attention weights have
    their own, ``attention_dropout``. The others are those of `MultiheadDilatedAttention`.

    Example:
        >>> block = DilatedTransformerEncoderLayer(64, 4, [32, 64], [1, 2])
        >>> block(torch.randn(2, 100, 64), is_causal=True).shape
        torch.Size([2, 100, 64])
    """

    _OLD_NAMES = ENCODER_BLOCK

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention_dropout: float = 0.0,
        num_kv_heads: int | None = None,
        position: str = "none",
        head_offset: str = "modulo",
        head_groups: bool = False,
        pattern: Pattern | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=layer_norm_eps, device=device, dtype=dtype)
        self.self_attn = MultiheadDilatedAttention(
            d_model,
            nhead,
            dilation_rates,
            segment_lengths,
            dropout=attention_dropout,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
            num_kv_heads=num_kv_heads,
            position=position,
            head_offset=head_offset,
            head_groups=head_groups,
            pattern=pattern,
        )
        self.dropout = nn.Dropout(check_dropout("dropout", dropout))
        self.feed_forward = FeedForward(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, device, dtype
        )

    def forward(
        self,
        src: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
        rows: ShardRows | None = None,
    ) -> Tensor:
        """The block's output (B, N, E); options as in `MultiheadDilatedAttention.forward`."""
        added = self.self_attn(
            self.norm(src),
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            rotation=rotation,
            documents=documents,
            cache=cache,
            **({} if rows is None else {"rows": rows}),
        )
        src = src + self.dropout(added)
        return src + self.feed_forward(src)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        rename_block_keys(state_dict, prefix, self._OLD_NAMES)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DilatedTransformerDecoderLayer(DilatedTransformerEncoderLayer):
    """An encoder layer with cross-attention to a memory between its two parts.

    ``cross_pattern`` says which memory rows a row sees, `Full` unless given. Cross-attention has no sub-LayerNorm, as
    in torchscale's MAGNETO, and no positions.

    Example:
        >>> block = DilatedTransformerDecoderLayer(64, 4, [32, 64], [1, 2])
        >>> block(torch.randn(2, 10, 64), torch.randn(2, 100, 64), tgt_is_causal=True).shape
        torch.Size([2, 10, 64])
    """

    _OLD_NAMES = DECODER_BLOCK

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention_dropout: float = 0.0,
        num_kv_heads: int | None = None,
        position: str = "none",
        head_offset: str = "modulo",
        head_groups: bool = False,
        pattern: Pattern | None = None,
        cross_pattern: Pattern | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            segment_lengths,
            dilation_rates,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            gamma_init,
            device,
            dtype,
            attention_dropout=attention_dropout,
            num_kv_heads=num_kv_heads,
            position=position,
            head_offset=head_offset,
            head_groups=head_groups,
            pattern=pattern,
        )
        self.cross_norm = nn.LayerNorm(d_model, eps=layer_norm_eps, device=device, dtype=dtype)
        self.cross_attn = MultiheadDilatedAttention(
            d_model,
            nhead,
            dropout=attention_dropout,
            layer_norm=False,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
            num_kv_heads=num_kv_heads,
            pattern=Full() if cross_pattern is None else cross_pattern,
        )

    def forward(  # type: ignore[override]  # a decoder layer reads a memory
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """The block's output (B, N, E) for ``tgt (B, N, E)`` and ``memory (B, M, E)``.

        With ``memory_is_causal`` row i of tgt sees memory rows up to i. Masks: True is padding, on the right.
        """
        added = self.self_attn(
            self.norm(tgt), key_padding_mask=key_padding_mask, is_causal=tgt_is_causal, rotation=rotation
        )
        tgt = tgt + self.dropout(added)
        added = self.cross_attn(
            self.cross_norm(tgt),
            memory,
            memory,
            key_padding_mask=memory_key_padding_mask,
            is_causal=memory_is_causal,
            query_start=0,
        )
        tgt = tgt + self.dropout(added)
        return tgt + self.feed_forward(tgt)  # type: ignore[no-any-return]


class DilatedTransformer(nn.Module):
    """Layers one after another, then a LayerNorm; positions are tabulated once for all layers.

    ``layers`` are `DilatedTransformerEncoderLayer`, or all `DilatedTransformerDecoderLayer`, which then need a memory.
    With ``checkpoint_activations`` training keeps only each layer's input and computes the rest again in backward.

    Example:
        >>> stack = DilatedTransformer([DilatedTransformerEncoderLayer(64, 4, [32], [1], 128) for _ in range(2)])
        >>> stack(torch.randn(1, 40, 64), is_causal=True).shape
        torch.Size([1, 40, 64])
    """

    def __init__(
        self, layers: Sequence[DilatedTransformerEncoderLayer], *, checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        if not layers:
            raise InvalidInput("expected at least one layer. Got none.")
        self.layers = nn.ModuleList(layers)
        weight, eps = layers[0].norm.weight, layers[0].norm.eps
        self.norm = nn.LayerNorm(layers[0].self_attn.embed_dim, eps=eps, device=weight.device, dtype=weight.dtype)
        self.checkpoint_activations = checkpoint_activations

    @property
    def context_parallel(self) -> ContextParallel | None:
        """How the layers' tokens are dealt over ranks, set by `set_context_parallel`; None: not at all."""
        return cast(DilatedTransformerEncoderLayer, self.layers[0]).self_attn.attention.context_parallel

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        is_causal: bool = False,
        memory_is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
        rows: ShardRows | None = None,
    ) -> Tensor:
        """All layers' output (B, N, E), normed. When it raises, the cache is as it was.

        Where layers deal tokens over several ranks, x and memory are this rank's shards, and ``rows`` says which rows x
        has; None finds it by a small all-gather.
        """
        self._check_memory(memory, memory_key_padding_mask, memory_is_causal, cache, documents)
        past = self._past(cache)
        context = over_ranks(self.context_parallel)
        if rows is None and context is not None:
            rows = shard_rows(context, x)
        rotation = self._rotation(x, past, position_ids, documents, rows)
        try:
            for i, layer in enumerate(self.layers):
                arguments: list[Any] = [x, is_causal]
                options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "rotation": rotation}
                if memory is not None:
                    arguments = [x, memory, is_causal, memory_is_causal]
                    options["memory_key_padding_mask"] = memory_key_padding_mask
                else:
                    options["documents"] = documents
                    options["cache"] = None if cache is None else cache.layers[i]
                    if i > 0:  # in the first layer ranks check that they ask for the same
                        options["rows"] = rows
                if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                    x = checkpoint(layer, *arguments, use_reentrant=False, **options)
                else:
                    x = layer(*arguments, **options)
        except BaseException:
            if cache is not None:
                cache.truncate(past)
            raise
        return self.norm(x)  # type: ignore[no-any-return]

    def _check_memory(
        self,
        memory: Tensor | None,
        mask: Tensor | None,
        memory_is_causal: bool,
        cache: KeyValueCache | None,
        documents: Documents | None,
    ) -> None:
        if isinstance(self.layers[0], DilatedTransformerDecoderLayer):
            if memory is None or cache is not None or documents is not None:
                raise InvalidInput("decoder layers read a memory (B, M, E): pass it, and neither cache nor documents.")
        elif memory is not None or mask is not None or memory_is_causal:
            raise InvalidInput("these layers have no cross-attention: leave out memory and its options.")

    def _past(self, cache: KeyValueCache | None) -> int:
        if cache is None:
            return 0
        if len(cache.layers) != len(self.layers):
            raise InvalidInput(f"expected a cache of {len(self.layers)} layers. Got one of {len(cache.layers)}.")
        return cache.length

    def _rotation(
        self,
        x: Tensor,
        past: int,
        position_ids: Tensor | None,
        documents: Documents | None,
        rows: ShardRows | None,
    ) -> Rotation | None:
        attention = cast(DilatedTransformerEncoderLayer, self.layers[0]).self_attn
        if attention.positions is None:
            if position_ids is not None:
                raise InvalidInput(
                    f"position={attention.position!r} has no use for position_ids; leave them out, or use 'rotary'."
                )
            return None
        length, at = (x.shape[1], None) if rows is None else rows
        return attention.positions.table(
            length,
            at=at,
            start=past,
            position_ids=position_ids,
            documents=documents,
            dtype=compute_dtype(x),
            device=x.device,
        )
