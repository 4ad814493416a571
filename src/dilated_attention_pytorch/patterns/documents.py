"""Packed documents: several samples one after another in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import UNBOUNDED, Block, Branch, Index, Pattern
from dilated_attention_pytorch.problem import Problem, Run, positions_end


@dataclass(frozen=True, eq=False)
class Documents(Pattern):
    """Queries see the keys of their own document.

    ``lengths`` (tokens): a list or an int tensor (documents,), or (B, documents) when samples are packed differently;
    shorter lists of documents end in zeros. Positions past the last document belong to none and see nothing.
    ``Documents(lengths).of(p)`` asks ``p`` with positions inside each document, so a packed sample equals the sample
    alone; ``Documents(lengths) & p`` only cuts links between documents.

    Example:
        >>> print(Documents([2, 1]).draw(3))
        11·
        11·
        ··1
    """

    lengths: Tensor

    def __init__(self, lengths: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> None:
        table = torch.as_tensor(lengths)
        if table.is_floating_point() or table.dtype == torch.bool or table.dim() not in (1, 2) or table.numel() == 0:
            raise InvalidInput(
                "Documents: expected integer lengths of shape (documents,) or (B, documents), at least one. "
                f"Got {table.dtype} of shape {tuple(table.shape)}."
            )
        object.__setattr__(self, "lengths", table.to(torch.int64))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int]) -> Documents:
        """The documents between cumulative offsets ``0, n1, n1 + n2, ...``, as flash-attn's varlen functions take them.

        Example:
            >>> Documents.from_cu_seqlens([0, 2, 3]).lengths
            tensor([2, 1])
        """
        offsets = torch.as_tensor(cu_seqlens)
        if offsets.dim() != 1 or offsets.numel() < 2:
            raise InvalidInput(f"Documents: expected cu_seqlens of shape (documents + 1,). Got {tuple(offsets.shape)}.")
        return cls(offsets.diff())

    def of(self, pattern: Pattern) -> Pattern:
        """``pattern`` inside each document: positions start at 0 in every document, and links never cross.

        Example:
            >>> from dilated_attention_pytorch import Causal
            >>> print(Documents([2, 1]).of(Causal()).draw(3))
            1··
            11·
            ··1
        """
        return Packed(self.lengths, pattern)

    def bounds(self, device: torch.device) -> Tensor:
        """Starts and end of the documents, ``0, n1, n1 + n2, ...``: (documents + 1,) or (B, documents + 1), int64."""
        ends = self.lengths.to(device).cumsum(-1)
        return torch.cat((torch.zeros_like(ends[..., :1]), ends), -1)

    def locate(self, position: Index) -> tuple[Tensor, Tensor]:
        """(document, place inside it) of positions; document -1 past the last one. Batched tables add a leading dim."""
        p = torch.as_tensor(position, dtype=torch.int64)
        bounds = self.bounds(p.device)
        if bounds.dim() == 1:
            document = torch.bucketize(p, bounds, right=True) - 1
            start = bounds[document]
        else:
            flat = p.reshape(-1).expand(bounds.shape[0], -1).contiguous()
            document = torch.searchsorted(bounds, flat, right=True) - 1
            start = bounds.gather(1, document)
            shape = (bounds.shape[0], *([1] * (3 - p.dim())), *p.shape)
            document, start = document.view(shape), start.view(shape)
        inside = document < bounds.shape[-1] - 1
        return torch.where(inside, document, torch.full_like(document, -1)), p - start

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        mine, _ = self.locate(q)
        other, _ = self.locate(k)
        return ((mine == other) & (mine >= 0)) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(documents=self),)

    @property
    def varies_by_sample(self) -> bool:
        return self.lengths.dim() > 1 and self.lengths.shape[0] > 1

    def of_sample(self, sample: int) -> Documents:
        table = self.lengths
        return self if table.dim() == 1 else Documents(table[sample if table.shape[0] > 1 else 0])

    @property
    def varies_by_head(self) -> bool:
        return False

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        same, common, _, _ = self.shared(q, k)
        return same * 1, (common > 0) * 1

    def shared(self, q: Block, k: Block) -> tuple[Tensor, Tensor, Block, Block]:
        """Whether all rows surely are in one document; in how many both sides may be; their rows in the first of these.

        Those rows are blocks of positions inside that document; they say nothing where it is none.
        """
        (a, _), (b, _), (c, _), (d, _) = (self.locate(x) for x in (q.low, q.high, k.low, k.high))
        same = (a >= 0) & (a == b) & (a == c) & (a == d)
        past = self.lengths.shape[-1]
        a, b, c, d = (torch.where(x < 0, past, x) for x in (a, b, c, d))
        first = torch.maximum(a, c)
        common = (torch.minimum(b, d).clamp(max=past - 1) - first + 1).clamp(min=0)
        bounds, at = self.bounds(first.device), first.clamp(max=past - 1)
        if bounds.dim() == 1:
            start, end = bounds[at], bounds[at + 1]
        else:
            flat = at.reshape(bounds.shape[0], -1)
            start, end = (bounds.gather(1, flat + i).view(at.shape) for i in (0, 1))
        return same, common, _inside(q, start, end), _inside(k, start, end)

    def check(self, problem: Problem) -> None:
        if self.lengths.dim() == 2 and self.lengths.shape[0] not in (1, problem.batch):
            raise InvalidInput(
                f"Documents: lengths hold {self.lengths.shape[0]} samples, q has {problem.batch}; give one row each."
            )
        if self.lengths.device.type != "meta" and bool((self.lengths < 0).any()):
            raise InvalidInput(f"Documents: expected lengths >= 0. Got {int(self.lengths.min())}.")


def _inside(rows: Block, start: Tensor, end: Tensor) -> Block:
    """The rows that stand from ``start`` to before ``end``, as positions from ``start``."""
    low = torch.maximum(rows.low, start)
    high = torch.maximum(torch.minimum(rows.high, end - 1), low)
    return Block(low - start, high - start, torch.where(low == rows.low, rows.step, 1))


@dataclass(frozen=True, eq=False)
class Packed(Pattern):
    """``Documents(lengths).of(inner)``: the inner pattern restarts in every document."""

    lengths: Tensor
    inner: Pattern

    @property
    def documents(self) -> Documents:
        """The documents alone."""
        return Documents(self.lengths)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return (self.lengths, *self.inner.tables)

    def text(self, first_table: int = 0) -> str:
        return f"Packed(lengths=t{first_table}, inner={self.inner.text(first_table + 1)})"

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        documents = self.documents
        mine, q_inside = documents.locate(q)
        other, k_inside = documents.locate(k)
        return self.inner.count(head, num_heads, q_inside, k_inside) * ((mine == other) & (mine >= 0))

    def branches(self) -> tuple[Branch, ...] | None:
        inner = self.inner.branches()
        if inner is None or any(b.documents is not None for b in inner):
            return None
        documents = self.documents
        return tuple(replace(b, documents=documents) for b in inner)

    @property
    def varies_by_sample(self) -> bool:
        return self.documents.varies_by_sample or self.inner.varies_by_sample

    def of_sample(self, sample: int) -> Packed:
        return Packed(self.documents.of_sample(sample).lengths, self.inner.of_sample(sample))

    @property
    def is_causal(self) -> bool:
        return self.inner.is_causal

    @property
    def varies_by_head(self) -> bool:
        return self.inner.varies_by_head

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        same, common, mine, other = self.documents.shared(q, k)
        low, high = self.inner.count_bounds(head, num_heads, mine, other)
        return same * low, torch.where(common > 1, UNBOUNDED, (common > 0) * high)

    def check(self, problem: Problem) -> None:
        self.documents.check(problem)
        if self.lengths.device.type == "meta":
            self.inner.check(problem)
            return
        longest = int(self.lengths.max())  # the inner pattern meets no place beyond it
        queries, keys = (
            (Run(0, 1, min(positions_end(at), longest)),) for at in (problem.query_positions, problem.key_positions)
        )
        self.inner.check(replace(problem, query_positions=queries, key_positions=keys))
