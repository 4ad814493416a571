"""The ring: in step t a rank works on the keys and values of the rank t behind it, while those of the next one come.

Shards go straight from the rank that has them to the one that needs them, so a rank forwards nothing, its own shard is
never written, and a step that the pattern leaves empty sends nothing. In backward the shards come once more, and the
shares of their gradients go back, in the accumulate dtype.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.parallel.layouts import row_count
from dilated_attention_pytorch.parallel.runs import partial_backward, partial_forward
from dilated_attention_pytorch.parallel.sight import sources
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.parallel.wire import Pending, start_exchange
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans.planner import digest
from dilated_attention_pytorch.problem import Problem

_CACHE_SIZE = 256
_cache: OrderedDict[tuple[object, ...], tuple[_Step, ...]] = OrderedDict()
_lock = threading.Lock()


class _Step(NamedTuple):
    """What one step is to a rank: whose keys it needs, and who needs its own; None where nobody."""

    source: int | None
    receiver: int | None


def reasons_against(problem: Problem, pattern: Pattern, world: World) -> list[str]:
    """Why a ring cannot compute this; empty means it can.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import Run
        >>> x, rows = torch.empty(1, 4, 1, 8), (Run(0, 1, 4),)
        >>> reasons_against(Problem(x, x, x, 1.0, rows, rows), Causal(), World(0, (rows,), (rows,)))
        []
    """
    return [] if problem.bias is None else ["ring has no bias; use score=Relative"]


def forward(
    problem: Problem, pattern: Pattern, world: World, backend: str = "auto"
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out, lse) of this rank's queries over the keys of all ranks, in the accumulate dtype; nothing more is kept."""
    p = problem
    transfers = _Transfers(p, pattern, world)
    transfers.fetch(0)
    out, lse = partial_forward(p, pattern, backend)
    for number, step in enumerate(transfers.steps):
        transfers.fetch(number + 1)
        transfers.await_rows(number)
        if step.source is not None:
            part_out, part_lse = partial_forward(transfers.problem(number), pattern, backend)
            merge_into(out.transpose(1, 2), lse, part_out.transpose(1, 2), part_lse)
    return out, lse, ()


def backward(
    problem: Problem,
    pattern: Pattern,
    world: World,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Tensor, ...],
    backend: str = "auto",
) -> Gradients:
    """The gradients of this rank's q, k and v in the accumulate dtype, given its rows of the global out and lse."""
    p = problem
    transfers = _Transfers(p, pattern, world)
    transfers.fetch(0)
    own = partial_backward(p, pattern, dout, dlse, out, lse, backend)
    coming: tuple[Pending, Tensor] | None = None
    for number, step in enumerate(transfers.steps):
        transfers.fetch(number + 1)
        transfers.await_rows(number)
        share: Tensor | None = None
        if step.source is not None:
            part = partial_backward(transfers.problem(number), pattern, dout, dlse, out, lse, backend)
            own.q.add_(part.q)
            share = _packed(part.k, part.v)
        _add(own, coming)
        coming = transfers.give_back(number, share)
    _add(own, coming)
    return own


def traffic(problem: Problem, pattern: Pattern, world: World) -> Traffic:
    """Bytes that this rank receives: forward the shards it needs; backward these again, and gradients of its own.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import Run
        >>> x, rows = torch.empty(1, 4, 1, 8), ((Run(0, 1, 4),), (Run(4, 1, 4),))
        >>> [traffic(Problem(x, x, x, 1.0, rows[r], rows[r]), Causal(), World(r, rows, rows)) for r in (0, 1)]
        [Traffic(forward=0, backward=256), Traffic(forward=256, backward=256)]
    """
    p = problem
    width = p.batch * p.k.shape[2] * (p.k.shape[3] + p.v.shape[3])
    needed, needing = sources(pattern, p.num_heads, world, p.key_lengths)
    others = [rank for rank in range(world.size) if rank != world.rank]
    comes = width * sum(row_count(world.keys[rank]) for rank in others if needed[rank]) * p.k.element_size()
    back = width * sum(needing[rank] for rank in others) * row_count(world.keys[world.rank])
    return Traffic(comes, comes + back * p.accumulate_dtype.itemsize)


