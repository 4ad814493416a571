"""A pattern as some of its heads see it: what a rank needs that holds a slice of the heads."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import And, Block, Branch, Index, Pattern, Sum
from dilated_attention_pytorch.patterns.blocks import BlockSparse
from dilated_attention_pytorch.patterns.dilated import Dilated
from dilated_attention_pytorch.patterns.documents import Packed
from dilated_attention_pytorch.problem import Problem


@dataclass(frozen=True)
class SomeHeads(Pattern):
    """The inner pattern for heads ``first, first + 1, ...`` of ``total``: head h sees what head ``first + h`` sees.

    `some_heads` makes it where it is needed; a pattern's own tables of heads are cut instead.

    Example:
        >>> print(SomeHeads(Dilated(4, 2), first=3, total=4).draw(4))
        ····
        ·1·1
        ····
        ·1·1
    """

    inner: Pattern
    first: int
    total: int

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Pattern):
            raise InvalidInput(f"SomeHeads: expected a pattern such as Causal(). Got {type(self.inner).__name__}.")
        if not 0 <= self.first < self.total:
            raise InvalidInput(f"SomeHeads: expected 0 <= first < total. Got first={self.first}, total={self.total}.")

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return self.inner.count(head + self.first, self.total, q, k)

    def branches(self) -> tuple[Branch, ...] | None:
        inner = self.inner.branches()
        return None if inner is None else tuple(self._branch(b) for b in inner)

    def _branch(self, branch: Branch) -> Branch:
        first, total = (0, self.total) if branch.of_heads is None else branch.of_heads
        return replace(branch, of_heads=(first + self.first, total))

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        return self.inner.count_bounds(head + self.first, self.total, q, k)

    def signs(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Tensor, ...] | None:
        return self.inner.signs(head + self.first, self.total, q, k)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.inner.tables

    def text(self, first_table: int = 0) -> str:
        return f"SomeHeads(inner={self.inner.text(first_table)}, first={self.first}, total={self.total})"

    @property
    def varies_by_head(self) -> bool:
        return self.inner.varies_by_head

    @property
    def varies_by_sample(self) -> bool:
        return self.inner.varies_by_sample

    def of_sample(self, sample: int) -> Pattern:
        return replace(self, inner=self.inner.of_sample(sample))

    @property
    def is_causal(self) -> bool:
        return self.inner.is_causal

    @property
    def period(self) -> int | None:
        return self.inner.period

    def check(self, problem: Problem) -> None:
        """Raise InvalidInput unless these heads exist and the inner pattern fits the problem of all heads."""
        if self.first + problem.num_heads > self.total:
            raise InvalidInput(
                f"SomeHeads: heads {self.first} to {self.first + problem.num_heads - 1} of {self.total} do not exist; "
                f"give q {self.total - self.first} heads at most."
            )
        shape = (problem.batch, problem.query_length, self.total, problem.q.shape[3])
        self.inner.check(replace(problem, q=problem.q.new_empty(1).expand(shape)))


def some_heads(pattern: Pattern, first: int, size: int, num_heads: int) -> Pattern:
    """The pattern that heads ``first`` to ``first + size - 1`` of ``num_heads`` see, numbered from 0.

    Sums, products and packed documents stay what they are, of slices, so every plan finds the closed forms that it
    knows; tables with a row for each head are cut; what is the same for all heads is returned as it is.

    Raises InvalidInput for heads that do not exist, and for a table of another number of heads.

    Example:
        >>> some_heads(Dilated(8, 2), 4, 4, 8) == Dilated(8, 2)  # the same grids: 4 is a multiple of the rate
        True
        >>> import torch
        >>> chosen = BlockSparse(2, torch.ones(8, 3, 3, dtype=torch.bool))
        >>> some_heads(chosen, 2, 4, 8).layout.shape
        torch.Size([4, 3, 3])
    """
    if size < 1 or first < 0 or first + size > num_heads:
        raise InvalidInput(
            f"some_heads: expected at least one head of 0 to {num_heads - 1}. Got first={first}, size={size}."
        )
    if size == num_heads or not pattern.varies_by_head:
        return pattern
    if isinstance(pattern, And | Sum | Packed):
        parts = {f.name: getattr(pattern, f.name) for f in fields(pattern)}
        cut = {n: some_heads(p, first, size, num_heads) for n, p in parts.items() if isinstance(p, Pattern)}
        return replace(pattern, **cut)  # type: ignore[arg-type]
    if isinstance(pattern, BlockSparse):
        if pattern.layout.shape[-3] != num_heads:
            raise InvalidInput(f"BlockSparse: the layout is for {pattern.layout.shape[-3]} heads, q has {num_heads}.")
        return BlockSparse(pattern.block_size, pattern.layout[..., first : first + size, :, :])
    if isinstance(pattern, SomeHeads):
        return replace(pattern, first=pattern.first + first)
    if isinstance(pattern, Dilated) and pattern.heads is None and pattern.head_offset == "modulo":
        first %= pattern.dilation_rate
        if first == 0:
            return pattern
    return SomeHeads(pattern, first, num_heads)
