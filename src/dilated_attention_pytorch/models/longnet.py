"""Whole models of LongNet (arXiv 2307.02486): a language model, an encoder, and an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.models.config import (
    BASE_DILATION_RATES,
    BASE_SEGMENT_LENGTHS,
    LongNetConfig,
    LongNetEncoderConfig,
    LongNetLMConfig,
    TransformerConfig,
)
from dilated_attention_pytorch.models.copying import start_copying
from dilated_attention_pytorch.models.generation import generate_tokens
from dilated_attention_pytorch.models.parts import block_options, check_rows, config_options, encoder_stack
from dilated_attention_pytorch.models.pretrained import PretrainedModel
from dilated_attention_pytorch.nn.cache import KeyValueCache
from dilated_attention_pytorch.nn.convolution import ShortConvolution
from dilated_attention_pytorch.nn.shards import ShardRows, over_ranks, shard_rows
from dilated_attention_pytorch.nn.transformer import (
    DilatedTransformer,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    activation_name,
    encoder_decoder_gains,
    stack_gain,
)
from dilated_attention_pytorch.patterns import Documents, longnet


class LongNetLM(PretrainedModel):
    """A decoder-only language model: embedding, blocks of causal dilated attention, LayerNorm, logits.

    The parameters up to ``dtype`` stand in 0.2's order. A decoder-only model has one stack of
    ``num_encoder_layers + num_decoder_layers`` blocks; the paper's has 12. Embeddings start with variance 1 / d_model
    and are multiplied by sqrt(d_model), as in torchscale. Other options are those of `LongNetLMConfig`.

    Raises InvalidInput, which names the option, for values that are not legal or do not fit together.

    Example:
        >>> model = LongNetLM(256, 64, 4, num_decoder_layers=2, dim_feedforward=128,
        ...                   segment_lengths=[32, 64], dilation_rates=[1, 2])
        >>> model(torch.randint(256, (1, 100))).shape
        torch.Size([1, 100, 256])
    """

    config_class: ClassVar[type[TransformerConfig]] = LongNetLMConfig
    config: LongNetLMConfig

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 0,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = BASE_SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = BASE_DILATION_RATES,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention_dropout: float = 0.0,
        position: str = "rotary",
        num_kv_heads: int | None = None,
        head_offset: str = "modulo",
        head_groups: bool = False,
        tie_embeddings: bool = True,
        embedding_width: int = 1,
        copying_start: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if min(num_encoder_layers, num_decoder_layers) < 0:
            raise InvalidInput(f"expected numbers of layers >= 0. Got {num_encoder_layers} and {num_decoder_layers}.")
        self.config = LongNetLMConfig(
            num_tokens=num_tokens,
            d_model=d_model,
            nhead=nhead,
            num_layers=num_encoder_layers + num_decoder_layers,
            dim_feedforward=dim_feedforward,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            dropout=dropout,
            activation=activation_name(activation),
            layer_norm_eps=layer_norm_eps,
            attention_dropout=attention_dropout,
            position=position,
            num_kv_heads=num_kv_heads,
            head_offset=head_offset,
            head_groups=head_groups,
            tie_embeddings=tie_embeddings,
            embedding_width=embedding_width,
            copying_start=copying_start,
            checkpoint_activations=checkpoint_activations,
        )
        self.embedding = nn.Embedding(num_tokens, d_model, device=device, dtype=dtype)
        self.convolution = (
            ShortConvolution(d_model, embedding_width, device=device, dtype=dtype) if embedding_width > 1 else None
        )
        self.dropout = nn.Dropout(dropout)
        layers = self.config.num_layers
        self.decoder = encoder_stack(self.config, layers, stack_gain(layers), device, dtype)
        self.head = None if tie_embeddings else nn.Linear(d_model, num_tokens, bias=False, device=device, dtype=dtype)
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=d_model**-0.5)
        if self.convolution is not None and copying_start:
            first = cast(DilatedTransformerEncoderLayer, self.decoder.layers[0])
            start_copying(self.embedding, self.convolution, first.self_attn)

    @classmethod
    def _arguments(cls, config: LongNetLMConfig) -> dict[str, Any]:
        options = config_options(config)
        options["num_decoder_layers"] = options.pop("num_layers")
        return options

    def forward(
        self,
        tokens: Tensor,
        is_causal: bool = True,
        *,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits (B, N, num_tokens) of the token after each of ``tokens (B, N)``, integers.

        ``key_padding_mask (B, N)``: True is padding, on the right. ``position_ids`` (N,) or (B, N). Segments and
        positions restart in each of ``documents``, packed one after another in N. With a ``cache`` from `new_cache`,
        tokens follow those seen so far and are remembered; call it under torch.no_grad().

        After `nn.set_context_parallel` tokens, mask, position_ids and logits are this rank's shards; documents are
        those of the whole sequence, and there is no cache.

        Raises InvalidInput for tokens that are not in the vocabulary or not integers; the cache stays as it was.
        """
        hidden = self.hidden(
            tokens,
            is_causal,
            key_padding_mask=key_padding_mask,
            position_ids=position_ids,
            documents=documents,
            cache=cache,
        )
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Tensor,
        is_causal: bool = True,
        *,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The last LayerNorm's output (B, N, d_model), from which `logits` reads; arguments as in ``forward``."""
        self._check_tokens(tokens)
        if cache is not None and not is_causal:
            raise InvalidInput("a cache serves causal models: earlier tokens cannot see later ones any more.")
        context = over_ranks(self.decoder.context_parallel)
        rows = None if context is None else shard_rows(context, tokens)
        seen = tokens
        if self.convolution is not None and cache is not None and cache.tokens is not None:
            if cache.tokens.shape[0] != tokens.shape[0]:
                raise InvalidInput(
                    f"the cache holds {cache.tokens.shape[0]} samples. Got {tokens.shape[0]}; start another cache."
                )
            seen = torch.cat((cache.tokens, tokens), 1)
        out: Tensor = self.decoder(
            self.dropout(self._embedded(seen, tokens.shape[1], documents, rows)),
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            position_ids=position_ids,
            documents=documents,
            cache=cache,
            rows=rows,
        )
        if self.convolution is not None and cache is not None:
            cache.tokens = seen
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., num_tokens) of hidden states (..., d_model)."""
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def new_cache(self) -> KeyValueCache:
        """An empty key-value cache for this model; it takes the batch size of the first tokens."""
        return KeyValueCache(self.config.num_layers)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Iterable[int] | None = None,
        seed: int | None = None,
        stream: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The prompt (B, N) or (N,) with up to ``max_new_tokens`` drawn tokens behind it, of the prompt's dtype.

        ``temperature`` 0 takes the likeliest token. ``top_k`` keeps the k likeliest tokens, then ``top_p`` the fewest
        whose probabilities reach p. A row that drew one of the ``stop`` tokens repeats it; when all rows have, drawing
        ends. ``seed`` makes a call reproducible; None draws a fresh one, and torch's global generator stays untouched.
        ``stream`` is called with the tokens (B,) of each step as they come. Runs in evaluation mode without gradients.

        Raises InvalidInput for an empty prompt and for numbers out of range.

        Example:
            >>> model = LongNetLM(16, 32, 2, 0, 1, 64, [8], [1])
            >>> model.generate(torch.tensor([1, 2, 3]), max_new_tokens=5, seed=0).shape
            torch.Size([8])
        """
        return generate_tokens(
            self,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            stream=stream,
        )

    def _embedded(self, seen: Tensor, count: int, documents: Documents | None, rows: ShardRows | None) -> Tensor:
        """Input rows of the last ``count`` of the tokens seen so far, (B, count, d_model); or those of a shard."""
        if self.convolution is None:
            return self.embedding(seen) * self.config.d_model**0.5  # type: ignore[no-any-return]
        if rows is not None:
            return self._embedded_shard(seen, self.convolution, documents, rows)
        near = seen[:, -(count + self.convolution.width - 1) :]
        out: Tensor = self.convolution(self.embedding(near) * self.config.d_model**0.5, documents)
        return out[:, out.shape[1] - count :]

    def _embedded_shard(
        self, shard: Tensor, convolution: ShortConvolution, documents: Documents | None, rows: ShardRows
    ) -> Tensor:
        """The same of this rank's rows; the tokens before them may be other ranks', so all tokens are gathered."""
        assert self.decoder.context_parallel is not None
        tokens = self.decoder.context_parallel.unshard(shard, length=rows.length)
        at = torch.arange(rows.length, device=shard.device) if rows.at is None else rows.at
        place = at if documents is None else documents.locate(at)[1].view(-1, at.shape[0])
        scale = self.config.d_model**0.5
        return convolution.over(lambda k: self.embedding(tokens[:, (at - k).clamp(min=0)]) * scale, place)

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor):
            raise InvalidInput(f"expected tokens to be a tensor. Got {type(tokens).__name__}; torch.tensor it.")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise InvalidInput(
                f"expected tokens of shape (B, N), int64 or int32. Got {tuple(tokens.shape)}, {tokens.dtype}; "
                "a single sample needs a batch dim: tokens[None]; bytes need .long()."
            )
        # Elsewhere the look would wait for the device, and the embedding's own assert speaks.
        if tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.compiler.is_compiling():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= self.config.num_tokens:
                raise InvalidInput(
                    f"expected tokens from 0 to {self.config.num_tokens - 1}. Got values from {low} to {high}."
                )


