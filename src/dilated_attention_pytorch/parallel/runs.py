"""Attention of rows that stand in several runs, a pair of runs at a time; shares of a larger problem, unrounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch import attention
from dilated_attention_pytorch.backends import Gradients, needs_tiles, select
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.parallel.shapes import relative
from dilated_attention_pytorch.parallel.sight import sees
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import Positions, Problem, Run

MOST_PAIRS = 64
"""Up to so many pairs of runs are problems of their own; rows in more runs are one problem, without closed form."""


class _Piece(NamedTuple):
    problem: Problem
    pattern: Pattern
    queries: slice
    keys: slice


def partial_forward(problem: Problem, pattern: Pattern, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem whose rows stand anywhere, both in the accumulate dtype.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> x, rows = torch.ones(1, 4, 1, 8), (Run(0, 1, 2), Run(6, 1, 2))
        >>> partial_forward(Problem(x, x, x, 0.0, rows, rows), Causal())[1].exp().flatten().round().tolist()
        [1.0, 2.0, 3.0, 4.0]
    """
    p, dtype = problem, problem.accumulate_dtype
    out: Tensor | None = None
    lse: Tensor | None = None
    for piece in _pieces(p, pattern):
        part_out, part_lse = attention.forward(piece.problem, piece.pattern, backend=backend)
        part_out = part_out.to(dtype)
        if out is None or lse is None:
            if part_out.shape[1] == p.query_length:
                out, lse = part_out, part_lse
                continue
            out, lse = _nothing(p)
        rows = piece.queries
        merge_into(out[:, rows].transpose(1, 2), lse[:, :, rows], part_out.transpose(1, 2), part_lse)
    return _nothing(p) if out is None or lse is None else (out, lse)


def partial_backward(
    problem: Problem,
    pattern: Pattern,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    backend: str = "auto",
) -> Gradients:
    """The share that a problem's pairs have in the gradients, in the accumulate dtype, given the global out and lse."""
    p, dtype = problem, problem.accumulate_dtype
    total: Gradients | None = None
    for piece in _pieces(p, pattern):
        rows, keys = piece.queries, piece.keys
        share = attention.backward(
            piece.problem,
            piece.pattern,
            dout[:, rows],
            None if dlse is None else dlse[:, :, rows],
            out[:, rows],
            lse[:, :, rows],
            backend=backend,
        )
        dq, dk, dv = (x.to(dtype) for x in (share.q, share.k, share.v))
        if total is None:
            if dq.shape[1] == p.query_length and dk.shape[1] == p.key_length:
                total = Gradients(dq, dk, dv)
                continue
            total = _no_gradients(p)
        total.q[:, rows] += dq
        total.k[:, keys] += dk
        total.v[:, keys] += dv
    return _no_gradients(p) if total is None else total


def check_backend(problem: Problem, pattern: Pattern, backend: str) -> None:
    """Raise NoBackend, with its reasons, unless the backend of this name can compute the problem; reads shapes only."""
    for piece in _pieces(problem, pattern):
        select(piece.problem, candidate_plans(piece.pattern, piece.problem, needs_tiles(backend)), backend)


def _nothing(p: Problem) -> tuple[Tensor, Tensor]:
    out = p.q.new_zeros((p.batch, p.query_length, p.num_heads, p.v.shape[3]), dtype=p.accumulate_dtype)
    return out, out.new_full((p.batch, p.num_heads, p.query_length), -torch.inf)


def _no_gradients(p: Problem) -> Gradients:
    return Gradients(*(torch.zeros_like(x, dtype=p.accumulate_dtype) for x in (p.q, p.k, p.v)))


def _pieces(problem: Problem, pattern: Pattern) -> Iterator[_Piece]:
    """Problems of one run of queries and one of keys each, where the pattern may see something."""
    p = replace(problem, partial=True)
    if p.q.numel() == 0 or p.v.numel() == 0:
        return
    if len(p.query_positions) * len(p.key_positions) > MOST_PAIRS:
        yield _Piece(p, pattern, slice(0, p.query_length), slice(0, p.key_length))
        return
    for q_run, rows in _cut(p.query_positions):
        for k_run, keys in _cut(p.key_positions):
            if not sees(pattern, p.num_heads, (q_run,), (k_run,), p.key_lengths):
                continue
            part = replace(p, q=p.q[:, rows], k=p.k[:, keys], v=p.v[:, keys])
            yield _Piece(*_placed(part, pattern, q_run, k_run), rows, keys)


def _cut(positions: Positions) -> Iterator[tuple[Run, slice]]:
    first = 0
    for run in positions:
        yield run, slice(first, first + run.length)
        first += run.length


def _placed(part: Problem, pattern: Pattern, q: Run, k: Run) -> tuple[Problem, Pattern]:
    """The problem of two runs and its pattern; runs of equal steps stand closed up where only their order counts."""
    if max(q.step, k.step) > 1 and part.key_lengths is None and part.score is None and part.dropout_p == 0.0:
        branches = pattern.branches()
        if branches is not None and len(branches) == 1:
            (b,) = branches
            if b.segment_length is None and b.documents is None and b.heads is None:
                shape = relative(b.is_causal, b.window, q, k)
                if shape is not None and shape.queries.step == shape.keys.step == 1:
                    placed = replace(part, query_positions=(shape.queries,), key_positions=(shape.keys,))
                    return placed, shape.pattern
    return replace(part, query_positions=(q,), key_positions=(k,)), pattern
