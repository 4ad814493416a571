"""A table of measured choices: its lookup, and its form as JSON."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import log2
from typing import Any, NamedTuple

from dilated_attention_pytorch.backends.base import Backend, Options
from dilated_attention_pytorch.backends.tuning.keys import Key
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.plans import DensePlan, Plan

FORMAT = 1
"""The version of the file format."""
_FARTHEST = 2  # steps of a factor of two


class Timing(NamedTuple):
    """Seconds of some rounds."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Choice:
    """A way to compute: the name of a backend, the name of the kind of plan it walks, its options.

    Example:
        >>> from dilated_attention_pytorch.backends.base import NoOptions
        >>> print(Choice("dense", "DensePlan", NoOptions()))
        dense dense
    """

    backend: str
    plan: str
    options: Options

    def __str__(self) -> str:
        usual = type(self.options)()
        changed = [f.name for f in fields(self.options) if getattr(self.options, f.name) != getattr(usual, f.name)]
        words = (f"{name}={getattr(self.options, name)!r}" for name in changed)
        return " ".join([self.backend, self.plan.removesuffix("Plan").lower(), *words])


@dataclass(frozen=True)
class Measured:
    """A choice and its seconds."""

    choice: Choice
    seconds: Timing


Ranking = tuple[Measured, ...]
"""Choices that were measured for a key, the fastest first."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rankings by key, and what they were measured with.

    ``device`` is a `device_name`, or a device type: then the table holds for any device of that type.

    Example:
        >>> Table("cpu").nearest(Key("float32", 64, "causal", 1024, False, False))
        ()
    """

    device: str
    entries: Mapping[Key, Ranking] = field(default_factory=dict)
    threads: int = 0
    library: str = ""
    torch: str = ""
    source: str = "given"
    _known: dict[Key, Ranking] = field(default_factory=dict, init=False, repr=False)

    def nearest(self, key: Key) -> Ranking:
        """The ranking of the key, or of the nearest key that was measured; empty when none is near.

        Pattern class, decoding and training must agree; half types stand for each other. D and length may be off by a
        factor of four; a length above all that were measured, by any. From shorter lengths dense plans are left out,
        whose cost grows with the square.
        """
        found = self.entries.get(key)
        if found is None:
            found = self._known.get(key)
        if found is None:
            found = self._search(key)
            self._known[key] = found  # keys hold buckets, so they are few
        return found

    def _search(self, key: Key) -> Ranking:
        same = [k for k in self.entries if _alike(k, key)]
        longest = max((k.length for k in same), default=0)

        def distance(k: Key) -> tuple[bool, float, bool]:
            steps = abs(log2(k.length / key.length)) + abs(log2(k.head_dim / key.head_dim))
            return k.dtype != key.dtype, steps, k.length < key.length

        near = [k for k in same if k.length == longest < key.length]
        near += [k for k in same if abs(log2(k.length / key.length)) <= _FARTHEST]
        if not near:
            return ()
        best = min(near, key=distance)
        ranking = self.entries[best]
        if best.length < key.length:
            return tuple(m for m in ranking if m.choice.plan != DensePlan.__name__)
        return ranking

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON holds it; `table_from_dict` reads it."""
        return {
            "format": FORMAT,
            "library": self.library,
            "torch": self.torch,
            "device": self.device,
            "threads": self.threads,
            "entries": [
                key._asdict() | {"ranking": [_measured_dict(m) for m in ranking]}
                for key, ranking in sorted(self.entries.items())
            ],
        }


def _alike(known: Key, key: Key) -> bool:
    half = {"float16", "bfloat16"}
    dtypes = known.dtype == key.dtype or {known.dtype, key.dtype} == half
    near = abs(log2(known.head_dim / key.head_dim)) <= _FARTHEST
    return dtypes and near and known[2] == key[2] and known[4:] == key[4:]


def _measured_dict(measured: Measured) -> dict[str, Any]:
    choice = measured.choice
    seconds = {name: float(f"{value:.4g}") for name, value in zip(Timing._fields, measured.seconds[:3])}
    named = {"backend": choice.backend, "plan": choice.plan, "options": asdict(choice.options)}
    return named | seconds | {"rounds": measured.seconds.rounds}


def table_from_dict(value: Any, backends: Sequence[Backend], source: str) -> Table:
    """The table that `Table.to_dict` wrote. Raises InvalidInput with what is wrong about any other value."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise InvalidInput(f"expected format {FORMAT}, got {found!r}")
    header = {name: _typed(value, name, str) for name in ("device", "library", "torch")}
    entries: dict[Key, Ranking] = {}
    for entry in _typed(value, "entries", list):
        kinds = typing.get_type_hints(Key)
        key = Key(*(_typed(entry, name, kinds[name]) for name in Key._fields))
        if key.length < 1 or key.head_dim < 1:
            raise InvalidInput(f"expected length and head_dim of at least 1, got {key.length} and {key.head_dim}")
        entries[key] = tuple(_read_measured(m, backends) for m in _typed(entry, "ranking", list))
    return Table(entries=entries, threads=_typed(value, "threads", int), source=source, **header)


def _read_measured(value: Any, backends: Sequence[Backend]) -> Measured:
    name, plan = _typed(value, "backend", str), _typed(value, "plan", str)
    backend = next((b for b in backends if b.name == name), None)
    if backend is None:
        raise InvalidInput(f"unknown backend {name!r}")
    if plan not in {kind.__name__ for kind in _kinds(backend.plans)}:
        raise InvalidInput(f"backend {name!r} walks no {plan!r}")
    options = read_options(backend.options_type, _typed(value, "options", dict))
    low, median, high = (float(_typed(value, part, (int, float))) for part in ("low", "median", "high"))
    seconds = Timing(median, low, high, _typed(value, "rounds", int))
    return Measured(Choice(name, plan, options), seconds)


def _kinds(plans: Sequence[type[Plan]]) -> Iterator[type[Plan]]:
    for kind in plans:
        yield kind
        yield from _kinds(kind.__subclasses__())


def _typed(value: Any, name: str, kind: Any) -> Any:
    """Field ``name`` of a JSON object; InvalidInput unless it is of that type (bool is no int)."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, dict) or type(value.get(name)) not in kinds:
        found = value.get(name) if isinstance(value, dict) else value
        raise InvalidInput(f"expected {name} to be {' or '.join(k.__name__ for k in kinds)}, got {found!r}")
    return value[name]


def read_options(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Options of a kind from JSON values. Raises InvalidInput for unknown names and values of another type.

    Example:
        >>> from dilated_attention_pytorch.backends.base import NoOptions
        >>> read_options(NoOptions, {})
        NoOptions()
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise InvalidInput(f"unknown option {name!r} of {kind.__name__}")
        if not _fits(value, hints[name]):
            raise InvalidInput(f"{kind.__name__}: expected {name} to be {hints[name]}, got {value!r}")
    return kind(**values)


def _fits(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    return type(value) is hint or (hint is float and type(value) is int)
