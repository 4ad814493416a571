"""Patterns that depend on the distance between query and key only."""

from __future__ import annotations

from dataclasses import dataclass

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import Branch, Index, Pattern


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key once.

    Example:
        >>> Full().count(0, 1, 2, 3)
        1
    """

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return (q * 0 == k * 0) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(),)


@dataclass(frozen=True)
class Causal(Pattern):
    """A query sees keys at its own position and before.

    Example:
        >>> Causal().count(0, 1, 3, 2), Causal().count(0, 1, 2, 3)
        (1, 0)
    """

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return (q >= k) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(is_causal=True),)


@dataclass(frozen=True)
class Window(Pattern):
    """Keys at most ``size - 1`` tokens before or after the query.

    Example:
        >>> print(Window(2).draw(3))
        11·
        111
        ·11
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidInput(f"Window: expected a size of at least 1 token. Got {self.size}.")

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        distance = q - k
        return ((distance < self.size) & (-distance < self.size)) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(window=self.size),)
