"""The layers of versions 0.1 and 0.2 under their names: those of `nn` with the old signatures and defaults.

Nothing is computed here. An option that no longer changes anything keeps its place, and any value but the one that
describes what is done raises InvalidInput with the way to get it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dilated_attention_pytorch.core.config import (
    PATTERN_TYPES,
    DilatedAttentionConfig,
    RingAttentionConfig,
    SparseAttentionConfig,
)
from dilated_attention_pytorch.core.fields import Config
from dilated_attention_pytorch.core.ranks import dealt_by
from dilated_attention_pytorch.core.sparse import make_table
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.models import LongNet, LongNetLM
from dilated_attention_pytorch.nn import (
    BlockSparseAttention,
    DilatedAttention,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
)
from dilated_attention_pytorch.parallel.context import ContextParallel

__all__ = [
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DilatedAttention",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "DistributedMultiheadDilatedAttention",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "LongNet",
    "LongNetLM",
    "MultiheadDilatedAttention",
    "RingDilatedAttention",
    "RingMultiheadDilatedAttention",
    "SparsePatternConfig",
]

logger = logging.getLogger(__name__)

Device = torch.device | str | None
SPARSE_TYPES = (*(kind for kind in PATTERN_TYPES if kind != "learned"), "hierarchical", "strided")
"""What `SparsePatternConfig.pattern_type` may be."""
_WITH_WINDOW = ("global_local", "hierarchical", "local_window")


class ImprovedDilatedAttention(DilatedAttention):
    """`nn.DilatedAttention` with 0.2's parameters: the fastest backend for the machine.

    ``use_tf32`` is that of `DilatedAttentionConfig`. Other options are those of `nn.DilatedAttention`.

    Example:
        >>> q = torch.randn(1, 100, 4, 16)
        >>> ImprovedDilatedAttention([32, 64], [1, 2], dropout=0.0)(q, q, q).shape
        torch.Size([1, 100, 4, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = True,
        **options: Any,
    ) -> None:
        DilatedAttentionConfig(segment_lengths, dilation_rates, dropout, use_tf32).frozen()
        super().__init__(segment_lengths, dilation_rates, attention_dropout=dropout, **options)


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`nn.MultiheadDilatedAttention`, whose projections are fused; rates before segments.

    Example:
        >>> layer = ImprovedMultiheadDilatedAttention(64, 4, [1, 2], [32, 64])
        >>> layer(torch.randn(2, 100, 64)).shape, layer.qkv_proj.weight.shape
        (torch.Size([2, 100, 64]), torch.Size([192, 64]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        use_tf32: bool = True,
        **options: Any,
    ) -> None:
        DilatedAttentionConfig(segment_lengths, dilation_rates, dropout, use_tf32).frozen()
        options |= {"layer_norm": layer_norm, "layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init}
        options |= {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dilation_rates, segment_lengths, dropout, bias, **options)


class RingDilatedAttention(DilatedAttention):
    """`nn.DilatedAttention` over the ranks of the default process group, by the ring; exact on any number of them.

    Each rank gives and gets its shard of the tokens, as `ContextParallel.shard` cuts them; ``context_parallel`` sets
    another group, mesh, layout or method. On one process it takes the whole sequence, and every backend works block by
    block: memory beyond the tensors stays bounded at any length. ``use_tf32``, ``block_size``, ``ring_size`` and
    ``use_checkpointing`` are those of `RingAttentionConfig`. The layer has no parameters: it computes with its
    inputs' device and dtype, and a warning says so where others are named.

    Example:
        >>> q = torch.randn(1, 100, 4, 16)
        >>> RingDilatedAttention([32, 64], [1, 2], block_size=16)(q, q, q, is_causal=True).shape
        torch.Size([1, 100, 4, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = True,
        block_size: int = 1024,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        _check_ring(segment_lengths, dilation_rates, dropout, use_tf32, block_size, ring_size, use_checkpointing)
        for name, value in (("device", device), ("dtype", dtype)):
            if value is not None:
                logger.warning("RingDilatedAttention: %s=%s changes nothing: it computes with its inputs'", name, value)
        options["context_parallel"] = dealt_by("ring", context_parallel)
        super().__init__(segment_lengths, dilation_rates, attention_dropout=dropout, **options)


class RingMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`nn.MultiheadDilatedAttention` over the ranks of the default process group, by the ring.

    Mind the order of 0.2: here ``segment_lengths`` come before ``dilation_rates``. Ring options are those of
    `RingDilatedAttention`.

    Example:
        >>> layer = RingMultiheadDilatedAttention(64, 4, [32, 64], [1, 2])
        >>> layer(torch.randn(2, 100, 64), is_causal=True).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        block_size: int = 1024,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        use_tf32: bool = True,
        use_flash_attention: bool = True,
        compile_model: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        _check_ring(segment_lengths, dilation_rates, dropout, use_tf32, block_size, ring_size, use_checkpointing)
        _only(use_flash_attention=(use_flash_attention, True, "name another backend by op=, such as op='dense'"))
        _only(compile_model=(compile_model, False, "compile the layer by torch.compile(layer)"))
        options |= {"layer_norm": layer_norm, "layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init}
        options |= {"device": device, "dtype": dtype, "context_parallel": dealt_by("ring", context_parallel)}
        super().__init__(embed_dim, num_heads, dilation_rates, segment_lengths, dropout, bias, **options)


class DistributedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`nn.MultiheadDilatedAttention` over the ranks of the default process group, by the method that sends least.

    Rates before segments, as in 0.1. Each rank gives and gets its shard; on one process it is the whole.

    Example:
        >>> layer = DistributedMultiheadDilatedAttention(64, 4, [1, 2], [32, 64])
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        op: str | tuple[str, ...] | None = None,
        *,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        options |= {"op": op, "context_parallel": dealt_by("auto", context_parallel)}
        super().__init__(embed_dim, num_heads, dilation_rates, segment_lengths, dropout, **options)


@dataclass
class SparsePatternConfig(Config):
    """Which blocks are kept: the options of `nn.BlockSparseAttention` under the names of 0.2.

    ``sparsity_ratio`` is, as it was here in 0.2, the share of blocks that is **kept**; ``density`` says the same
    without doubt, and wins. With ``sparsity_ratio=None`` the size decides: ``local_window_size`` (tokens to either
    side; "local_window", "global_local" and "hierarchical"). ``global_tokens`` are rounded up to whole blocks
    ("global_local"). ``min_sparsity`` and ``max_sparsity`` bound the share kept. Content decides in
    `nn.AdaptiveSparseAttention`: "adaptive", "learned" and another ``adaptation_rate`` are refused here.

    Raises InvalidInput for values out of range, and types that are not known.

    Example:
        >>> SparsePatternConfig("local_window", 0.25, block_size=64).make_table([2048], [1])
        {'kind': 'local_window', 'block_size': 64, 'density': 0.25}
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: float | None = 0.25
    block_size: int = 128
    local_window_size: int = 512
    global_tokens: int = 64
    adaptation_rate: float = 0.1
    min_sparsity: float = 0.05
    max_sparsity: float = 0.95
    density: float | None = None

    def __post_init__(self) -> None:
        if self.pattern_type not in SPARSE_TYPES:
            raise InvalidInput(
                f"expected pattern_type to be one of {SPARSE_TYPES}. Got {self.pattern_type!r}; where the content "
                "decides, use AdaptiveSparseAttention."
            )
        _only(adaptation_rate=(self.adaptation_rate, 0.1, "use AdaptiveSparseAttention, which adapts on every call"))
        self._check_counts("block_size", "local_window_size", "global_tokens")
        kept = self.kept
        if kept is None:
            if self.pattern_type not in _WITH_WINDOW:
                raise InvalidInput(f"{self.pattern_type!r} has no window: give sparsity_ratio, the share kept.")
        elif not 0 < self.min_sparsity <= kept <= self.max_sparsity <= 1:
            raise InvalidInput(
                f"expected sparsity_ratio, the share of blocks kept, from min_sparsity ({self.min_sparsity}) to "
                f"max_sparsity ({self.max_sparsity}), in (0, 1]. Got {kept}; create_block_sparse_attention takes the "
                "share dropped, density= is the share kept in both."
            )

    def _advice(self) -> Mapping[str, str]:
        advice = {}
        if self.kept is not None:
            advice["local_window_size"] = "the share kept decides; give sparsity_ratio=None, and the window does"
        if self.pattern_type != "global_local":
            advice["global_tokens"] = f"{self.pattern_type!r} has no global blocks"
        return advice

    @property
    def kept(self) -> float | None:
        """The share of blocks kept; None where the size decides."""
        return self.sparsity_ratio if self.density is None else self.density

    def make_table(self, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> dict[str, Any]:
        """The options of `nn.BlockSparseAttention`; the rates are those of "dilated_sparse", in blocks."""
        config = SparseAttentionConfig(tuple(segment_lengths), tuple(dilation_rates), block_size=self.block_size)
        if self.pattern_type in PATTERN_TYPES:
            config = replace(config, pattern_type=self.pattern_type)
            table = make_table(config)
        else:
            table = {"kind": self.pattern_type, "block_size": self.block_size}
        if self.kept is None:
            table.pop("density", None)
            table["window"] = self.local_window_size
        else:
            table["density"] = self.kept
        if self.pattern_type == "global_local":
            table["global_blocks"] = -(-self.global_tokens // self.block_size)
        return table


class BlockSparseRingDilatedAttention(BlockSparseAttention):
    """`nn.BlockSparseAttention` over the ranks of the default process group, by the ring; one softmax over all blocks.

    The blocks of ``sparse_config`` decide who sees whom. ``dilation_rates`` are those of "dilated_sparse", in blocks.
    ``segment_lengths`` decide nothing, in 0.2 neither: they and the rates are checked only. Ring options are those of
    `RingDilatedAttention`.

    Example:
        >>> config = SparsePatternConfig("local_window", block_size=16)
        >>> q = torch.randn(1, 100, 4, 16)
        >>> BlockSparseRingDilatedAttention([32, 64], [1, 2], config)(q, q, q).shape
        torch.Size([1, 100, 4, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        sparse_config: SparsePatternConfig | None = None,
        use_adaptive_sparsity: bool = False,
        *,
        dropout: float = 0.0,
        use_tf32: bool = True,
        block_size: int = 1024,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        _check_ring(segment_lengths, dilation_rates, dropout, use_tf32, block_size, ring_size, use_checkpointing)
        config = _check_sparse(sparse_config, use_adaptive_sparsity)
        super().__init__(
            attention_dropout=dropout,
            context_parallel=dealt_by("ring", context_parallel),
            **config.make_table(segment_lengths, dilation_rates),
            **options,
        )


class BlockSparseRingDistributedDilatedAttention(BlockSparseRingDilatedAttention):
    """`BlockSparseRingDilatedAttention` by the method that sends least; hierarchical blocks unless said otherwise.

    Example:
        >>> q = torch.randn(1, 300, 2, 8)
        >>> BlockSparseRingDistributedDilatedAttention([32, 64], [1, 2])(q, q, q).shape
        torch.Size([1, 300, 2, 8])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        distributed_config: SparsePatternConfig | None = None,
        *,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        config = SparsePatternConfig("hierarchical") if distributed_config is None else distributed_config
        options["context_parallel"] = dealt_by("auto", context_parallel)
        super().__init__(segment_lengths, dilation_rates, config, **options)


class BlockSparseRingMultiheadDilatedAttention(MultiheadBlockSparseAttention):
    """`nn.MultiheadBlockSparseAttention` over the ranks of the default process group, by the ring.

    Without a sub-LayerNorm, as in 0.2, unless ``layer_norm=True``. Other options as in
    `BlockSparseRingDilatedAttention`.

    Example:
        >>> layer = BlockSparseRingMultiheadDilatedAttention(64, 4, sparse_config=SparsePatternConfig(block_size=16))
        >>> layer(torch.randn(2, 100, 64), is_causal=True).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = (2048, 4096, 8192),
        dilation_rates: Sequence[int] = (1, 2, 4),
        sparse_config: SparsePatternConfig | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        use_adaptive_sparsity: bool = False,
        ring_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        RingAttentionConfig(segment_lengths, dilation_rates, dropout, ring_size=ring_size).frozen()
        _only(batch_first=(batch_first, True, "tensors are (B, N, E): call the layer on x.transpose(0, 1)"))
        config = _check_sparse(sparse_config, use_adaptive_sparsity)
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            layer_norm=layer_norm,
            device=device,
            dtype=dtype,
            context_parallel=dealt_by("ring", context_parallel),
            **config.make_table(segment_lengths, dilation_rates),
            **options,
        )


def _check_ring(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    dropout: float,
    use_tf32: bool,
    block_size: int,
    ring_size: int | None,
    use_checkpointing: bool,
) -> None:
    """Raise InvalidInput, and warn of advice, as the config of a ring does where it is used."""
    branches, places = (segment_lengths, dilation_rates, dropout, use_tf32), (None, None)
    RingAttentionConfig(*branches, *places, block_size, ring_size, use_checkpointing).frozen()


def _check_sparse(config: SparsePatternConfig | None, use_adaptive_sparsity: bool) -> SparsePatternConfig:
    _only(
        use_adaptive_sparsity=(
            use_adaptive_sparsity,
            False,
            "use AdaptiveSparseAttention, MultiheadAdaptiveSparseAttention or create_adaptive_sparse_attention",
        )
    )
    if config is None:
        return SparsePatternConfig()
    if not isinstance(config, SparsePatternConfig):
        raise InvalidInput(f"expected sparse_config to be a SparsePatternConfig. Got {type(config).__name__}.")
    return config.frozen()


def _only(**given: tuple[object, object, str]) -> None:
    """Raise InvalidInput for a value other than the one that describes what is done."""
    for name, (value, described, instead) in given.items():
        if value != described:
            raise InvalidInput(f"expected {name}={described!r}. Got {value!r}; {instead}.")
