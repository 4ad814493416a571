"""A pattern as small dense problems on strided views: no gather, no scatter, no padding.

Branch (w, r) on grid class c is the view ``x[:, s*w + c + m*r]`` over segments s and places m. A plan cuts the rows
into chunks that are closed under every branch, and lists for each chunk the pieces that a dense kernel computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.plans.base import Plan
from dilated_attention_pytorch.problem import Problem


class Band(NamedTuple):
    """Row x of a piece sees key y when ``|x + diagonal - y| < size``, and ``y <= x + diagonal`` if causal."""

    diagonal: int
    size: int
    is_causal: bool

    def visible(self, query_length: int, key_length: int, device: torch.device | str = "cpu") -> Tensor:
        """The boolean mask (query_length, key_length)."""
        distance = torch.arange(query_length, device=device).view(-1, 1) + self.diagonal
        distance = distance - torch.arange(key_length, device=device)
        seen = distance.abs() < self.size
        return seen & (distance >= 0) if self.is_causal else seen

    def pairs(self, query_length: int, key_length: int) -> int:
        """Visible pairs, without making the mask."""
        x = np.arange(query_length, dtype=np.int64) + self.diagonal
        low = np.maximum(x - self.size + 1, 0)
        high = np.minimum(x + (0 if self.is_causal else self.size - 1), key_length - 1)
        return int(np.maximum(high - low + 1, 0).sum())


class Rows(NamedTuple):
    """Rows ``start + s * stride + m * step`` of a chunk, for every segment s and place ``m < length``."""

    start: int
    step: int
    length: int
    stride: int

    def slices(self, segments: int) -> list[slice]:
        """One slice for each segment."""
        starts = (self.start + s * self.stride for s in range(segments))
        return [slice(a, a + (self.length - 1) * self.step + 1, self.step) for a in starts]


@dataclass(frozen=True)
class Piece:
    """``segments`` dense problems of equal shape; every query row in it sees at least one key.

    A causal piece is square and row x sees keys ``y <= x``. `fresh` says that no earlier piece of the chunk touches the
    query rows, `fresh_keys` the same of the key rows: a result may be written instead of merged or added.
    """

    segments: int
    queries: Rows
    keys: Rows
    is_causal: bool = False
    band: Band | None = None
    fresh: bool = False
    fresh_keys: bool = False

    @property
    def pairs(self) -> int:
        """Visible query-key pairs, for one sample and one head."""
        nq, nk = self.queries.length, self.keys.length
        if self.band is not None:
            return self.segments * self.band.pairs(nq, nk)
        return self.segments * (nq * (nq + 1) // 2 if self.is_causal else nq * nk)


class HeadSlice(NamedTuple):
    """Heads ``start, start + step, ...``, ``size`` of them."""

    start: int
    step: int
    size: int

    def part(self, first: int, count: int) -> slice:
        """The slice of ``count`` heads from the first-th on."""
        start = self.start + first * self.step
        return slice(start, start + (count - 1) * self.step + 1, self.step)


@dataclass(frozen=True)
class Chunk:
    """Rows that no piece leaves: queries and keys as half-open row ranges, heads whose grids coincide, and samples.

    `complete` says that the fresh pieces write every query row; otherwise rows start at out 0, lse -inf.
    `complete_keys` is the same for the gradients of the key rows.
    """

    samples: tuple[int, int]
    heads: HeadSlice
    queries: tuple[int, int]
    keys: tuple[int, int]
    pieces: tuple[Piece, ...]
    complete: bool
    complete_keys: bool

    @property
    def pairs(self) -> int:
        """Visible query-key pairs over its samples and heads."""
        return (self.samples[1] - self.samples[0]) * self.heads.size * sum(p.pairs for p in self.pieces)


@dataclass(frozen=True, eq=False)
class StridedPlan(Plan):
    """Chunks that together hold every query row of every sample and head exactly once."""

    chunks: tuple[Chunk, ...] = ()

    def expand(self, problem: Problem) -> Tensor:
        shape = (problem.batch, problem.num_heads, problem.query_length, problem.key_length)
        counts = torch.zeros(shape, dtype=torch.int64)
        for c in self.chunks:
            heads = c.heads.part(0, c.heads.size)
            block = counts[slice(*c.samples), heads, slice(*c.queries), slice(*c.keys)]
            for p in c.pieces:
                nq, nk = p.queries.length, p.keys.length
                seen = torch.ones(nq, nk, dtype=torch.int64)
                if p.band is not None:
                    seen = p.band.visible(nq, nk).long()
                elif p.is_causal:
                    seen = seen.tril()
                for rows, columns in zip(p.queries.slices(p.segments), p.keys.slices(p.segments)):
                    block[:, :, rows, columns] += seen
        return counts.to(problem.q.device)

    def issued_pairs(self, problem: Problem) -> int:
        return sum(c.pairs for c in self.chunks)

    def describe(self, problem: Problem) -> str:
        calls = sum(len(c.pieces) for c in self.chunks)
        longest = max((c.queries[1] - c.queries[0] for c in self.chunks), default=0)
        return f"strided: {len(self.chunks)} chunks of at most {longest} rows, {calls} pieces, no gather"
