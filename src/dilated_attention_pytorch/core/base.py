"""What a layer of one's own starts from: made of configs, checked inputs, a bounded cache, MAGNETO's start.

Both are working layers as they stand, the ones of `nn` under constructors of configs: subclasses change what they
need. Deep copies and pickles work before and after a forward; what was cached is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.core.config import DilatedAttentionConfig, MultiheadConfig
from dilated_attention_pytorch.core.fields import one_of
from dilated_attention_pytorch.core.validation import ValidationMixin
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import PatternAttention
from dilated_attention_pytorch.nn.multihead import MultiheadPatternAttention
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import Causal, Pattern, longnet

CACHED = 100
"""How many values a layer's cache keeps, unless told."""

Value = TypeVar("Value")


class BaseDilatedAttention(PatternAttention, ValidationMixin):
    """Attention of ready-made heads (B, N, H, D), made of a config. Subclass it, and override what is to differ.

    ``choose_pattern`` says who sees whom (LongNet's branches, unless overridden), ``forward`` what is computed with it.
    ``self._cached(key, compute)`` keeps what is expensive to make, and `_validate_forward_inputs` checks heads.
    ``self.config`` is a frozen copy; ``self.device`` and ``self.dtype`` are for parameters of the subclass.

    Example:
        >>> import torch
        >>> class Doubled(BaseDilatedAttention):
        ...     def forward(self, query, key, value, *args, **options):
        ...         return 2 * super().forward(query, key, value, *args, **options)
        >>> q = torch.randn(1, 100, 4, 8)
        >>> Doubled(DilatedAttentionConfig([32, 64], [1, 2]))(q, q, q, is_causal=True).shape
        torch.Size([1, 100, 4, 8])
    """

    def __init__(
        self,
        config: DilatedAttentionConfig,
        *,
        softmax_scale: float | None = None,
        op: str | tuple[str, ...] | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
        cache_size: int = CACHED,
    ) -> None:
        super().__init__(softmax_scale, config.dropout, op, None, context_parallel)
        self.config = config.frozen()
        self.segment_lengths, self.dilation_rates = (
            tuple(self.config.segment_lengths),
            tuple(self.config.dilation_rates),
        )
        self.num_groups, self.dropout = self.config.num_groups, self.config.dropout
        self.device, self.dtype = self.config.device, self.config.dtype
        self.pattern = longnet(self.segment_lengths, self.dilation_rates)
        self.causal_pattern = self.pattern & Causal()
        self._cache = BoundedCache(cache_size)

    def choose_pattern(self, query: Tensor, key: Tensor, is_causal: bool, query_start: int | None) -> Pattern:
        """The config's branches, causal on request."""
        return self.causal_pattern if is_causal else self.pattern

    def clear_cache(self) -> None:
        """What was cached is forgotten."""
        self._cache.clear()

    def extra_repr(self) -> str:
        """The config."""
        return (
            f"segment_lengths={self.segment_lengths}, dilation_rates={self.dilation_rates}, dropout={self.dropout}, "
            f"backend={self.backend!r}"
        )

    def _cached(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of ``key``, computed if it is not kept; thread-safe, and bounded by ``cache_size``."""
        return self._cache.get(key, compute)

    def _validate_forward_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Raise InvalidInput unless these are heads (B, N, H, D) that fit together, with a mask over their pairs."""
        names, tensors = ("query", "key", "value"), (query, key, value)
        for name, tensor in zip(names, tensors):
            self.validate_batch_first_format(tensor, name)
        self.validate_tensor_shapes_match(tensors, names, dims_to_check=(0,))
        self.validate_tensor_shapes_match(tensors[1:], names[1:], dims_to_check=(1, 2))
        self.validate_tensor_shapes_match(tensors[:2], names[:2], dims_to_check=(3,))
        self.validate_device_dtype_consistency(tensors, names)
        if key.shape[2] == 0 or query.shape[2] % key.shape[2] != 0:
            raise InvalidInput(f"query has {query.shape[2]} heads, which must be a multiple of key's {key.shape[2]}")
        self.validate_sequence_length(query.shape[1], self.segment_lengths)
        self.validate_attention_mask(attention_mask, query.shape[0], query.shape[1], key_len=key.shape[1])


class BaseMultiheadDilatedAttention(MultiheadPatternAttention, ValidationMixin):
    """Projections around attention of heads, made of two configs. Subclass it, and override what is to differ.

    ``_create_attention_module`` makes the attention of heads: a `PatternAttention`, such as a `BaseDilatedAttention`.
    Projections start as MAGNETO's (arXiv 2210.06423, figure 2): gain ``gamma_init`` for values and output, 1 for
    queries and keys (`reset_parameters`). Configs are kept as frozen copies. Where both configs name a device or a
    dtype it is the same one; InvalidInput otherwise.

    Example:
        >>> import torch
        >>> branches = DilatedAttentionConfig([32, 64], [1, 2])
        >>> BaseMultiheadDilatedAttention(MultiheadConfig(64, 4), branches)(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    multihead_config: MultiheadConfig
    attention_config: DilatedAttentionConfig

    def __init__(
        self,
        multihead_config: MultiheadConfig,
        attention_config: DilatedAttentionConfig,
        *,
        position: str = "none",
        num_kv_heads: int | None = None,
    ) -> None:
        sizes, branches = multihead_config.frozen(), attention_config.frozen()
        self.__dict__.update(multihead_config=sizes, attention_config=branches)  # for the method, before modules exist
        device: torch.device | str | None = one_of("device", sizes.device, branches.device)
        super().__init__(
            sizes.embed_dim,
            sizes.num_heads,
            self._create_attention_module(),
            bias=sizes.bias,
            layer_norm=sizes.layer_norm,
            layer_norm_eps=sizes.layer_norm_eps,
            gamma_init=sizes.gamma_init,
            device=device,
            dtype=one_of("dtype", sizes.dtype, branches.dtype),
            num_kv_heads=num_kv_heads,
            position=position,
            segment_lengths=branches.segment_lengths,
        )

    def _create_attention_module(self) -> PatternAttention:
        """The attention of heads; ``self.multihead_config`` and ``self.attention_config`` are there."""
        return BaseDilatedAttention(self.attention_config)

    def extra_repr(self) -> str:
        """Sizes, and the config's options."""
        sizes = self.multihead_config
        return f"embed_dim={self.embed_dim}, {super().extra_repr()}, layer_norm={sizes.layer_norm}, bias={sizes.bias}"

    def _validate_forward_inputs(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> None:
        """Raise InvalidInput unless these are embeddings (B, N, E) that fit together, and padding (B, Nk) of keys."""
        key, value = query if key is None else key, query if value is None else value
        names, tensors = ("query", "key", "value"), (query, key, value)
        for name, tensor in zip(names, tensors):
            self.validate_batch_first_format(tensor, name, expected_dims=3)
        self.validate_tensor_shapes_match(tensors, names, dims_to_check=(0, 2))
        self.validate_tensor_shapes_match(tensors[1:], names[1:], dims_to_check=(1,))
        self.validate_device_dtype_consistency(tensors, names)
        if query.shape[2] != self.embed_dim:
            raise InvalidInput(f"query must have embed_dim ({self.embed_dim}) channels, got {query.shape[2]}")
        if key_padding_mask is not None and tuple(key_padding_mask.shape) != tuple(key.shape[:2]):
            raise InvalidInput(
                f"key_padding_mask must have shape (B, Nk) = {tuple(key.shape[:2])}, got "
                f"{tuple(key_padding_mask.shape)}"
            )
