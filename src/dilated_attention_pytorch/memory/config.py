"""How much a pool may hold, what it keeps, and when it lets go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from dilated_attention_pytorch.errors import InvalidInput


@dataclass(frozen=True)
class MemoryPoolConfig:
    """What a `UnifiedMemoryPool` goes by; frozen, and checked at construction.

    ``hot_cache_size`` requests (a shape, dtype and pool type each) that were asked for at least
    ``hot_cache_threshold`` times are hot: their buffers stay when cold ones are dropped. ``allow_buffer_slicing``
    lets a request take a part of a larger buffer that is free; without it, buffers go by size classes alone. Above
    ``cleanup_threshold_mb`` MiB of free buffers the cold ones are dropped; ``max_pool_size_mb`` MiB is never passed,
    live buffers included: what does not fit is memory outside the pool. ``enable_statistics=False`` counts no hits
    and misses, which are then None. ``device`` (None: the CPU) is where a buffer goes whose request names no device.

    Raises InvalidInput, which names the field, for other types, negative numbers, and a cleanup_threshold_mb above
    max_pool_size_mb.

    Example:
        >>> MemoryPoolConfig(max_pool_size_mb=256).to_dict()["max_pool_size_mb"]
        256
    """

    hot_cache_size: int = 50
    hot_cache_threshold: int = 10
    allow_buffer_slicing: bool = True
    cleanup_threshold_mb: float = 100
    max_pool_size_mb: float = 1024
    enable_statistics: bool = True
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for name in ("allow_buffer_slicing", "enable_statistics"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name} must be True or False. Got {getattr(self, name)!r}")
        for name, least in (("hot_cache_size", 0), ("hot_cache_threshold", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(f"{name} must be a whole number of at least {least}. Got {value!r}")
        for name in ("cleanup_threshold_mb", "max_pool_size_mb"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InvalidInput(f"{name} must be a finite number of MiB, at least 0. Got {value!r}")
        if self.cleanup_threshold_mb > self.max_pool_size_mb:
            raise InvalidInput(
                f"cleanup_threshold_mb must be at most max_pool_size_mb ({self.max_pool_size_mb}), or nothing would be "
                f"cleaned up. Got {self.cleanup_threshold_mb}"
            )
        if self.device is not None:
            object.__setattr__(self, "device", device_of(self.device))  # its name is the same device

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold; `from_dict` makes an equal config of it."""
        return {**asdict(self), "device": None if self.device is None else str(self.device)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryPoolConfig:
        """The config of such a dict. Raises InvalidInput for names that are no fields."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise InvalidInput(f"MemoryPoolConfig has the fields {', '.join(names)}. Got {', '.join(unknown)}")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> MemoryPoolConfig:
        """The config that `to_json` wrote. Raises InvalidInput for a text that is no JSON object of its fields."""
        return cls.from_dict(object_of(cls.__name__, text))


def object_of(name: str, text: str) -> dict[str, Any]:
    """What a JSON text says of the config ``name``. Raises InvalidInput for a text that is no JSON object.

    Example:
        >>> object_of("MemoryPoolConfig", '{"device": null}')
        {'device': None}
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{name}: this is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidInput(f"{name}: expected a JSON object. Got {type(values).__name__}.")
    return values


def device_of(device: torch.device | str) -> torch.device:
    """The torch.device that is named. Raises InvalidInput for what names none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(
            f"device must be a torch.device or its name, as 'cpu' or 'cuda:0'. Got {device!r}"
        ) from error
