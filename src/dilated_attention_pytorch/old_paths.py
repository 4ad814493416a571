"""Import paths of versions 0.1 and 0.2: one table, and a finder that makes them modules when they are imported.

Real modules come first: the finder is asked last. No old path has the name of something that its package offers, so
that importing one, which binds it to its package as an attribute, replaces nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

PACKAGE = __name__.rpartition(".")[0]


class OldPath(NamedTuple):
    """What a module of old offered: each name, with the module and the name that have it now.

    With ``warns`` importing it is deprecated; without, the path is kept as another way to say the same.
    """

    names: Mapping[str, tuple[str, str]]
    warns: bool


def _at(home: str, *names: str, **renamed: str) -> dict[str, tuple[str, str]]:
    """Names that module ``home`` has; ``renamed`` are old names with today's."""
    return {name: (home, name) for name in names} | {old: (home, new) for old, new in renamed.items()}


_UTILITIES = _at(
    "core.attention_utils",
    "apply_rotary_embeddings",
    "combine_masks",
    "compute_alibi_bias",
    "compute_attention_scores",
    "compute_rotary_embeddings",
    "create_4d_causal_mask",
    "create_block_diagonal_mask",
    "create_dilated_mask",
    "get_attention_backend_info",
    "merge_attention_heads",
    "optimize_attention_computation",
    "split_attention_heads",
    "standard_attention",
)
_BLOCKS = _at("core", "SparsePatternConfig") | _at(
    "patterns",
    "BlockSparse",
    "axial",
    "dilated_sparse",
    "global_local",
    "hierarchical",
    "hybrid",
    "local_window",
    "random_blocks",
    "strided",
)
_POOL = _at(
    "memory",
    "MemoryPoolConfig",
    "UnifiedMemoryPool",
    "clear_memory_pool",
    "get_global_memory_pool",
    "get_memory_pool_info",
    "reset_global_memory_pool",
)

TABLE: Mapping[str, OldPath] = MappingProxyType(
    {
        "dilated_attention": OldPath(
            _at("nn", "DilatedAttention", "MultiheadDilatedAttention") | _at("core", "create_dilated_attention"),
            True,
        ),
        "multihead_dilated_attention": OldPath(
            _at("nn", "MultiheadDilatedAttention") | _at("core", "create_multihead_dilated_attention"), True
        ),
        "improved_dilated_attention": OldPath(_at("core", "ImprovedDilatedAttention"), True),
        "improved_multihead_dilated_attention": OldPath(_at("core", "ImprovedMultiheadDilatedAttention"), True),
        "ring_dilated_attention": OldPath(_at("core", "RingDilatedAttention"), True),
        "ring_multihead_dilated_attention": OldPath(_at("core", "RingMultiheadDilatedAttention"), True),
        "ring_distributed_dilated_attention": OldPath(
            _at("core", RingDistributedDilatedAttention="RingMultiheadDilatedAttention"), True
        ),
        "improved_distributed_dilated_attention": OldPath(
            _at(
                "core",
                DistributedImprovedDilatedAttention="RingDilatedAttention",
                DistributedImprovedMultiheadDilatedAttention="RingMultiheadDilatedAttention",
            ),
            True,
        ),
        "distributed_dilated_attention": OldPath(_at("core", "DistributedMultiheadDilatedAttention"), True),
        "block_sparse_ring_dilated_attention": OldPath(
            _at("core", "BlockSparseRingDilatedAttention", "SparsePatternConfig"), True
        ),
        "block_sparse_ring_multihead_dilated_attention": OldPath(
            _at("core", "BlockSparseRingMultiheadDilatedAttention", "SparsePatternConfig"), True
        ),
        "block_sparse_ring_distributed_dilated_attention": OldPath(
            _at(
                "core",
                "BlockSparseRingDistributedDilatedAttention",
                DistributedSparseConfig="SparsePatternConfig",
            ),
            True,
        ),
        "sparse_pattern_utils": OldPath(_BLOCKS, True),
        "transformer": OldPath(_at("nn", "DilatedTransformerDecoderLayer", "DilatedTransformerEncoderLayer"), True),
        "long_net": OldPath(_at("models", "LongNet", "LongNetLM"), True),
        "core.memory_pool": OldPath(_POOL, False),
        "utils": OldPath({}, False),
        "utils.attention_utils": OldPath(_UTILITIES, False),
        "utils.sparse_pattern_utils": OldPath(_BLOCKS, False),
        "utils.validation": OldPath(_at("core", "ValidationMixin"), False),
    }
)
"""Old path, below the package, to what it offered."""


class OldPaths(MetaPathFinder, Loader):
    """Finds and loads the modules of `TABLE`; what they offer is imported when it is asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, or None for any path that is not in the table."""
        package, _, below = fullname.partition(".")
        if package != PACKAGE or below not in TABLE:
            return None
        is_package = any(other.startswith(f"{below}.") for other in TABLE)
        return ModuleSpec(fullname, self, origin=f"the table of {__name__}", is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module whose names are looked up in the table."""
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run; warn where the path is deprecated, naming the new one at the line that imports it."""
        below = module.__name__.partition(".")[2]
        old = TABLE[below]
        module.__doc__ = f"An import path of old; {_where(old)}"
        if old.warns:
            warnings.warn(
                f"{module.__name__} is an import path of version 0.1; {_where(old)}.", DeprecationWarning, stacklevel=2
            )


class _OldModule(ModuleType):
    """A module without a file: its names are those of its row, each taken from where it is now."""

    @property
    def __all__(self) -> list[str]:
        return sorted(self._row.names)

    @property
    def _row(self) -> OldPath:
        return TABLE[self.__name__.partition(".")[2]]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._row.names:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it has {self.__all__}")
        home, today = self._row.names[name]
        return getattr(import_module(f"{PACKAGE}.{home}"), today)

    def __dir__(self) -> list[str]:
        return self.__all__


def install() -> None:
    """Old paths can be imported from now on; once is enough, and again changes nothing."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())


def _where(old: OldPath) -> str:
    """The imports that give what a path offered."""
    homes: dict[str, list[str]] = {}
    for name, (home, today) in old.names.items():
        homes.setdefault(home, []).append(today if name == today else f"{today} as {name}")
    lines = [f"from {PACKAGE}.{home} import {', '.join(names)}" for home, names in homes.items()]
    return "use " + "; ".join(lines) if lines else "it only holds others"
