"""The shapes that the attention benchmarks are measured on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One shape: N tokens, H heads of head dim D, and LongNet's branches. Batch 1."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs that the branches count, over all heads."""
        return sum(self.branch_pairs(w, r) for w, r in zip(self.segment_lengths, self.dilation_rates))

    def branch_pairs(self, segment_length: int, rate: int) -> int:
        """Pairs of one branch, over all heads; the last segment may be cut short."""
        w = min(segment_length, self.tokens)
        whole, rest = divmod(self.tokens, w)
        pairs = 0
        for head in range(self.heads):
            in_whole, in_rest = (max(0, -(-(length - head % rate) // rate)) for length in (w, rest))
            pairs += whole * in_whole**2 + in_rest**2
        return pairs

    def flops(self, with_backward: bool = False) -> float:
        """Useful floating point operations: ``4 D`` for each pair, and 2.5 times as many backward."""
        return 4.0 * self.head_dim * self.pairs * (3.5 if with_backward else 1.0)

    def describe(self) -> str:
        """The shape in one line."""
        w, r = (" ".join(map(str, x)) for x in (self.segment_lengths, self.dilation_rates))
        return f"N {self.tokens}, H {self.heads}, D {self.head_dim}, w {w}, r {r}"


PAPER = Case("paper", 1 << 20, 12, 64, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
"""LongNet's branches (arXiv 2307.02486)."""
GIGAPATH = Case("GigaPath", 1 << 20, 16, 48, (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
"""Those that Prov-GigaPath was trained with."""
CASES = (
    Case("A", 16384, 12, 64, (2048, 4096, 8192), (1, 2, 4)),
    Case("B", 65536, 4, 32, (256, 512, 1024), (1, 2, 4)),
    Case("C", 32768, 16, 48, (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)),
)
