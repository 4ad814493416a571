"""The configs of 0.2: dataclasses, checked at construction, that go to dicts and JSON and back.

They may be changed until they are used: a layer takes a frozen copy, `Config.frozen`, which checks anew. What a field
cannot do any more is said there: fields that only ever advised how to compute are named in a warning when they were
set, and fields that would change what is computed, and cannot, raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from dilated_attention_pytorch.core.fields import Config
from dilated_attention_pytorch.core.names import nearest
from dilated_attention_pytorch.core.ranks import check_ranks, rank_of_world
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import MemoryPoolConfig

__all__ = [
    "DilatedAttentionConfig",
    "DistributedConfig",
    "MemoryPoolConfig",
    "MultiheadConfig",
    "RingAttentionConfig",
    "SparseAttentionConfig",
]

PATTERN_TYPES = ("dilated_sparse", "local_window", "global_local", "axial", "random", "learned", "hybrid")
"""What `SparseAttentionConfig.pattern_type` may be."""

KEPT_AND_DROPPED = (
    "sparsity_ratio is the share of blocks kept in SparseAttentionConfig and the share dropped in "
    "create_block_sparse_attention; density is the share kept in both"
)
SHARE_KEPT = 0.25
"""`SparseAttentionConfig.sparsity_ratio`, unless given."""

SHARES_BOUND = (0.1, 0.9)
"""`SparseAttentionConfig.min_sparsity` and ``max_sparsity``, unless given."""


@dataclass
class DilatedAttentionConfig(Config):
    """Branches of dilated attention: ``segment_lengths`` (tokens), ``dilation_rates``, one for each, and ``dropout``.

    ``device`` and ``dtype`` are those of a layer's parameters; None is PyTorch's default (0.2 looked for a GPU here).
    ``use_tf32=True`` lets the process decide, and sets nothing: `torch.set_float32_matmul_precision` is PyTorch's
    switch. With False a layer is refused while that switch allows TF32.

    Raises InvalidInput for lists that do not fit, and values out of range.

    Example:
        >>> config = DilatedAttentionConfig([2048, 4096, 8192], [1, 2, 4], dropout=0.1)
        >>> config.num_groups, config.max_segment_length
        (3, 8192)
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    dropout: float = 0.0
    use_tf32: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.segment_lengths, self.dilation_rates = tuple(self.segment_lengths), tuple(self.dilation_rates)
        self.validate_segment_dilation_match(self.segment_lengths, self.dilation_rates)
        for name in ("segment_lengths", "dilation_rates"):
            self.validate_positive_values(getattr(self, name), name)
            if any(not isinstance(value, int) for value in getattr(self, name)):
                raise InvalidInput(f"{name} must be ints, got {getattr(self, name)}")
        self.validate_dropout_prob(self.dropout)
        self._check_flags("use_tf32")
        self._place()

    @property
    def num_groups(self) -> int:
        """The number of branches."""
        return len(self.segment_lengths)

    @property
    def max_segment_length(self) -> int:
        """The longest segment, in tokens."""
        return max(self.segment_lengths)

    def _check_use(self) -> None:
        if not self.use_tf32 and torch.get_float32_matmul_precision() != "highest":
            raise InvalidInput(
                "use_tf32=False: this process allows TF32 in float32 matrix products, for all layers together; call "
                'torch.set_float32_matmul_precision("highest") first'
            )