class _Transfers:
    """The exchanges of one pass. Two buffers take turns: one is filled while the other is read."""

    def __init__(self, problem: Problem, pattern: Pattern, world: World) -> None:
        self.problem_of_rank, self.world = problem, world
        self.steps = _steps(problem, pattern, world)
        k, v = problem.k, problem.v
        self.own = _packed(k, v) if any(step.receiver is not None for step in self.steps) else k.new_empty(0)
        self.row_size = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])
        longest = max((self._rows(step) for step in self.steps), default=0)
        count = min(2, sum(step.source is not None for step in self.steps))
        self.buffers = [k.new_empty(longest * self.row_size) for _ in range(count)]
        self.filled: dict[int, Tensor] = {}
        self.pending: dict[int, Pending] = {}

    def fetch(self, number: int) -> None:
        """Start the exchange of keys and values of a step, if there is such a step."""
        if number >= len(self.steps):
            return
        step, receives = self.steps[number], []
        if step.source is not None:
            turn = len(self.filled) % len(self.buffers)
            self.filled[number] = self.buffers[turn][: self._rows(step) * self.row_size]
            receives = [(step.source, self.filled[number])]
        sends = [] if step.receiver is None else [(step.receiver, self.own)]
        self.pending[number] = start_exchange(self._group, sends, receives)

    def await_rows(self, number: int) -> None:
        """Return when a step's keys and values are there."""
        self.pending.pop(number).wait()

    def problem(self, number: int) -> Problem:
        """This rank's queries over the keys that came in a step."""
        p, source = self.problem_of_rank, self.steps[number].source
        assert source is not None
        rows = row_count(self.world.keys[source])
        shapes = [(p.batch, rows, *x.shape[2:]) for x in (p.k, p.v)]
        sizes = [p.batch * rows * x.shape[2] * x.shape[3] for x in (p.k, p.v)]
        k, v = (x.view(shape) for x, shape in zip(self.filled[number].split(sizes), shapes))
        return replace(p, k=k, v=v, key_positions=self.world.keys[source])

    def give_back(self, number: int, share: Tensor | None) -> tuple[Pending, Tensor]:
        """Start sending a step's gradients to where its rows came from, and receiving such for this rank's rows."""
        p, step = self.problem_of_rank, self.steps[number]
        sends = [(step.source, share)] if step.source is not None and share is not None else []
        size = 0 if step.receiver is None else p.key_length * self.row_size
        received = p.k.new_empty(size, dtype=p.accumulate_dtype)
        receives = [] if step.receiver is None else [(step.receiver, received)]
        return start_exchange(self._group, sends, receives), received

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.world.group is not None, "this world is only planned"
        return self.world.group

    def _rows(self, step: _Step) -> int:
        return 0 if step.source is None else row_count(self.world.keys[step.source])


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values in one flat tensor of its own: one message."""
    return torch.cat((k.reshape(-1), v.reshape(-1)))


def _add(own: Gradients, coming: tuple[Pending, Tensor] | None) -> None:
    """Add what came of the gradients of this rank's rows."""
    if coming is None:
        return
    pending, received = coming
    pending.wait()
    if received.numel() > 0:
        dk, dv = received.split((own.k.numel(), own.v.numel()))
        own.k.add_(dk.view(own.k.shape))
        own.v.add_(dv.view(own.v.shape))


def _steps(problem: Problem, pattern: Pattern, world: World) -> Sequence[_Step]:
    """The steps behind the rank's own, in which anything is to be done anywhere; kept in a bounded cache."""
    if world.size == 1:
        return ()
    key = (
        pattern.text(),
        tuple(map(digest, pattern.tables)),
        problem.num_heads,
        problem.key_lengths,
        world.rank,
        world.queries,
        world.keys,
    )
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    needed, needing = sources(pattern, problem.num_heads, world, problem.key_lengths)
    steps = []
    for distance in range(1, world.size):
        source, receiver = (world.rank - distance) % world.size, (world.rank + distance) % world.size
        steps.append(
            _Step(
                source if needed[source] and world.queries[world.rank] else None,
                receiver if needing[receiver] and world.keys[world.rank] else None,
            )
        )
    with _lock:
        _cache[key] = tuple(steps)
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return tuple(steps)
