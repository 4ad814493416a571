"""LongNet's own scheme (arXiv 2307.02486, section 3): of a branch longer than a shard only the rows on its grid travel.

A rank computes with its own keys while one all-to-all brings the rows of others that its queries see, of all branches
together. What came is then dense problems in places of the grids, whose results are merged into the rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dilated_attention_pytorch import attention
from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.parallel.grids import Term, terms
from dilated_attention_pytorch.parallel.parcels import Bundle, GatherPlan, gather_plan, traffic_rows
from dilated_attention_pytorch.parallel.runs import partial_backward, partial_forward
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.parallel.wire import start_all_to_all
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Full, Pattern
from dilated_attention_pytorch.problem import Problem, positions_end
from dilated_attention_pytorch.scores import Softcap

MOST_RUNS = 1024
"""Runs of a rank's rows at most: plans are made of runs."""


def reasons_against(problem: Problem, pattern: Pattern, world: World) -> list[str]:
    """Why a gather cannot compute this; empty means it can."""
    reasons = []
    if pattern.branches() is None:
        reasons.append("gather needs a pattern in closed form (Full, Causal, Window, Dilated, longnet, Documents.of)")
    if any(table.is_meta for table in pattern.tables):
        reasons.append("gather plans from the lengths of documents, and these are on the meta device")
    if problem.score is not None and not isinstance(problem.score, Softcap):
        reasons.append("gather has no score rules that read positions: a grid's rows are numbered anew")
    if problem.bias is not None:
        reasons.append("gather has no bias")
    if problem.dropout_p > 0:
        reasons.append("gather has no dropout: it draws by positions, and a grid's rows are numbered anew")
    most = max(len(runs) for runs in (*world.queries, *world.keys))
    if most > MOST_RUNS:
        reasons.append(f"gather plans by runs of rows, and a rank's stand in {most}, more than {MOST_RUNS}")
    return reasons


def traffic(problem: Problem, pattern: Pattern, world: World) -> Traffic:
    """Bytes that this rank receives: rows of keys and values forward, their gradients for its own rows backward.

    A row travels once for each branch whose queries there see it, in the problem's dtype; gradients travel in the
    accumulate dtype. Read from shapes and positions alone.

    Example:
        >>> from dilated_attention_pytorch import Dilated
        >>> from dilated_attention_pytorch.problem import Run
        >>> x, rows = torch.empty(1, 4, 1, 8), ((Run(0, 1, 4),), (Run(4, 1, 4),))
        >>> traffic(Problem(x, x, x, 1.0, rows[0], rows[0]), Dilated(8, 2), World(0, rows, rows))  # 2 rows come
        Traffic(forward=128, backward=128)
    """
    received, sent = traffic_rows(_terms(problem, pattern, world), world.rank, world.queries, world.keys)
    width = problem.k.shape[3] + problem.v.shape[3]
    sizes = (dtype.itemsize for dtype in (problem.k.dtype, problem.accumulate_dtype))
    return Traffic(*(rows * width * size for rows, size in zip((received, sent), sizes)))


