"""Attention of rows that stand in several runs, a pair of runs at a time; shares of a larger problem, unrounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch import attention
from dilated_attention_pytorch.backends import Gradients, needs_tiles, select
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.parallel.shapes import Shape, relative, splits
from dilated_attention_pytorch.parallel.sight import sees
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import Branch
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
    """(out, lse) of a problem whose rows stand anywhere: out in the accumulate dtype, lse in float64 to be merged in.

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
                out, lse = part_out, part_lse.double()
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
    lse = lse.to(dtype)
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
    return out, out.new_full((p.batch, p.num_heads, p.query_length), -torch.inf, dtype=torch.float64)


def _no_gradients(p: Problem) -> Gradients:
    return Gradients(*(torch.zeros_like(x, dtype=p.accumulate_dtype) for x in (p.q, p.k, p.v)))


def _pieces(problem: Problem, pattern: Pattern) -> Iterator[_Piece]:
    """Problems that together hold the pairs that the pattern may see, most of one run of queries and one of keys."""
    p = replace(problem, partial=True)
    if p.q.numel() == 0 or p.v.numel() == 0:
        return
    branch = _order_alone(p, pattern)
    alike = p.query_positions == p.key_positions and _ascending(p.key_positions)
    if alike and branch is not None and branch.is_causal and branch.window is None:
        every = Run(0, 1, p.query_length)  # in the order of positions, so gaps between runs say nothing
        yield _piece(p, Shape(True, None, every, every), slice(0, every.length), slice(0, every.length))
    elif len(p.query_positions) * len(p.key_positions) > MOST_PAIRS:
        yield _Piece(p, pattern, slice(0, p.query_length), slice(0, p.key_length))
    elif branch is not None:
        yield from _ordered_pieces(p, branch)
    else:
        for q_run, rows in zip(p.query_positions, _cuts(p.query_positions)):
            for k_run, keys in zip(p.key_positions, _cuts(p.key_positions)):
                if sees(pattern, p.num_heads, (q_run,), (k_run,), p.key_lengths):
                    part = replace(p, query_positions=(q_run,), key_positions=(k_run,))
                    yield _Piece(_of_rows(part, rows, keys), pattern, rows, keys)


def _order_alone(p: Problem, pattern: Pattern) -> Branch | None:
    """The pattern's only branch, if it and all else asks only how far apart rows are: they may stand anywhere then."""
    if p.key_lengths is not None or p.score is not None or p.dropout_p > 0:
        return None
    branches = pattern.branches()
    if branches is None or len(branches) != 1:
        return None
    (b,) = branches
    return b if b.segment_length is None and b.documents is None and b.heads is None else None


def _ordered_pieces(p: Problem, branch: Branch) -> Iterator[_Piece]:
    """The pieces of a branch that only asks how far apart rows are; runs that are seen wholly are one piece."""
    q_cuts, k_cuts = _cuts(p.query_positions), _cuts(p.key_positions)
    for shape, q_numbers, k_numbers in splits(branch.is_causal, branch.window, p.query_positions, p.key_positions):
        rows = slice(q_cuts[q_numbers[0]].start, q_cuts[q_numbers[-1]].stop)
        if k_numbers == list(range(k_numbers[0], k_numbers[-1] + 1)):
            yield _piece(p, shape, rows, slice(k_cuts[k_numbers[0]].start, k_cuts[k_numbers[-1]].stop))
            continue
        for number in k_numbers:  # runs that others lie between: one by one
            (query,) = (p.query_positions[i] for i in q_numbers)
            alone = relative(branch.is_causal, branch.window, query, p.key_positions[number])
            if alone is not None:
                yield _piece(p, alone, rows, k_cuts[number])


def _ascending(positions: Positions) -> bool:
    """Whether no run begins before the end of the one in front of it, as runs of several stripes do."""
    return all(a.start + a.step * (a.length - 1) < b.start for a, b in pairwise(positions))


def _piece(p: Problem, shape: Shape, rows: slice, keys: slice) -> _Piece:
    part = replace(p, query_positions=(shape.queries,), key_positions=(shape.keys,))
    return _Piece(_of_rows(part, rows, keys), shape.pattern, rows, keys)


def _of_rows(p: Problem, rows: slice, keys: slice) -> Problem:
    return replace(p, q=p.q[:, rows], k=p.k[:, keys], v=p.v[:, keys])


def _cuts(positions: Positions) -> list[slice]:
    """The rows of each run."""
    ends = list(accumulate(run.length for run in positions))
    return [slice(end - run.length, end) for run, end in zip(positions, ends)]
