"""The ring: in step t a rank works on the keys and values of the rank t behind it, while those of the next one come.

Rows go straight from the rank that has them to the one that needs them, so a rank forwards nothing, its own shard is
never written, and what the pattern leaves unseen is not sent: whole steps of it, or the blocks of a shard that no query
of the receiver may see. In backward the rows come once more, and the shares of their gradients go back, in the
accumulate dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.memory import empty
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.parallel.runs import partial_backward, partial_forward
from dilated_attention_pytorch.parallel.sight import Part, sources
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.parallel.wire import Pending, start_exchange
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans.planner import digest
from dilated_attention_pytorch.problem import Positions, Problem

_cache = BoundedCache(256)


class _Step(NamedTuple):
    """What one step is to a rank: the rank behind and its rows that come, the rank ahead and the own rows that go."""

    source: int
    needed: Part
    receiver: int
    given: Part


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
        if step.needed.slices:
            part_out, part_lse = partial_forward(transfers.problem(number), pattern, backend)
            merge_into(out.transpose(1, 2), lse, part_out.transpose(1, 2), part_lse)
    return out, lse.to(p.accumulate_dtype), ()


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
    coming: _Returning | None = None
    for number, step in enumerate(transfers.steps):
        transfers.fetch(number + 1)
        transfers.await_rows(number)
        share: Tensor | None = None
        if step.needed.slices:
            part = partial_backward(transfers.problem(number), pattern, dout, dlse, out, lse, backend)
            own.q.add_(part.q)
            share = _packed(part.k, part.v, (slice(None),))
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
    row = p.batch * p.k.shape[2] * (p.k.shape[3] + p.v.shape[3])
    steps = _steps(p, pattern, world)
    comes = row * sum(step.needed.length for step in steps) * p.k.element_size()
    back = row * sum(step.given.length for step in steps) * p.accumulate_dtype.itemsize
    return Traffic(comes, comes + back)


class _Returning(NamedTuple):
    """Gradients of own rows on their way home."""

    pending: Pending
    received: Tensor
    rows: Part


class _Transfers:
    """The exchanges of one pass. Two buffers take turns: one is filled while the other is read."""

    def __init__(self, problem: Problem, pattern: Pattern, world: World) -> None:
        self.own, self.world = problem, world
        self.steps = _steps(problem, pattern, world)
        k, v = problem.k, problem.v
        self.row_size = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])
        longest = max((step.needed.length for step in self.steps), default=0)
        count = min(2, sum(bool(step.needed.slices) for step in self.steps))
        self.buffers = [empty((longest * self.row_size,), k.dtype, k.device, "ring") for _ in range(count)]
        self.filled: dict[int, Tensor] = {}
        self.pending: dict[int, Pending] = {}
        self.packed: dict[Positions, Tensor] = {}

    def fetch(self, number: int) -> None:
        """Start the exchange of keys and values of a step, if there is such a step."""
        if number >= len(self.steps):
            return
        step, sends, receives = self.steps[number], [], []
        if step.needed.slices:
            turn = len(self.filled) % len(self.buffers)
            self.filled[number] = self.buffers[turn][: step.needed.length * self.row_size]
            receives = [(step.source, self.filled[number])]
        if step.given.slices:
            sends = [(step.receiver, self._rows_to_give(step.given))]
        self.pending[number] = start_exchange(self._group, sends, receives)

    def await_rows(self, number: int) -> None:
        """Return when a step's keys and values are there."""
        self.pending.pop(number).wait()

    def problem(self, number: int) -> Problem:
        """This rank's queries over the keys that came in a step."""
        p, came = self.own, self.steps[number].needed
        shapes = [(p.batch, came.length, *x.shape[2:]) for x in (p.k, p.v)]
        k, v = (x.view(s) for x, s in zip(self.filled[number].split([math.prod(s) for s in shapes]), shapes))
        return replace(p, k=k, v=v, key_positions=came.positions)

    def give_back(self, number: int, share: Tensor | None) -> _Returning:
        """Start sending a step's gradients to where its rows came from, and receiving such for this rank's rows."""
        step, own = self.steps[number], self.own
        sends = [] if share is None else [(step.source, share)]
        received = empty((step.given.length * self.row_size,), own.accumulate_dtype, own.k.device, "ring")
        receives = [(step.receiver, received)] if step.given.slices else []
        return _Returning(start_exchange(self._group, sends, receives), received, step.given)

    def _rows_to_give(self, given: Part) -> Tensor:
        """The message that holds these rows; one for all ranks that want the same."""
        if given.positions not in self.packed:
            self.packed = {given.positions: _packed(self.own.k, self.own.v, given.slices)}
        return self.packed[given.positions]

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.world.group is not None, "this world is only planned"
        return self.world.group


def _packed(k: Tensor, v: Tensor, rows: Sequence[slice]) -> Tensor:
    """Some rows of keys and values in one flat tensor of its own: one message."""
    chosen = (x[:, rows[0]] if len(rows) == 1 else torch.cat([x[:, cut] for cut in rows], 1) for x in (k, v))
    return torch.cat([x.reshape(-1) for x in chosen])


def _add(own: Gradients, coming: _Returning | None) -> None:
    """Add what came of the gradients of this rank's rows."""
    if coming is None:
        return
    coming.pending.wait()
    at = 0
    for total in (own.k, own.v):
        size = total[:, :1].numel() * coming.rows.length
        share = coming.received[at : at + size].view(total.shape[0], coming.rows.length, *total.shape[2:])
        first = 0
        for cut in coming.rows.slices:
            total[:, cut].add_(share[:, first : first + cut.stop - cut.start])
            first += cut.stop - cut.start
        at += size


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
    return _cache.get(key, lambda: _find_steps(problem, pattern, world))


def _find_steps(problem: Problem, pattern: Pattern, world: World) -> tuple[_Step, ...]:
    needed, given = sources(pattern, problem.num_heads, world, problem.key_lengths)
    steps = []
    for distance in range(1, world.size):
        source, receiver = (world.rank - distance) % world.size, (world.rank + distance) % world.size
        steps.append(_Step(source, needed[source], receiver, given[receiver]))
    return tuple(steps)