def forward(
    problem: Problem, pattern: Pattern, world: World, backend: str = "auto"
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out, lse) of this rank's queries in the accumulate dtype, and the rows that came, which backward wants again."""
    p = problem
    if world.size == 1:
        out, lse = partial_forward(p, pattern, backend)
        return out, lse.to(p.accumulate_dtype), ()
    assert world.group is not None, "this world is only planned"
    plan = _plan(p, pattern, world)
    place = plan.sent_rows()
    wire = torch.cat((p.k[place], p.v[place]), -1)  # (rows, D + Dv)
    pending, came = start_all_to_all(world.group, wire, plan.send_counts, plan.receive_counts)
    out, lse = partial_forward(p, pattern, backend)
    pending.wait()
    for bundle in plan.bundles:
        rows = _Rows(bundle, p)
        own_out, own_lse = out[rows.queries], lse[rows.lse]
        for part, _ in rows.parts(came):
            part_out, part_lse = attention.forward(part, bundle.shape.pattern, backend=backend)
            merge_into(own_out.transpose(1, 2), own_lse, part_out.transpose(1, 2), part_lse)
        out[rows.queries], lse[rows.lse] = own_out, own_lse
    return out, lse.to(p.accumulate_dtype), (came,)


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
    """The gradients of this rank's rows in the accumulate dtype; those of rows that came go back to their ranks."""
    p = problem
    if world.size == 1:
        return partial_backward(p, pattern, dout, dlse, out, lse, backend)
    assert world.group is not None, "this world is only planned"
    plan, (came,) = _plan(p, pattern, world), kept
    shares = []
    back = torch.zeros(came.shape, dtype=p.accumulate_dtype, device=came.device)
    for bundle in plan.bundles:
        rows = _Rows(bundle, p)
        own_dlse = None if dlse is None else dlse[rows.lse]
        given = dout[rows.queries], own_dlse, out[rows.queries], lse[rows.lse]
        for part, keys in rows.parts(came):
            grads = attention.backward(part, bundle.shape.pattern, *given, backend=backend)
            shares.append((rows.queries, grads.q))
            back[rows.keys[:, keys]] += torch.cat((grads.k, grads.v), -1).squeeze(2)
    pending, returned = start_all_to_all(world.group, back, plan.receive_counts, plan.send_counts)
    own = partial_backward(p, pattern, dout, dlse, out, lse, backend)
    for place, share in shares:
        own.q[place] += share
    place = plan.sent_rows()
    pending.wait()
    dk, dv = returned.split((p.k.shape[3], p.v.shape[3]), -1)
    own.k.index_put_(place, dk, accumulate=True)
    own.v.index_put_(place, dv, accumulate=True)
    return own


class _Rows:
    """Where the rows of a bundle stand in the problem's tensors and in what came."""

    def __init__(self, bundle: Bundle, problem: Problem) -> None:
        sample, row, head = bundle.samples, bundle.queries.expand(), bundle.heads
        self._bundle, self._problem = bundle, problem
        self.queries = sample[:, None, None], row[:, :, None], head[:, None, :]  # (E, n, t)
        self.lse = sample[:, None, None], head[:, :, None], row[:, None, :]  # (E, t, n)
        self.keys = bundle.keys.expand()  # (E, m)

    def parts(self, came: Tensor) -> Iterator[tuple[Problem, slice]]:
        """The dense problem, whole or each half of its keys alone, and which; a sample for each entry, one kv head.

        In a large world nearly all keys come from other ranks. Computed at once they would be less exact than what two
        ranks merge, an own half and another; so they are halves too where they outnumber the queries, which stand for
        the rank's own keys.
        """
        p, shape = self._problem, self._bundle.shape
        q, (n, m) = p.q[self.queries], (shape.queries.length, shape.keys.length)
        middle = m // 2 if m > n and shape.pattern == Full() else 0
        for keys in (slice(0, middle), slice(middle, m)) if middle else (slice(0, m),):
            k, v = came[self.keys[:, keys]].unsqueeze(2).split((p.k.shape[3], p.v.shape[3]), -1)  # (E, m, 1, D)
            part = replace(
                p,
                q=q,
                k=k,
                v=v,
                query_positions=(shape.queries,),
                key_positions=(shape.keys._replace(length=k.shape[1]) if middle else shape.keys,),
                key_lengths=None,
                of_heads=None,
                partial=True,
            )
            yield part, keys


def _plan(problem: Problem, pattern: Pattern, world: World) -> GatherPlan:
    return gather_plan(_terms(problem, pattern, world), world.rank, world.queries, world.keys, problem.q.device)


def _terms(problem: Problem, pattern: Pattern, world: World) -> tuple[Term, ...]:
    branches = pattern.branches()
    assert branches is not None, "reasons_against says so"
    return terms(branches, problem, max(map(positions_end, (*world.queries, *world.keys))))
