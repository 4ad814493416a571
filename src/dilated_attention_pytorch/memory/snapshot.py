"""What a pool holds at one moment, as plain data: for a table, a file, or a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.errors import InvalidInput

MIB = 1 << 20
FORMAT = "dilated-attention memory pool 1"


@dataclass(frozen=True)
class PoolStatistics:
    """Counts since the pool was made, and bytes now.

    A request is a hit when memory that the pool holds served it, else a miss; both are None when the config counts
    none. ``unpooled`` of the misses did not fit below max_pool_size_mb. ``delegated`` requests (pinned memory,
    accelerators) went to PyTorch's own allocators, and are neither. ``fragmentation`` is the share of the bytes held
    that serve no live buffer and cannot be given back either, since their allocation holds a live one.
    """

    hits: int | None
    misses: int | None
    unpooled: int
    delegated: int
    live_buffers: int
    free_buffers: int
    bytes_live: int
    bytes_free: int
    bytes_held: int
    fragmentation: float

    @property
    def hit_rate(self) -> float | None:
        """Hits over hits and misses; None before the first, or when none are counted."""
        if self.hits is None or self.misses is None or not self.hits + self.misses:
            return None
        return self.hits / (self.hits + self.misses)


@dataclass(frozen=True)
class Span:
    """Bytes [start, start + size) of an allocation; ``requested`` of them are a live buffer's, 0 when free."""

    start: int
    size: int
    requested: int


@dataclass(frozen=True)
class Allocation:
    """One allocation: its bytes, pool type, NUMA node, seconds since its last return, and its spans in order."""

    size: int
    pool_type: str
    node: int
    idle_seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class PoolSnapshot:
    """A pool's statistics and every allocation that it holds, largest first."""

    statistics: PoolStatistics
    allocations: tuple[Allocation, ...]

    def save(self, path: Path | str) -> None:
        """The file holds this snapshot as JSON, which `dilated-attention memory` reads."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> PoolSnapshot:
        """The snapshot in a file. Raises InvalidInput when there is none."""
        fix = "get_global_memory_pool().snapshot().save(path) writes one"
        try:
            return cls._of(json.loads(Path(path).read_text()))
        except OSError as error:
            raise InvalidInput(f"{path}: expected a snapshot of a memory pool. Got {error}; {fix}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}: expected a snapshot of a memory pool; {fix}. Got another file") from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> PoolSnapshot:
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        allocations = (
            Allocation(**{**x, "spans": tuple(Span(**span) for span in x["spans"])}) for x in values["allocations"]
        )
        return cls(PoolStatistics(**values["statistics"]), tuple(allocations))
