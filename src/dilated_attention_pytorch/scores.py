"""Score rules: elementwise functions of one logit and its place, with their derivatives.

A rule sees ``s = scale * <q_i, k_j>`` and answers the logit that enters the softmax. Rules are constants of the
problem: gradients flow through them to q and k, not to their tables.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput


class Score(ABC):
    """A rule ``value(s, head, q, k)`` with its derivative with respect to ``s``."""

    kinds: ClassVar[dict[str, type[Score]]] = {}

    def __init_subclass__(cls) -> None:
        Score.kinds[cls.__name__] = cls

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The tensors that the rule reads, in the order in which `from_text` takes them back."""
        return ()

    @property
    @abstractmethod
    def text(self) -> str:
        """A canonical description; with `tables` it is the whole rule."""

    @abstractmethod
    def value(self, s: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The logit for raw logit ``s`` of head ``head`` between positions ``q`` and ``k`` (all broadcastable)."""

    @abstractmethod
    def derivative(self, s: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """``d value / d s`` at the same place, broadcastable to ``s``."""

    def check(self, num_heads: int) -> None:
        """Raise InvalidInput when the rule does not fit this number of heads."""

    def of_heads(self, first: int, size: int) -> Score:
        """The rule of ``size`` heads from the first-th on; this one where it is the same for all heads.

        Example:
            >>> Relative(slopes=torch.tensor([0.5, 0.25, 0.125])).of_heads(1, 2).tables
            (tensor([0.2500, 0.1250]),)
        """
        return self


@dataclass(frozen=True, eq=False)
class Relative(Score):
    """Adds a number that depends on the distance ``i - j`` only (ALiBi, arXiv 2108.12409; T5's bias).

    Either ``slopes`` (H,): the logit gains ``-slope_h * |i - j|``; or ``table`` (H, 2 R + 1) or (1, 2 R + 1): it gains
    ``table[h, clamp(i - j, -R, R) + R]``. Neither receives a gradient.

    Example:
        >>> rule = Relative(slopes=torch.tensor([0.5, 0.25]))
        >>> rule.value(torch.zeros(2, 1, 1), torch.arange(2).view(2, 1, 1), torch.tensor(4), torch.tensor(1)).flatten()
        tensor([-1.5000, -0.7500])
    """

    slopes: Tensor | None = None
    table: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.slopes is None) == (self.table is None):
            raise InvalidInput("Relative needs slopes= or table=, exactly one of them.")
        given = self.tables[0]
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise InvalidInput("Relative expects a floating point tensor; convert it with .float().")
        if given.requires_grad:
            raise InvalidInput("Relative's tensor is a constant and gets no gradient; pass tensor.detach().")
        shape = tuple(given.shape)
        if self.slopes is not None and len(shape) != 1:
            raise InvalidInput(f"Relative expects slopes of shape (H,). Got {shape}.")
        if self.table is not None and (len(shape) != 2 or shape[1] % 2 == 0):
            raise InvalidInput(f"Relative expects a table of shape (H or 1, 2 R + 1), an odd width. Got {shape}.")

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.slopes, self.table) if t is not None)

    @property
    def text(self) -> str:
        return "Relative:slopes" if self.slopes is not None else "Relative:table"

    def value(self, s: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.slopes is not None:
            return s - self.slopes.to(s)[head] * (q - k).abs()
        assert self.table is not None
        reach = self.table.shape[1] // 2
        row = head if self.table.shape[0] > 1 else torch.zeros_like(head)
        return s + self.table.to(s)[row, (q - k).clamp(-reach, reach) + reach]

    def derivative(self, s: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s.new_ones(())

    def of_heads(self, first: int, size: int) -> Relative:
        if self.table is not None and self.table.shape[0] == 1:
            return self
        cut = [None if t is None else t[first : first + size] for t in (self.slopes, self.table)]
        return Relative(slopes=cut[0], table=cut[1])

    def check(self, num_heads: int) -> None:
        rows = self.tables[0].shape[0]
        if rows != num_heads and (self.slopes is not None or rows != 1):
            raise InvalidInput(f"Relative holds {rows} heads, q has {num_heads}; give one row per query head.")


@dataclass(frozen=True)
class Softcap(Score):
    """Bends logits into ``(-cap, cap)``: ``cap * tanh(s / cap)`` (Gemma 2, arXiv 2408.00118).

    Example:
        >>> Softcap(2.0).value(torch.tensor(100.0), torch.tensor(0), torch.tensor(0), torch.tensor(0))
        tensor(2.)
    """

    cap: float

    def __post_init__(self) -> None:
        if not 0 < self.cap < float("inf"):
            raise InvalidInput(f"Softcap expects a finite cap above 0. Got {self.cap}.")

    @property
    def text(self) -> str:
        return f"Softcap:{float(self.cap)!r}"

    def value(self, s: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.cap * torch.tanh(s / self.cap)

    def derivative(self, s: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 1 - torch.tanh(s / self.cap).square()


def score_from_text(text: str, tables: list[Tensor]) -> Score | None:
    """The rule that `Score.text` and `Score.tables` describe; the empty string is the identity, None.

    Example:
        >>> score_from_text(Softcap(30.0).text, [])
        Softcap(cap=30.0)
    """
    if not text:
        return None
    kind, _, argument = text.partition(":")
    if kind == "Softcap":
        return Softcap(float(argument))
    return Relative(**{argument: tables[0]})