class LongNetEncoder(PretrainedModel):
    """An encoder of continuous inputs, such as the tile embeddings of a slide: (B, N, d_model) to (B, N, d_model).

    Parameters stand in `LongNetLM`'s order; other options are those of `LongNetEncoderConfig`.

    Example:
        >>> model = LongNetEncoder(64, 4, 2, 128, [32, 64], [1, 2])
        >>> model(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    config_class: ClassVar[type[TransformerConfig]] = LongNetEncoderConfig
    config: LongNetEncoderConfig

    def __init__(
        self,
        d_model: int = 768,
        nhead: int = 12,
        num_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = BASE_SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = BASE_DILATION_RATES,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention_dropout: float = 0.0,
        position: str = "rotary",
        num_kv_heads: int | None = None,
        head_offset: str = "modulo",
        head_groups: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config = LongNetEncoderConfig(
            d_model=d_model,
            nhead=nhead,
            num_layers=num_layers,
            dim_feedforward=dim_feedforward,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            dropout=dropout,
            activation=activation_name(activation),
            layer_norm_eps=layer_norm_eps,
            attention_dropout=attention_dropout,
            position=position,
            num_kv_heads=num_kv_heads,
            head_offset=head_offset,
            head_groups=head_groups,
            checkpoint_activations=checkpoint_activations,
        )
        self.encoder = encoder_stack(self.config, num_layers, stack_gain(num_layers), device, dtype)

    @classmethod
    def _arguments(cls, config: LongNetEncoderConfig) -> dict[str, Any]:
        return config_options(config)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Encoded rows (B, N, d_model) of ``x (B, N, d_model)``; rows of padding hold numbers without meaning.

        ``key_padding_mask (B, N)``: True is padding, on the right; a padded sample's rows equal those of the sample
        alone.
        """
        check_rows("x", x, self.config.d_model)
        return self.encoder(  # type: ignore[no-any-return]
            x,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            position_ids=position_ids,
            documents=documents,
        )


