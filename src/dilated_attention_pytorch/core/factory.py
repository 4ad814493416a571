"""One call for a layer of any kind, by the names of 0.2.

A kind only chooses which layer of `nn` is made and with which options: "standard" PyTorch's own kernels, "improved" the
fastest backend that can, "ring" and "distributed" tokens dealt over the ranks of the default process group,
"block_sparse" a table of blocks. "auto" chooses, and logs what and why.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from dilated_attention_pytorch.core.config import (
    KEPT_AND_DROPPED,
    DilatedAttentionConfig,
    DistributedConfig,
    MultiheadConfig,
    RingAttentionConfig,
    SparseAttentionConfig,
)
from dilated_attention_pytorch.core.fields import one_of
from dilated_attention_pytorch.core.names import nearest
from dilated_attention_pytorch.core.ranks import dealt_by, rank_of_world
from dilated_attention_pytorch.core.sparse import make_selector, make_table
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    DilatedAttention,
    MultiheadAdaptiveSparseAttention,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
)

logger = logging.getLogger(__name__)

DEFAULT_SEGMENT_LENGTHS = (2048, 4096, 8192)
DEFAULT_DILATION_RATES = (1, 2, 4)
DEFAULT_SIZES = {"embed_dim": 768, "num_heads": 12}
STANDARD = ("sdpa", "dense")
"""The backends of the kind "standard": PyTorch's fused kernels, or else its matrix products."""
DROPPED = 0.9
"""`create_block_sparse_attention`'s share of blocks dropped, unless given."""


@dataclass(frozen=True)
class _Kind:
    """Which config a kind has, and by which method its tokens are dealt over ranks; None: they are not."""

    config: type[DilatedAttentionConfig] = DilatedAttentionConfig
    method: str | None = None


_KINDS = {
    "standard": _Kind(),
    "improved": _Kind(),
    "ring": _Kind(RingAttentionConfig, "ring"),
    "distributed": _Kind(RingAttentionConfig, "auto"),
    "block_sparse": _Kind(SparseAttentionConfig),
    # further names of 0.2
    "ring_distributed": _Kind(RingAttentionConfig, "ring"),
    "improved_distributed": _Kind(RingAttentionConfig, "auto"),
    "block_sparse_ring": _Kind(SparseAttentionConfig, "ring"),
    "block_sparse_ring_distributed": _Kind(SparseAttentionConfig, "auto"),
}
_SPARSE_ONLY = {"density", "enable_adaptive", "max_sparsity", "min_sparsity", "pattern_type", "sparsity_ratio"}
_RING_ONLY = {"max_cached_buffers", "ring_size", "use_checkpointing", "use_memory_pool"}

# What layers take besides their config's fields.
_HEADS = {"softmax_scale", "score", "op"}
_PROJECTED = {"num_kv_heads", "position", "op"}
_DILATED = {"context_parallel", "head_groups", "head_offset"}
_TABLE = {"context_parallel", "global_blocks", "grid", "max_length", "per_head", "seed"}
_CHOSEN = {"coarse", "context_parallel", "keep", "max_length"}


@dataclass(frozen=True)
class _Own:
    """A user's class, and the config it is made of."""

    make: Callable[..., nn.Module]
    config: type[DilatedAttentionConfig]


_ATTENTION: dict[str, _Own] = {}
_MULTIHEAD: dict[str, _Own] = {}


def register_attention(
    name: str, cls: Callable[..., nn.Module], config_class: type[DilatedAttentionConfig] = DilatedAttentionConfig
) -> None:
    """`create_dilated_attention(name)` makes ``cls(config)`` from now on, ``config`` a frozen ``config_class``.

    A name that was registered before is given to the new class. Raises InvalidInput for a kind of this library, and
    for what cannot be called.
    """
    _register(_ATTENTION, name, cls, config_class)


def register_multihead_attention(
    name: str, cls: Callable[..., nn.Module], config_class: type[DilatedAttentionConfig] = DilatedAttentionConfig
) -> None:
    """`create_multihead_dilated_attention(name)` makes ``cls(multihead_config, attention_config)`` from now on.

    As in 0.2 the name may begin with ``multihead_``. Otherwise as `register_attention`.
    """
    _register(_MULTIHEAD, name.removeprefix("multihead_"), cls, config_class)


