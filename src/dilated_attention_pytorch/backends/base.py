"""What a backend is: it computes a plan, or says every reason why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.plans import Plan
from dilated_attention_pytorch.plans.planner import LARGEST_TILE
from dilated_attention_pytorch.problem import Problem

TILES = (16, 32, 64, 128, 256)
"""Sides of tiles that options may name."""


class Gradients(NamedTuple):
    """Gradients with the shapes of q, k, v, in the problem's `result_dtype`; that of the bias (its shape, accumulate
    dtype) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None

    def plus(self, other: Gradients) -> Gradients:
        """The sum of two shares of the gradients of one problem."""
        bias = self.bias if self.bias is None or other.bias is None else self.bias + other.bias
        return Gradients(self.q + other.q, self.k + other.k, self.v + other.v, bias)


@dataclass(frozen=True)
class Options:
    """What may be chosen about how a backend computes; never what it computes.

    A backend with choices derives a frozen dataclass whose fields are int, float, str, bool or None, each with a
    default that serves an unmeasured machine: they are written to JSON by their names. Values that cannot be are
    refused by ``__post_init__`` with InvalidInput. The backend sets ``options_type`` and annotates ``options``.
    """

    @property
    def tile(self) -> int:
        """Rows and keys of a tile at most, where a plan has tiles; a field of that name makes it a choice."""
        return LARGEST_TILE


@dataclass(frozen=True)
class NoOptions(Options):
    """Nothing to choose."""


def check_tile(name: str, tile: int) -> None:
    """Raise InvalidInput unless ``tile`` is a power of two from 16 to 256."""
    if isinstance(tile, bool) or tile not in TILES:
        raise InvalidInput(f"{name}: expected tile to be one of {', '.join(map(str, TILES))}. Got {tile!r}.")


class Backend(ABC):
    """One way to compute plans. Immutable; forward and backward are pure functions of their arguments and the options.

    Example:
        >>> from dilated_attention_pytorch.backends import DenseBackend
        >>> DenseBackend().options
        NoOptions()
    """

    name: ClassVar[str]
    plans: ClassVar[tuple[type[Plan], ...]]
    options_type: ClassVar[type[Options]] = NoOptions

    def __init__(self, options: Options | None = None) -> None:
        """With the given options, or the defaults of ``options_type``; InvalidInput for those of another backend."""
        if options is None:
            options = self.options_type()
        if not isinstance(options, self.options_type):
            kind, given = self.options_type.__name__, type(options).__name__
            raise InvalidInput(f"{type(self).__name__}: expected options to be {kind}(...) or None. Got {given}.")
        self.options = options

    def candidates(self, problem: Problem) -> tuple[Options, ...]:
        """Options worth measuring for this problem, the best guess first; all of them compute the same thing."""
        return (self.options,)

    def import_error(self) -> str | None:
        """Why the backend cannot be used in this installation at all, or None."""
        return None

    @abstractmethod
    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        """Why this backend cannot compute this plan for this problem; empty means it can."""

    @abstractmethod
    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        """Out (B, Nq, H, Dv) in the problem's `result_dtype`, and lse (B, H, Nq) in the accumulate dtype."""

    @abstractmethod
    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """The gradients through every pair of the plan, given the global out and lse.

        ``out`` and ``lse`` may belong to more keys than the plan's (ring steps, branches): the pairs of this plan then
        give their share of the exact gradient. ``out`` is in q's dtype or in the accumulate dtype, ``dout`` in q's;
        the gradients are in `result_dtype`.
        """
