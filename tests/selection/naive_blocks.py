"""What selectors read, written once more with lists and loops, for tests to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dilated_attention_pytorch.patterns import Causal, Dilated, Documents, Full, Pattern, Window
from dilated_attention_pytorch.problem import Problem
from dilated_attention_pytorch.selection.blocks import QueryBlocks, blocks_problem
from dilated_attention_pytorch.selection.reading import query_blocks


@dataclass(frozen=True)
class Sizes:
    """Nq queries from position ``start``, Nk keys, and the keys of each sample when some are padding."""

    queries: int
    keys: int
    start: int
    block: int
    pattern: Pattern
    lengths: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)
    lookahead: bool = False

    @property
    def reads_own(self) -> bool:
        return self.lookahead or not self.pattern.is_causal

    @property
    def first(self) -> int:
        return self.start // self.block

    @property
    def rows(self) -> range:
        """Blocks that hold queries."""
        return range(self.first, math.ceil((self.start + self.queries) / self.block))

    @property
    def columns(self) -> range:
        return range(math.ceil(self.keys / self.block))

    def tensors(self, dim: int = 6):
        """q, k and the padding mask or None, from one seed."""
        generator = torch.Generator().manual_seed(self.queries + self.keys)
        q = torch.randn(2, self.queries, self.heads[0], dim, generator=generator)
        k = torch.randn(2, self.keys, self.heads[1], dim, generator=generator)
        if self.lengths is None:
            return q, k, None
        return q, k, torch.arange(self.keys) >= torch.tensor(self.lengths).view(-1, 1)

    def problem(self, scale: float = 0.7) -> Problem:
        q, k, mask = self.tensors()
        return blocks_problem(q, k, self.pattern, key_padding_mask=mask, query_start=self.start, scale=scale)

    def read(self, scale: float = 0.7, **options) -> QueryBlocks:
        return query_blocks(self.problem(scale), self.pattern, self.block, lookahead=self.lookahead, **options)

    def length(self, sample: int) -> int:
        return self.keys if self.lengths is None else self.lengths[sample]

    def own_rows(self, sample: int, row: int) -> list[int]:
        """Rows of q of a block, without those at padded places unless there are no others."""
        held = [i for i in range(self.queries) if (self.start + i) // self.block == row]
        kept = [i for i in held if not self.length(sample) <= self.start + i < self.keys]
        return kept or held

    def judged_by(self, sample: int, row: int) -> list[int]:
        """Rows of q that a block is judged by."""
        if self.reads_own:
            return self.own_rows(sample, row)
        return [0] if row == self.first else self.own_rows(sample, row - 1)

    def keys_of(self, sample: int, column: int) -> list[int]:
        return [j for j in range(self.length(sample)) if j // self.block == column]

    def counts(self) -> torch.Tensor:
        """(B, H, Nq, Nk) counts of the pattern, 0 on padding."""
        counts = self.pattern.to_mask(self.heads[0], self.queries, self.keys, query_start=self.start)
        held = torch.tensor([[j < self.length(b) for j in range(self.keys)] for b in range(2)])
        return counts.expand(2, self.heads[0], -1, -1) * held[:, None, None, :]


SIZES = {
    "causal": Sizes(40, 40, 0, 8, Causal()),
    "causal_ragged": Sizes(37, 37, 0, 8, Causal()),
    "causal_one_block": Sizes(5, 5, 0, 8, Causal()),
    "causal_padded": Sizes(37, 37, 0, 8, Causal(), lengths=(37, 19)),
    "causal_placed": Sizes(21, 40, 13, 8, Causal(), heads=(4, 1)),
    "causal_decoding": Sizes(1, 29, 28, 4, Causal()),
    "causal_lookahead": Sizes(37, 37, 0, 8, Causal(), lengths=(37, 19), lookahead=True),
    "causal_dilated": Sizes(40, 40, 0, 4, Dilated(16, 2) & Causal(), heads=(2, 2)),
    "full_padded": Sizes(30, 45, 0, 8, Full(), lengths=(11, 45)),
    "full_past_the_keys": Sizes(20, 9, 4, 4, Full(), heads=(2, 2)),
    "window": Sizes(37, 37, 0, 8, Window(10), lengths=(37, 30)),
    "documents": Sizes(40, 40, 0, 8, Documents([[12, 28], [40, 0]]).of(Causal())),
}
