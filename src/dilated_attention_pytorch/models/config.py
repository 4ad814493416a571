"""What a model is made of: frozen dataclasses, checked at construction, that go to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.positions import make_positions
from dilated_attention_pytorch.nn.transformer import activation_name
from dilated_attention_pytorch.patterns import longnet

FORMAT_VERSION = 1
BASE_SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
BASE_DILATION_RATES = (1, 2, 4, 6, 12)
LIMIT = 1 << 31
MOST_BRANCHES = 128
CROSS_ATTENTIONS = ("full", "longnet")

Config = TypeVar("Config", bound="TransformerConfig")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What all models share; the defaults are the base model of LongNet (arXiv 2307.02486, section 4.1).

    ``segment_lengths`` are tokens. ``dropout`` acts on residual branches, ``attention_dropout`` on attention weights
    (on the CPU by the slow ``dense`` backend). ``position``: "rotary", "xpos" (for causal models), "alibi"
    (slow) or "none". ``checkpoint_activations`` trades time for memory in training.

    Raises InvalidInput, which names the field, unless every value is legal and they fit together.
    """

    model: ClassVar[str] = ""

    d_model: int = 768
    nhead: int = 12
    dim_feedforward: int = 3072
    segment_lengths: tuple[int, ...] = BASE_SEGMENT_LENGTHS
    dilation_rates: tuple[int, ...] = BASE_DILATION_RATES
    dropout: float = 0.0
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    position: str = "rotary"
    num_kv_heads: int | None = None
    head_offset: str = "modulo"
    head_groups: bool = False
    checkpoint_activations: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self._check_types()
        if self.format_version != FORMAT_VERSION:
            raise InvalidInput(
                f"{self.model} config: expected format_version {FORMAT_VERSION}. Got {self.format_version}; "
                "another release of this library wrote it: read it with that one."
            )
        for name in self._counts():
            value = getattr(self, name)
            if value is not None and not 1 <= value < LIMIT:
                raise InvalidInput(f"{self.model} config: expected {name} from 1 to 2^31 - 1. Got {value}.")
        if len(self.segment_lengths) > MOST_BRANCHES:
            raise InvalidInput(
                f"{self.model} config: expected at most {MOST_BRANCHES} branches. Got {len(self.segment_lengths)}."
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidInput(f"{self.model} config: expected {name} in [0, 1). Got {getattr(self, name)}.")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise InvalidInput(f"{self.model} config: expected layer_norm_eps in (0, 1). Got {self.layer_norm_eps}.")
        self._check_heads()
        activation_name(self.activation)
        longnet(self.segment_lengths, self.dilation_rates, head_offset=self.head_offset, head_groups=self.head_groups)
        make_positions(self.position, self.d_model // self.nhead, self.segment_lengths)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values, with the model's name under ``model``."""
        return {"model": self.model, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The config that ``to_dict`` wrote. Raises InvalidInput for unknown or missing fields and wrong values.

        Example:
            >>> config = LongNetLMConfig(num_tokens=256, d_model=64, nhead=4)
            >>> LongNetLMConfig.from_dict(config.to_dict()) == config
            True
        """
        given = dict(values)
        name = given.pop("model", None)
        if name != cls.model:
            raise InvalidInput(f"expected a config of model {cls.model!r}. Got {name!r}; use that model's class.")
        known = {f.name for f in fields(cls)}
        if set(given) != known:
            unknown, missing = sorted(set(given) - known, key=str), sorted(known - set(given))
            raise InvalidInput(f"{cls.model} config: unknown fields {unknown}, missing fields {missing}.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**arguments)

    def _counts(self) -> tuple[str, ...]:
        return ("d_model", "nhead", "dim_feedforward", "num_kv_heads")

    def _check_heads(self) -> None:
        if self.d_model % self.nhead != 0:
            raise InvalidInput(
                f"{self.model} config: d_model ({self.d_model}) must be divisible by nhead ({self.nhead})."
            )
        if self.num_kv_heads is not None and self.nhead % self.num_kv_heads != 0:
            raise InvalidInput(
                f"{self.model} config: nhead ({self.nhead}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_groups and self.nhead < len(self.segment_lengths):
            raise InvalidInput(
                f"{self.model} config: head_groups deals nhead ({self.nhead}) heads out among "
                f"{len(self.segment_lengths)} branches; use more heads, fewer branches, or head_groups=False."
            )

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if not _is_of_type(value, hints[f.name]):
                raise InvalidInput(f"{self.model} config: expected {f.name} of type {f.type}. Got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class LongNetLMConfig(TransformerConfig):
    """A `LongNetLM`: ``num_tokens`` in the vocabulary, ``num_layers`` blocks, one table for input and output if tied.

    A row of the input is made of ``embedding_width`` tokens, the last ones so far (`nn.ShortConvolution`); 1 is none.
    ``copying_start`` sets the first weights so that the first layer looks up what followed the same tokens earlier.

    Example:
        >>> LongNetLMConfig(num_tokens=256).segment_lengths
        (2048, 4096, 8192, 16384, 32768)
    """

    model: ClassVar[str] = "LongNetLM"

    num_tokens: int
    num_layers: int = 12
    tie_embeddings: bool = True
    embedding_width: int = 1
    copying_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copying_start and (self.embedding_width < 2 or self.d_model % 2 != 0):
            raise InvalidInput(
                "LongNetLM config: copying_start needs embedding_width of at least 2 and an even d_model. "
                f"Got {self.embedding_width} and {self.d_model}."
            )

    def _counts(self) -> tuple[str, ...]:
        return (*super()._counts(), "num_tokens", "num_layers", "embedding_width")


@dataclass(frozen=True, kw_only=True)
class LongNetEncoderConfig(TransformerConfig):
    """A `LongNetEncoder` of ``num_layers`` blocks."""

    model: ClassVar[str] = "LongNetEncoder"

    num_layers: int = 12

    def _counts(self) -> tuple[str, ...]:
        return (*super()._counts(), "num_layers")


@dataclass(frozen=True, kw_only=True)
class LongNetConfig(TransformerConfig):
    """A `LongNet`: encoder and decoder; ``cross_attention`` is "full", or "longnet" for the dilated pattern."""

    model: ClassVar[str] = "LongNet"

    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    cross_attention: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cross_attention not in CROSS_ATTENTIONS:
            raise InvalidInput(
                f"LongNet config: expected cross_attention to be one of {CROSS_ATTENTIONS}. "
                f"Got {self.cross_attention!r}."
            )

    def _counts(self) -> tuple[str, ...]:
        return (*super()._counts(), "num_encoder_layers", "num_decoder_layers")


def _is_of_type(value: object, hint: Any) -> bool:
    """Whether a field's value is of its annotated type; bools are no numbers, ints are floats, floats are finite."""
    if isinstance(hint, UnionType):
        return any(_is_of_type(value, h) for h in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of_type(v, get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is NoneType:
        return value is None
    return type(value) is hint