class LongNet(PretrainedModel):
    """An encoder-decoder of continuous inputs: (B, M, d_model) and (B, N, d_model) to (B, N, d_model).

    The parameters up to ``dtype`` stand in 0.2's order; other options are those of `LongNetConfig`. Cross-attention
    sees the whole memory unless ``cross_attention="longnet"``.

    Example:
        >>> model = LongNet(64, 4, 1, 1, 128, [32, 64], [1, 2])
        >>> model(torch.randn(1, 100, 64), torch.randn(1, 7, 64)).shape
        torch.Size([1, 7, 64])
    """

    config_class: ClassVar[type[TransformerConfig]] = LongNetConfig
    config: LongNetConfig

    def __init__(
        self,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = BASE_SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = BASE_DILATION_RATES,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention_dropout: float = 0.0,
        position: str = "rotary",
        num_kv_heads: int | None = None,
        head_offset: str = "modulo",
        head_groups: bool = False,
        cross_attention: str = "full",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config = config = LongNetConfig(
            d_model=d_model,
            nhead=nhead,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            dim_feedforward=dim_feedforward,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            dropout=dropout,
            activation=activation_name(activation),
            layer_norm_eps=layer_norm_eps,
            attention_dropout=attention_dropout,
            position=position,
            num_kv_heads=num_kv_heads,
            head_offset=head_offset,
            head_groups=head_groups,
            cross_attention=cross_attention,
            checkpoint_activations=checkpoint_activations,
        )
        encoder_gain, decoder_gain = encoder_decoder_gains(num_encoder_layers, num_decoder_layers)
        self.encoder = encoder_stack(config, num_encoder_layers, encoder_gain, device, dtype)
        options = block_options(config)
        if cross_attention == "longnet":
            options["cross_pattern"] = longnet(
                config.segment_lengths, config.dilation_rates, head_offset=head_offset, head_groups=head_groups
            )
        self.decoder = DilatedTransformer(
            [
                DilatedTransformerDecoderLayer(**options, gamma_init=decoder_gain, device=device, dtype=dtype)
                for _ in range(num_decoder_layers)
            ],
            checkpoint_activations=checkpoint_activations,
        )

    @classmethod
    def _arguments(cls, config: LongNetConfig) -> dict[str, Any]:
        return config_options(config)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor | None = None,
        *,
        is_causal: bool = True,
        memory_is_causal: bool = False,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Decoded rows (B, N, d_model) of ``tgt (B, N, d_model)`` given ``src (B, M, d_model)``; tgt None means src.

        ``is_causal`` is the decoder's self-attention. The encoder sees all of src and the decoder all of the memory,
        unless ``memory_is_causal``: then row i of the output depends on src and tgt up to i only, as always in 0.2 with
        its is_causal. Masks (B, M), (B, N): True is padding, on the right; when tgt is None src's mask serves both.
        """
        check_rows("src", src, self.config.d_model)
        if tgt is None:
            if tgt_key_padding_mask is not None:
                raise InvalidInput("tgt is src here, and so is its mask: leave out tgt_key_padding_mask.")
            tgt, tgt_key_padding_mask = src, src_key_padding_mask
        check_rows("tgt", tgt, self.config.d_model)
        memory = self.encoder(src, is_causal=memory_is_causal, key_padding_mask=src_key_padding_mask)
        return self.decoder(  # type: ignore[no-any-return]
            tgt,
            memory,
            is_causal=is_causal,
            memory_is_causal=memory_is_causal,
            key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=src_key_padding_mask,
        )
