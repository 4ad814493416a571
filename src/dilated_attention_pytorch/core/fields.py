"""What all configs share: a fixed list of fields, frozen copies, dicts and JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, FrozenInstanceError, fields, replace
from typing import Any, ClassVar, TypeVar

import torch

from dilated_attention_pytorch.core.names import nearest
from dilated_attention_pytorch.core.validation import ValidationMixin
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory.config import device_of, object_of

logger = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config(ValidationMixin):
    """A dataclass that is checked, that copies freeze, and that JSON can hold."""

    ADVICE: ClassVar[Mapping[str, str]] = {}
    """Fields that advise only, and who decides instead."""
    _is_frozen = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_frozen:
            raise FrozenInstanceError(f"cannot set {name}: a layer uses this copy; change a copy made by replace()")
        known = [f.name for f in fields(self)]  # type: ignore[arg-type]  # each subclass is a dataclass
        if name not in known:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}{nearest(name, known)}")
        super().__setattr__(name, value)

    def frozen(self: AnyConfig) -> AnyConfig:
        """A copy for use: checked anew, and it cannot be changed; a frozen config is its own copy.

        Warns of fields that were set and can only advise. Raises InvalidInput for what cannot be had here and now.
        """
        if self._is_frozen:
            return self
        copy = replace(self)  # type: ignore[type-var]
        advice = copy._advice()
        for field in fields(copy):  # type: ignore[arg-type]
            value = getattr(copy, field.name)
            if field.name in advice and value != field.default:
                why = advice[field.name]
                logger.warning("%s: %s=%r changes no result: %s", type(self).__name__, field.name, value, why)
        copy._check_use()
        object.__setattr__(copy, "_is_frozen", True)
        return copy

    def _advice(self) -> Mapping[str, str]:
        """Fields that change nothing in this config, and why."""
        return self.ADVICE

    def _check_use(self) -> None:
        """Raise InvalidInput for what cannot be had in this process."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
        """The config that `to_dict` wrote; fields left out have their defaults. InvalidInput for unknown ones.

        Example:
            >>> from dilated_attention_pytorch.core.config import DilatedAttentionConfig
            >>> config = DilatedAttentionConfig([2048, 4096], [1, 2], dtype=torch.float16)
            >>> DilatedAttentionConfig.from_dict(config.to_dict()) == config
            True
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise InvalidInput(f"{cls.__name__} has no field {name!r}{nearest(str(name), known)}")
        needed = {f.name for f in fields(cls) if _is_required(f)}  # type: ignore[arg-type]
        if needed - set(values):
            raise InvalidInput(f"{cls.__name__} needs the fields {sorted(needed - set(values))}")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls: type[AnyConfig], text: str) -> AnyConfig:
        """The config that `to_json` wrote. Raises InvalidInput for a text that is no JSON object of its fields."""
        return cls.from_dict(object_of(cls.__name__, text))

    def _place(self) -> None:
        """``device`` as a torch.device and ``dtype`` as a torch.dtype, from their names too; None stays None."""
        readers: dict[str, Callable[[Any], Any]] = {"device": as_device, "dtype": as_dtype}
        for name, read in readers.items():
            setattr(self, name, read(getattr(self, name)))

    def _check_counts(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(f"{name} must be an int of at least {least}, got {value!r}")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name} must be True or False, got {getattr(self, name)!r}")


def one_of(name: str, first: Any, second: Any) -> Any:
    """The one that is given, of two configs. Raises InvalidInput where they differ."""
    if first is not None and second is not None and first != second:
        raise InvalidInput(f"multihead_config and attention_config have {name} {first} and {second}: give it in one")
    return second if first is None else first


def as_device(value: Any) -> torch.device | None:
    """A device from its name too; None stays None. Raises InvalidInput for anything else."""
    return None if value is None else device_of(value)


def as_dtype(value: Any) -> torch.dtype | None:
    """A floating dtype from its name too; None stays None. Raises InvalidInput for anything else."""
    if value is None:
        return None
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidInput(f"dtype must be a floating torch.dtype, its name, or None, got {value!r}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, torch.device):
        return str(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
