"""Patterns that depend on the distance between query and key only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import Block, Branch, Index, Pattern


class _ByDistance(Pattern):
    """All heads see the same, everywhere."""

    @property
    def varies_by_head(self) -> bool:
        return False

    @property
    def period(self) -> int:
        return 1


@dataclass(frozen=True)
class Full(_ByDistance):
    """Every query sees every key once.

    Example:
        >>> Full().count(0, 1, 2, 3)
        1
    """

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return (q * 0 == k * 0) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(),)

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        return 1, 1


@dataclass(frozen=True)
class Causal(_ByDistance):
    """A query sees keys at its own position and before.

    Example:
        >>> Causal().count(0, 1, 3, 2), Causal().count(0, 1, 2, 3)
        (1, 0)
    """

    @property
    def is_causal(self) -> bool:
        return True

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return (q >= k) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(is_causal=True),)

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        return (q.low >= k.high) * 1, (q.high >= k.low) * 1


@dataclass(frozen=True)
class Window(_ByDistance):
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

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        inside = (q.high - k.low < self.size) & (k.high - q.low < self.size)
        outside = (q.low - k.high >= self.size) | (k.low - q.high >= self.size)
        return inside * 1, ~outside * 1