def create_dilated_attention(
    kind: str = "auto",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """A layer for ready-made heads (B, N, H, D), without parameters; ``attention_type`` is another name of ``kind``.

    Segments are (2048, 4096, 8192) tokens with rates (1, 2, 4) unless given. ``options`` are the fields of the kind's
    config (`DilatedAttentionConfig`; `RingAttentionConfig` for ring and distributed; `SparseAttentionConfig` for
    block_sparse, whose ``sparsity_ratio`` is the share kept), or ``attention_config=`` one of these; those of the layer
    (``softmax_scale``, ``op``, ``score``, ``head_groups``, ``context_parallel``, ...); ``distributed_config=`` is
    checked against the process group.

    Over several ranks a layer takes and gives this rank's shards. "ring" and "distributed" on one process are local.
    "standard" computes what PyTorch's fused kernels cannot (dropout, masks, scores) by its matrix products.

    Raises InvalidInput for kinds and options that are not understood, with the nearest name, and for values that do not
    go together.

    Example:
        >>> import torch
        >>> attention = create_dilated_attention("standard", [32, 64], [1, 2])
        >>> q = torch.randn(1, 100, 4, 8)
        >>> attention(q, q, q, is_causal=True).shape
        torch.Size([1, 100, 4, 8])
        >>> create_dilated_attention("ring", segment_length=[32])
        Traceback (most recent call last):
        dilated_attention_pytorch.errors.InvalidInput: create_dilated_attention: kind 'ring' has no option \
'segment_length'; did you mean 'segment_lengths'?
    """
    caller = "create_dilated_attention"
    if "attention_dropout" in options:
        if "dropout" in options:
            raise InvalidInput(f"{caller}: dropout and attention_dropout are one option; leave one out")
        options["dropout"] = options.pop("attention_dropout")
    found = _find(caller, kind, options, segment_lengths, dilation_rates, _ATTENTION)
    if isinstance(found.maker, _Own):
        found.refuse_unknown(_keywords(found.maker.make))
        return found.maker.make(found.config, **options)
    for name in ("device", "dtype"):
        if getattr(found.config, name) is not None:
            raise InvalidInput(
                f"{caller}: a layer without parameters has no {name}; it computes with its inputs': leave it out"
            )
    return _heads(found)


def create_multihead_dilated_attention(
    kind: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    multihead_config: MultiheadConfig | None = None,
    attention_config: DilatedAttentionConfig | None = None,
    **options: Any,
) -> nn.Module:
    """A layer for embeddings (B, N, E), with projections; ``attention_type`` is another name of ``kind``.

    ``options`` are the fields of `MultiheadConfig` and of the kind's config, unless these are given (``sparsity_ratio``
    is the share kept here, as in `SparseAttentionConfig`; ``density`` is it everywhere), those of the layer
    (``position``, ``num_kv_heads``, ``op``, ``head_groups``, ``context_parallel``, ...) and ``distributed_config``.
    What is said twice has to be the same; with ``multihead_config`` leave the sizes out. Otherwise as
    `create_dilated_attention`.

    Example:
        >>> import torch
        >>> layer = create_multihead_dilated_attention("improved", 64, 4, [32, 64], [1, 2], position="rotary")
        >>> layer(torch.randn(2, 100, 64), is_causal=True).shape
        torch.Size([2, 100, 64])
    """
    caller = "create_multihead_dilated_attention"
    names = {f.name for f in fields(MultiheadConfig)} - set(DEFAULT_SIZES)
    given = {name: options.pop(name) for name in names & set(options)}
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
    if multihead_config is None:
        multihead_config = MultiheadConfig(**{**sizes, **given})
    else:
        given |= {name: value for name, value in sizes.items() if value != DEFAULT_SIZES[name]}
        _check_agree(caller, "multihead_config", multihead_config, given)
    if attention_config is not None:
        options["attention_config"] = attention_config
    found = _find(caller, kind, options, segment_lengths, dilation_rates, _MULTIHEAD)
    found.others = names | set(DEFAULT_SIZES) | {"multihead_config"}
    if isinstance(found.maker, _Own):
        found.refuse_unknown(_keywords(found.maker.make))
        return found.maker.make(multihead_config.frozen(), found.config, **options)
    return _projected(found, multihead_config.frozen())


def create_block_sparse_attention(
    sparsity_ratio: float = DROPPED,
    pattern_type: str = "dilated_sparse",
    embed_dim: int = 768,
    num_heads: int = 12,
    **options: Any,
) -> nn.Module:
    """A layer for embeddings whose blocks of queries see some blocks of keys.

    ``sparsity_ratio`` is the share of blocks DROPPED, as it was here in 0.2; in `SparseAttentionConfig`, and as an
    option of the other factories, it is the share kept. ``density=`` is the share kept everywhere, and replaces it.
    ``options`` are those of `create_multihead_dilated_attention` for the kind "block_sparse".

    Example:
        >>> layer = create_block_sparse_attention(0.75, "local_window", 64, 4, block_size=16)
        >>> layer.attention.options["density"]
        0.25
    """
    caller = "create_block_sparse_attention"
    ratio, density = sparsity_ratio, options.pop("density", None)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 <= ratio < 1.0:
        raise InvalidInput(f"{caller}: sparsity_ratio must be in [0, 1), got {ratio!r} ({KEPT_AND_DROPPED})")
    dropped = round(1.0 - ratio, 12)  # 1 - 0.9 is a little less than 0.1
    if density is None:
        density = dropped
    elif ratio != DROPPED and density != dropped:
        raise InvalidInput(
            f"{caller}: got sparsity_ratio={ratio} and density={density}: leave one out ({KEPT_AND_DROPPED})"
        )
    if "attention_config" in options:
        raise InvalidInput(
            f"{caller} says what is dropped by its own arguments: leave attention_config out, or give it to "
            "create_multihead_dilated_attention('block_sparse', ...)"
        )
    sparse: dict[str, Any] = {"pattern_type": pattern_type, "density": density}
    return create_multihead_dilated_attention("block_sparse", embed_dim, num_heads, **sparse, **options)


def create_adaptive_sparse_attention(
    embed_dim: int = 768,
    num_heads: int = 12,
    min_sparsity: float = 0.1,
    max_sparsity: float = 0.9,
    **options: Any,
) -> nn.Module:
    """A layer for embeddings that chooses blocks of keys from the queries and keys of each call.

    At least ``min_sparsity`` and at most ``max_sparsity`` of the visible blocks are DROPPED (in `SparseAttentionConfig`
    the two bound the share kept); within these, as many are kept as hold 95 % of the estimated attention.
    ``density=`` keeps just that share instead. ``pattern_type="learned"`` chooses by a gate that
    `dilated_attention_pytorch.selection.distil` trains; otherwise mean queries and keys are compared, which needs no
    training. ``options`` are those of `create_multihead_dilated_attention` for the kind "block_sparse".

    Example:
        >>> import torch
        >>> layer = create_adaptive_sparse_attention(64, 4, density=0.5, block_size=16)
        >>> layer(torch.randn(2, 128, 64)).shape, layer.attention.selected.density
        (torch.Size([2, 128, 64]), 0.5)
    """
    caller = "create_adaptive_sparse_attention"
    for name, value in (("min_sparsity", min_sparsity), ("max_sparsity", max_sparsity)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            raise InvalidInput(f"{caller}: {name}, a share of blocks dropped, must be in [0, 1), got {value!r}")
    if "attention_config" in options:
        raise InvalidInput(f"{caller}: leave attention_config out, or give it enable_adaptive=True and another factory")
    sparse: dict[str, Any] = {
        "enable_adaptive": True,
        "min_sparsity": round(1.0 - max_sparsity, 12),
        "max_sparsity": round(1.0 - min_sparsity, 12),
    }
    return create_multihead_dilated_attention("block_sparse", embed_dim, num_heads, **sparse, **options)


@dataclass
class _Found:
    """What was asked for, in order: the kind, what makes it, its frozen config, and the options left for the layer."""

    caller: str
    kind: str
    maker: _Kind | _Own
    config: DilatedAttentionConfig
    options: dict[str, Any]
    others: frozenset[str] | set[str] = frozenset()

    def refuse_unknown(self, known: set[str] | None) -> None:
        """Raise InvalidInput for an option that neither the layer (None: it takes any) nor the config has."""
        if known is None:
            return
        names = known | {f.name for f in fields(self.config)} | self.others | {"attention_config"}
        for name in self.options:
            if name not in known:
                raise InvalidInput(f"{self.caller}: kind {self.kind!r} has no option {name!r}{nearest(name, names)}")


def _find(
    caller: str,
    kind: str,
    options: dict[str, Any],
    segment_lengths: Sequence[int] | None,
    dilation_rates: Sequence[int] | None,
    registered: dict[str, _Own],
) -> _Found:
    """The kind and its config; what they take is popped from ``options``."""
    kind = _one_name(caller, kind, options.pop("attention_type", None))
    config, distributed = options.pop("attention_config", None), options.pop("distributed_config", None)
    if kind == "auto":
        kind = _choose(caller, config, distributed, options)
    maker = registered.get(kind) or _KINDS.get(kind)
    if maker is None:
        hint = nearest(str(kind), ("auto", *_KINDS, *registered))
        raise InvalidInput(f"{caller}: there is no kind {kind!r}{hint}")
    words = {f.name: options.pop(f.name) for f in fields(maker.config) if f.name in options}
    branches = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    words |= {name: value for name, value in branches.items() if value is not None}
    found = _Found(caller, kind, maker, _make_config(caller, kind, maker, config, words).frozen(), options)
    if distributed is not None:
        _check_distributed(caller, kind, maker, distributed)
    return found


def _one_name(caller: str, kind: str, attention_type: str | None) -> str:
    if attention_type is not None and kind not in ("auto", attention_type):
        raise InvalidInput(f"{caller}: kind {kind!r} and attention_type {attention_type!r} are one option")
    name = kind if attention_type is None else attention_type
    if not isinstance(name, str):
        raise InvalidInput(f"{caller}: the kind comes first, such as 'auto'. Got {name!r}; name what follows it")
    return name


def _choose(
    caller: str,
    config: DilatedAttentionConfig | None,
    distributed: DistributedConfig | None,
    options: dict[str, Any],
) -> str:
    """What "auto" is here, said in the log."""
    ranks = rank_of_world()[1]
    if isinstance(config, SparseAttentionConfig) or _SPARSE_ONLY & set(options):
        kind, why = "block_sparse", "options or a config of block-sparse attention were given"
    elif isinstance(config, RingAttentionConfig) or _RING_ONLY & set(options):
        kind, why = "ring", f"options or a config of a ring were given, for {ranks} rank(s)"
    elif isinstance(distributed, DistributedConfig) and distributed.sequence_parallel:
        kind, why = "distributed", f"sequence_parallel was asked for, over {ranks} rank(s)"
    elif ranks > 1:
        kind, why = "distributed", f"the default process group has {ranks} ranks; the method that sends least is taken"
    else:
        kind, why = "improved", "there is one process; attend takes the fastest backend that can, call by call"
    logger.info("%s: auto is %r: %s", caller, kind, why)
    return kind


def _make_config(
    caller: str,
    kind: str,
    maker: _Kind | _Own,
    config: DilatedAttentionConfig | None,
    words: dict[str, Any],
) -> DilatedAttentionConfig:
    wanted = maker.config
    if config is None:
        return wanted(**{"segment_lengths": DEFAULT_SEGMENT_LENGTHS, "dilation_rates": DEFAULT_DILATION_RATES, **words})
    if type(config) is DilatedAttentionConfig:
        _check_agree(caller, "attention_config", config, words)
        return wanted(**{**{f.name: getattr(config, f.name) for f in fields(config)}, **words})
    if type(config) is not wanted and not (isinstance(maker, _Own) and isinstance(config, wanted)):
        raise InvalidInput(
            f"{caller}: kind {kind!r} is made of a {wanted.__name__}. Got {type(config).__name__}; take the kind that "
            "this config is for, or 'auto'"
        )
    _check_agree(caller, "attention_config", config, words)
    return config


def _check_agree(caller: str, where: str, config: Any, words: dict[str, Any]) -> None:
    """Raise InvalidInput where an option says otherwise than the config that was given with it."""
    own = {name: value for name, value in words.items() if name in {f.name for f in fields(config)}}
    said = replace(config, **own)
    for name in own:
        if getattr(said, name) != getattr(config, name):
            raise InvalidInput(
                f"{caller}: got {name}={own[name]!r} and {where}.{name}={getattr(config, name)!r}: say it in one place"
            )


def _check_distributed(caller: str, kind: str, maker: _Kind | _Own, config: DistributedConfig) -> None:
    if not isinstance(config, DistributedConfig):
        raise InvalidInput(f"{caller}: distributed_config must be a DistributedConfig, got {type(config).__name__}")
    config.frozen()
    if config.sequence_parallel and isinstance(maker, _Kind) and maker.method is None:
        raise InvalidInput(
            f"{caller}: sequence_parallel deals tokens over ranks, kind {kind!r} does not; take 'ring', 'distributed' "
            "or 'auto'"
        )


def _layer_options(found: _Found, shared: set[str]) -> dict[str, Any]:
    """The options for the layer, checked by name, with those that the kind adds."""
    assert isinstance(found.maker, _Kind)
    sparse = found.config if isinstance(found.config, SparseAttentionConfig) else None
    known = shared | (_DILATED if sparse is None else _CHOSEN if sparse.is_adaptive else _TABLE)
    if found.kind == "standard":
        known = known - {"op"}
    found.refuse_unknown(known)
    options = dict(found.options)
    if found.kind == "standard":
        options["op"] = STANDARD
    if found.maker.method is not None:
        options["context_parallel"] = dealt_by(found.maker.method, options.get("context_parallel"))
        logger.info("%s: %r by %s", found.caller, found.kind, options["context_parallel"])
    return options


def _heads(found: _Found) -> nn.Module:
    config = found.config
    if not isinstance(config, SparseAttentionConfig):
        options = _layer_options(found, _HEADS)
        return DilatedAttention(
            config.segment_lengths, config.dilation_rates, attention_dropout=config.dropout, **options
        )
    if config.is_adaptive:
        options = _layer_options(found, _HEADS | {"num_heads", "head_dim"})
        selector, budget = make_selector(config, options.pop("num_heads", None), options.pop("head_dim", None))
        return AdaptiveSparseAttention(selector, budget, attention_dropout=config.dropout, **options)
    options = _layer_options(found, _HEADS)
    return BlockSparseAttention(attention_dropout=config.dropout, **{**make_table(config), **options})


def _projected(found: _Found, sizes: MultiheadConfig) -> nn.Module:
    config, options = found.config, _layer_options(found, _PROJECTED)
    shared: dict[str, Any] = {"dropout": config.dropout}
    shared |= {name: getattr(sizes, name) for name in ("bias", "layer_norm", "layer_norm_eps", "gamma_init")}
    for name in ("device", "dtype"):
        shared[name] = one_of(name, getattr(sizes, name), getattr(config, name))
    shared |= {"embed_dim": sizes.embed_dim, "num_heads": sizes.num_heads}
    if not isinstance(config, SparseAttentionConfig):
        branches: dict[str, Any] = {"dilation_rates": config.dilation_rates, "segment_lengths": config.segment_lengths}
        return MultiheadDilatedAttention(**shared, **branches, **options)
    if not config.is_adaptive:
        return MultiheadBlockSparseAttention(**{**shared, **make_table(config), **options})
    selector, budget = make_selector(config, sizes.num_heads, sizes.head_dim, options.get("num_kv_heads"))
    made = MultiheadAdaptiveSparseAttention(selector=selector, budget=budget, **shared, **options)
    return made.to(device=shared["device"], dtype=shared["dtype"])  # the gate too


def _register(
    table: dict[str, _Own], name: str, cls: Callable[..., nn.Module], config_class: type[DilatedAttentionConfig]
) -> None:
    if name in _KINDS or name == "auto":
        raise InvalidInput(f"{name!r} is a kind of this library: register your class by another name")
    if not callable(cls) or not (isinstance(config_class, type) and issubclass(config_class, DilatedAttentionConfig)):
        raise InvalidInput("expected a class to be made, and a DilatedAttentionConfig, or a class derived from it")
    table[name] = _Own(cls, config_class)


def _keywords(make: Callable[..., Any]) -> set[str] | None:
    """The names that ``make`` takes by keyword; None where it takes any."""
    parameters = inspect.signature(make).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
