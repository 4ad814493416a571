"""What a backend is: it computes a plan, or says every reason why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from dilated_attention_pytorch.plans import Plan
from dilated_attention_pytorch.problem import Problem


class Gradients(NamedTuple):
    """Gradients with the shapes and dtypes of q, k, v; that of the bias (its shape, accumulate dtype) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None

    def plus(self, other: Gradients) -> Gradients:
        """The sum of two shares of the gradients of one problem."""
        bias = self.bias if self.bias is None or other.bias is None else self.bias + other.bias
        return Gradients(self.q + other.q, self.k + other.k, self.v + other.v, bias)


class Backend(ABC):
    """One way to compute plans. Stateless; forward and backward are pure functions of their arguments."""

    name: ClassVar[str]
    plans: ClassVar[tuple[type[Plan], ...]]

    def import_error(self) -> str | None:
        """Why the backend cannot be used in this installation at all, or None."""
        return None

    @abstractmethod
    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        """Why this backend cannot compute this plan for this problem; empty means it can."""

    @abstractmethod
    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        """Out (B, Nq, H, Dv) in q's dtype, and lse (B, H, Nq) in the accumulate dtype."""

    @abstractmethod
    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """The gradients through every pair of the plan, given the global out and lse.

        ``out`` and ``lse`` may belong to more keys than the plan's (ring steps, branches): the pairs of this plan then
        give their share of the exact gradient.
        """
