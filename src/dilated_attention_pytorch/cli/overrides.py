"""`--set name=value`: every setting of a run and of its model, by its name."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dilated_attention_pytorch.errors import InvalidInput


def overrides(given: Sequence[str], *defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `name=value` pairs, dealt out to the group of `defaults` that has the name; values take the default's type.

    Lists are written with commas. Raises InvalidInput for an unknown name, a name given twice, or a value of another
    type.

    >>> overrides(["lr=1e-3", "segments=64,128"], {"lr": 0.1}, {"segments": (1, 2)})
    [{'lr': 0.001}, {'segments': (64, 128)}]
    """
    found: list[dict[str, Any]] = [{} for _ in defaults]
    for pair in given:
        name, equals, text = pair.partition("=")
        homes = [number for number, group in enumerate(defaults) if name in group]
        if not equals or not homes:
            known = ", ".join(sorted({name for group in defaults for name in group}))
            raise InvalidInput(f"--set expects name=value with one of these names: {known}. Got {pair!r}")
        if name in found[homes[0]]:
            raise InvalidInput(f"--set {name} is given twice")
        found[homes[0]][name] = _parsed(name, text, defaults[homes[0]][name])
    return found


def _parsed(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        values = tuple(json.loads(f"[{text}]"))
    except ValueError as error:
        raise InvalidInput(f"--set {name}: expected a value like {default!r}, got {text!r}") from error
    if isinstance(default, (tuple, list)):
        return values
    if len(values) != 1:
        raise InvalidInput(f"--set {name}: expected one value like {default!r}, got {text!r}")
    fits = isinstance(values[0], bool) == isinstance(default, bool) and isinstance(values[0], (int, float))
    whole = isinstance(default, int) and not isinstance(default, bool)
    if default is not None and (not fits or (whole and not isinstance(values[0], int))):
        raise InvalidInput(f"--set {name}: expected a value like {default!r}, got {text!r}")
    return values[0]


def fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass with their values, as `overrides` takes them."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
