"""What a plan is: frozen data that says how to walk a pattern for one set of shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import dense_counts
from dilated_attention_pytorch.problem import Problem, positions_tensor


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """How to walk a pattern. `expand` gives back its counts without any kernel (law 7)."""

    pattern: Pattern

    @property
    def kind(self) -> str:
        """The name by which measurements know this way to walk."""
        return type(self).__name__

    @abstractmethod
    def expand(self, problem: Problem) -> Tensor:
        """The counts that a backend walking this plan computes with: (B, H, Nq, Nk), int64."""

    @abstractmethod
    def issued_pairs(self, problem: Problem) -> int:
        """Query-key pairs over all samples and heads that a backend computes logits for."""

    @abstractmethod
    def describe(self, problem: Problem) -> str:
        """One line for `explain`."""


@dataclass(frozen=True, eq=False)
class DensePlan(Plan):
    """Every query against every key, with the logarithm of the count added to the logit.

    ``short`` is the problem without its numbers where all counts may be held at once; elsewhere backends make them
    block by block.
    """

    short: Problem | None = None

    @cached_property
    def log_counts(self) -> Tensor | None:
        """Logarithms of the counts of a short problem (B or 1, H, Nq, Nk), accumulate dtype; made when first asked for.

        None for long problems.
        """
        if self.short is None:
            return None
        device = self.short.q.device
        head = torch.arange(self.short.num_heads, device=device)
        q, k = (positions_tensor(at, device) for at in (self.short.query_positions, self.short.key_positions))
        return block_counts(self.pattern, self.short, head, q, k).to(self.short.accumulate_dtype).log()

    def expand(self, problem: Problem) -> Tensor:
        device = problem.q.device
        return block_counts(
            self.pattern,
            problem,
            torch.arange(problem.num_heads, device=device),
            positions_tensor(problem.query_positions, device),
            positions_tensor(problem.key_positions, device),
        ).expand(problem.batch, problem.num_heads, problem.query_length, problem.key_length)

    def issued_pairs(self, problem: Problem) -> int:
        return problem.batch * problem.num_heads * problem.query_length * problem.key_length

    def describe(self, problem: Problem) -> str:
        return f"dense: {problem.query_length} x {problem.key_length} with log-counts"


def block_counts(pattern: Pattern, problem: Problem, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Counts of a block of heads, query positions and key positions, padding included: (B or 1, H, Nq, Nk), int64."""
    counts = dense_counts(pattern, head.view(-1, 1, 1), problem.num_heads, q.view(-1, 1), k)
    counts = counts if counts.dim() == 4 else counts.unsqueeze(0)
    if problem.key_lengths is not None:
        lengths = torch.tensor(problem.key_lengths, device=k.device).view(-1, 1, 1, 1)
        counts = counts * (k < lengths)
    return counts


def shapes_of(problem: Problem) -> Problem:
    """The problem without its numbers: shapes, dtype, device and positions; keeps no tensor alive."""
    q, k, v = (x.new_empty(1).expand(x.shape) for x in (problem.q, problem.k, problem.v))
    return replace(problem, q=q, k=k, v=v, bias=None, score=None, dropout_p=0.0, seed=None)