@dataclass
class MultiheadConfig(Config):
    """Projections around attention: sizes, biases, MAGNETO's sub-LayerNorm and gain (arXiv 2210.06423).

    ``device`` and ``dtype`` are those of the parameters; None is PyTorch's default. Raises InvalidInput for sizes that
    do not divide, and values out of range.

    Example:
        >>> MultiheadConfig(768, 12).head_dim
        64
        >>> MultiheadConfig(768, 13)
        Traceback (most recent call last):
        dilated_attention_pytorch.errors.InvalidInput: embed_dim (768) must be divisible by num_heads (13). \
Got head_dim=59.08
    """

    embed_dim: int
    num_heads: int
    bias: bool = True
    layer_norm: bool = True
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._check_counts("embed_dim", "num_heads")
        self.validate_head_dim(self.embed_dim, self.num_heads)
        self._check_flags("bias", "layer_norm")
        for name in ("layer_norm_eps", "gamma_init"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidInput(f"{name} must be positive, got {value!r}")
        self._place()

    @property
    def head_dim(self) -> int:
        """The dim of a head."""
        return self.embed_dim // self.num_heads


@dataclass
class RingAttentionConfig(DilatedAttentionConfig):
    """Branches whose tokens are dealt over the ranks of a ring.

    ``ring_size`` is checked where the layer is made: as many ranks as the process group has; 1, or None, without one.
    The others advise how to compute, and never changed what is computed: plans choose blocks (``block_size``), the
    backward pass always computes weights again from lse (``use_checkpointing``), and buffers are pooled where that was
    measured to help (``use_memory_pool``, ``max_cached_buffers``; `MemoryPoolConfig` is the pool's own).
    """

    ADVICE: ClassVar[Mapping[str, str]] = {
        "block_size": "plans and kernels choose the size of blocks",
        "use_checkpointing": "only q, k, v, out and lse are kept, always; a model's is checkpoint_activations",
        "use_memory_pool": "buffers are pooled where that was measured to help; memory.pooled_uses chooses",
        "max_cached_buffers": "the pool has a size of its own, MemoryPoolConfig(max_pool_size_mb=...)",
    }

    block_size: int = 1024
    ring_size: int | None = None
    use_checkpointing: bool = True
    use_memory_pool: bool = True
    max_cached_buffers: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("block_size")
        self._check_counts("max_cached_buffers", least=0)
        self._check_flags("use_checkpointing", "use_memory_pool")
        if self.ring_size is not None:
            self._check_counts("ring_size")

    def _check_use(self) -> None:
        super()._check_use()
        check_ranks("ring_size", self.ring_size)


@dataclass
class SparseAttentionConfig(DilatedAttentionConfig):
    """Attention over some blocks of ``block_size`` tokens.

    ``sparsity_ratio`` is the share of blocks KEPT here, as it was in 0.2, where `create_block_sparse_attention` had the
    share dropped under the same name; ``density`` is the share kept in both, and replaces it. ``pattern_type`` names
    the table (`PATTERN_TYPES`): "axial" needs the option ``grid``, "random" gives each head links of its own, "hybrid"
    joins "global_local" and "random", "learned" chooses by a `Gate` that `distil` trains.

    With ``enable_adaptive``, and where it is learned, blocks are chosen from the queries and keys of each call: the
    share that ``density`` or a ``sparsity_ratio`` other than the default says, or else as many as hold 95 % of the
    estimated attention, but at least ``min_sparsity`` and at most ``max_sparsity`` of the visible ones: shares kept,
    as sparsity_ratio is here.

    Blocks take the place of segments: ``dilation_rates`` are those of "dilated_sparse", and segment lengths are
    checked but cut nothing (they did not in 0.2).
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: float = SHARE_KEPT
    block_size: int = 128
    enable_adaptive: bool = False
    min_sparsity: float = SHARES_BOUND[0]
    max_sparsity: float = SHARES_BOUND[1]
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern_type not in PATTERN_TYPES:
            hint = nearest(str(self.pattern_type), PATTERN_TYPES)
            raise InvalidInput(f"pattern_type must be one of {PATTERN_TYPES}, got {self.pattern_type!r}{hint}")
        self._check_counts("block_size")
        self._check_flags("enable_adaptive")
        check_share("sparsity_ratio", self.sparsity_ratio)
        if self.density is not None:
            check_share("density", self.density)
            if self.sparsity_ratio not in (SHARE_KEPT, self.density):
                raise InvalidInput(
                    f"got sparsity_ratio={self.sparsity_ratio} and density={self.density}: leave one out "
                    f"({KEPT_AND_DROPPED})"
                )
        for name in ("min_sparsity", "max_sparsity"):
            check_share(name, getattr(self, name))
        if self.min_sparsity >= self.max_sparsity:
            raise InvalidInput(
                f"min_sparsity ({self.min_sparsity}) must be less than max_sparsity ({self.max_sparsity})"
            )

    def _check_use(self) -> None:
        super()._check_use()
        is_bounded = (self.min_sparsity, self.max_sparsity) != SHARES_BOUND
        if self.is_adaptive:
            if self.pattern_type not in ("dilated_sparse", "learned"):
                raise InvalidInput(
                    f"enable_adaptive chooses from the data, and pattern_type={self.pattern_type!r} is a fixed table: "
                    "leave one out"
                )
            share = self.fixed_share
            if is_bounded and share is not None and not self.min_sparsity <= share <= self.max_sparsity:
                raise InvalidInput(
                    f"the share kept ({share}) must be between min_sparsity ({self.min_sparsity}) and max_sparsity "
                    f"({self.max_sparsity}): leave out the share, or the two"
                )
        elif is_bounded:
            raise InvalidInput(
                "min_sparsity and max_sparsity bound what is chosen from the data: add enable_adaptive=True, or say "
                "the share kept by density="
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether blocks are chosen from the data."""
        return self.enable_adaptive or self.pattern_type == "learned"

    @property
    def kept(self) -> float:
        """The share of blocks kept, by either name."""
        return self.sparsity_ratio if self.density is None else self.density

    @property
    def fixed_share(self) -> float | None:
        """The share kept where it was given, in (0, 1]; None where it is the default."""
        return None if self.density is None and self.sparsity_ratio == SHARE_KEPT else self.kept


@dataclass
class DistributedConfig(Config):
    """How a training run is spread over processes.

    A layer honours ``world_size`` and ``rank`` (checked against the process group), and ``sequence_parallel``: tokens
    are dealt over ranks. What is a run's affair raises where a layer is made, and is served by `train_settings`:
    ``zero_stage`` 3 is ``train --parallel fsdp`` and 0 ``--parallel ddp``. What nothing here does raises in both:
    ``model_parallel``, ``pipeline_parallel``, stages 1 and 2, ``gradient_checkpointing`` (a model's
    ``checkpoint_activations``) and ``gradient_compression_ratio`` (``train --gradient-compression powersgd``).
    ``backend``, ``bucket_size_mb`` and the two switches of communication are advice.
    """

    ADVICE: ClassVar[Mapping[str, str]] = {
        "backend": "torch.distributed.init_process_group chooses it; train takes nccl on CUDA and gloo elsewhere",
        "communication_optimization": "the way of fewest bytes is taken, always (choose_method)",
        "bucket_size_mb": "DistributedDataParallel has it as bucket_cap_mb; train leaves it at PyTorch's",
        "enable_async_communication": "sends overlap with computing, always",
    }

    world_size: int | None = None
    rank: int | None = None
    backend: str = "nccl"
    sequence_parallel: bool = False
    model_parallel: bool = False
    pipeline_parallel: bool = False
    gradient_checkpointing: bool = False
    communication_optimization: bool = True
    bucket_size_mb: int = 25
    enable_async_communication: bool = True
    gradient_compression_ratio: float | None = None
    zero_stage: int = 0

    def __post_init__(self) -> None:
        if self.world_size is not None:
            self._check_counts("world_size")
        if self.rank is not None:
            self._check_counts("rank", least=0)
            if self.world_size is not None and self.rank >= self.world_size:
                raise InvalidInput(f"rank ({self.rank}) must be less than world_size ({self.world_size})")
        if self.backend not in ("nccl", "gloo", "mpi"):
            raise InvalidInput(f"backend must be one of ('nccl', 'gloo', 'mpi'), got {self.backend!r}")
        self._check_flags(*(f.name for f in fields(self) if f.type == "bool"))
        self._check_counts("bucket_size_mb")
        ratio = self.gradient_compression_ratio
        if ratio is not None and (isinstance(ratio, bool) or not 0.0 < ratio <= 1.0):
            raise InvalidInput(f"gradient_compression_ratio must be in (0, 1], got {ratio!r}")
        if isinstance(self.zero_stage, bool) or self.zero_stage not in (0, 1, 2, 3):
            raise InvalidInput(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage!r}")

    def _check_use(self) -> None:
        self._check_offered()
        if self.zero_stage:
            raise InvalidInput(
                f"zero_stage={self.zero_stage} is a training run's affair, and no layer's: shard the model with "
                "torch.distributed.fsdp.fully_shard, or train with --parallel fsdp"
            )
        check_ranks("world_size", self.world_size)
        if self.rank is not None and self.rank != rank_of_world()[0]:
            raise InvalidInput(
                f"rank={self.rank}: this process is rank {rank_of_world()[0]}; leave rank out, it is found"
            )

    def train_settings(self) -> dict[str, Any]:
        """The fields of `TrainingSettings` that ask for this. Raises InvalidInput for what `train` does not offer.

        Example:
            >>> DistributedConfig(world_size=4, sequence_parallel=True, zero_stage=3).train_settings()
            {'parallel': 'fsdp', 'context_parallel': 4}
        """
        self._check_offered()
        if self.zero_stage in (1, 2):
            raise InvalidInput(f"zero_stage={self.zero_stage} is not offered: 3 is --parallel fsdp, 0 --parallel ddp")
        if self.sequence_parallel and self.world_size is None:
            raise InvalidInput("sequence_parallel in a training run needs world_size: give the number of processes")
        parallel = "fsdp" if self.zero_stage == 3 else "ddp"
        return {"parallel": parallel, "context_parallel": (self.world_size or 1) if self.sequence_parallel else 1}

    def _check_offered(self) -> None:
        instead = {
            "model_parallel": "heads are dealt over ranks by a mesh of two dims, ContextParallel(mesh=...)",
            "pipeline_parallel": "deal tokens over ranks instead, with sequence_parallel",
            "gradient_checkpointing": "give the model checkpoint_activations=True",
            "gradient_compression_ratio": "train has --gradient-compression fp16, bf16 and powersgd",
        }
        for name, way in instead.items():
            if getattr(self, name) not in (False, None):
                raise InvalidInput(f"{name}={getattr(self, name)!r} is not offered by that name: {way}")


def check_share(name: str, value: float) -> None:
    """Raise InvalidInput unless ``value`` is a share in (0, 1]; the text tells what is kept and what is dropped."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise InvalidInput(f"{name} must be in (0, 1], got {value!r} ({KEPT_AND_DROPPED})")
