"""One call over ranks, decided: which method works between them, on which problem, by which backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.parallel import heads
from dilated_attention_pytorch.parallel.choice import METHODS, Method, choose_method
from dilated_attention_pytorch.parallel.grouping import two_worlds
from dilated_attention_pytorch.parallel.layouts import row_count
from dilated_attention_pytorch.parallel.runs import check_backend
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.problem import Problem


@dataclass(frozen=True, eq=False)
class Call:
    """What forward and backward of one call share besides tensors: the problem without rows, and how it is done.

    With an ``inner`` world heads are exchanged for tokens inside it, and ``method`` works in the ``outer`` one.
    """

    problem: Problem  # its q, k, v hold no numbers
    pattern: Pattern
    outer: World
    inner: World | None
    method: Method
    backend: str

    @property
    def _exchanging(self) -> World | None:
        """Where heads are exchanged for tokens."""
        return self.outer if self.inner is None and self.method is heads else self.inner

    @property
    def keeps_all(self) -> bool:
        """Whether what a forward pass keeps is all that backward reads: heads of all rows, but for shapes."""
        return self._exchanging is not None and self._exchanging.size > 1

    @property
    def without_numbers(self) -> tuple[Tensor, ...]:
        """q, k, v, out and lse as shapes only."""
        p = self.problem
        out = p.q.new_empty(1).expand(p.batch, p.query_length, p.num_heads, p.v.shape[3])
        lse = p.q.new_empty(1, dtype=p.accumulate_dtype).expand(p.batch, p.num_heads, p.query_length)
        return p.q, p.k, p.v, out, lse

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(out, lse) of this rank's rows, and what `backward` wants besides."""

        def compute(p: Problem, pattern: Pattern) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            found: tuple[Tensor, Tensor, tuple[Tensor, ...]]
            found = self.method.forward(p, pattern, self.outer, self.backend)
            return found

        if self.inner is None:
            return compute(problem, self.pattern)
        return heads.forward_with(problem, self.pattern, self.inner, compute)

    def backward(
        self, p: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, kept: tuple[Tensor, ...]
    ) -> Gradients:
        """The gradients of this rank's rows, from its rows of the global out and lse."""

        def compute(problem: Problem, pattern: Pattern, *given: Any) -> Gradients:
            grads: Gradients = self.method.backward(problem, pattern, self.outer, *given, self.backend)
            return grads

        if self.inner is None:
            return compute(p, self.pattern, dout, dlse, out, lse, kept)
        return heads.backward_with(p, self.pattern, self.inner, dout, dlse, out, lse, kept, compute)

    def agree_on_backend(self, group: dist.ProcessGroup) -> None:
        """Raise NoBackend on every rank when the backend, asked for by name, cannot compute what one of them has.

        What it is asked are the rank's queries over its own keys and those of every other rank. ("auto" always can.)
        """
        if self.backend == "auto":
            return
        reason = ""
        try:
            for problem, pattern in self._steps():
                check_backend(problem, pattern, self.backend)
        except NoBackend as own:
            reason = str(own)
        told = [""] * dist.get_world_size(group)
        dist.all_gather_object(told, reason, group=group)
        reasons = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
        if reasons:
            raise NoBackend("; ".join(dict.fromkeys(reasons)))

    def _steps(self) -> Iterator[tuple[Problem, Pattern]]:
        """The problems of a rank, each with the keys of one rank; they hold no numbers."""
        problem, pattern, device = self.problem, self.pattern, self.problem.q.device
        worlds = [w for w in (self._exchanging, None if self.method is heads else self.outer) if w is not None]
        if self._exchanging is not None:
            problem, pattern = heads.inside(problem, pattern, self._exchanging)
        sources = [problem.key_positions] if self._exchanging is worlds[-1] else worlds[-1].keys
        for keys in sources:
            rows = problem.query_length, row_count(keys), row_count(keys)
            q, k, v = (
                torch.empty((x.shape[0], n, *x.shape[2:]), dtype=x.dtype, device=device)
                for x, n in zip((problem.q, problem.k, problem.v), rows)
            )
            yield replace(problem, q=q, k=k, v=v, key_positions=keys), pattern


def make_call(
    problem: Problem, pattern: Pattern, world: World, mesh: DeviceMesh | None, method: str, backend: str
) -> Call:
    """How a problem of this rank is served, which every rank finds alike; a mesh of two dims has an inner world.

    Raises InvalidInput for a mesh of more dims, and for heads that its rows cannot share; NoBackend as `choose_method`.
    """
    q, k, v = (x.new_empty(1).expand(x.shape) for x in (problem.q, problem.k, problem.v))
    shapes = replace(problem, q=q, k=k, v=v)
    if mesh is None or mesh.ndim == 1 or method == "all_to_all":
        name = choose_method(shapes, pattern, world, method).name
        return Call(shapes, pattern, world, None, METHODS[name], backend)
    if mesh.ndim != 2:
        raise InvalidInput(f"context_parallel_attend: expected a mesh of one or two dims. Got {mesh.ndim}.")
    outer, inner = two_worlds(world, mesh.size(1), mesh.get_group(1), mesh.get_group(0))
    against = heads.reasons_against(shapes, pattern, inner)
    if against:
        raise InvalidInput(f"context_parallel_attend: rows of the mesh exchange heads for tokens. {'; '.join(against)}")
    name = choose_method(*heads.inside(shapes, pattern, inner), outer, method).name
    return Call(shapes, pattern, outer, inner, METHODS[name], backend)
