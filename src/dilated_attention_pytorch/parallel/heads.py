"""All-to-all: heads for tokens (DeepSpeed-Ulysses, arXiv 2309.14509).

Each rank gives away the rows of all heads but its own and gets every rank's rows of its heads: attention is then local,
nothing is partial, and one more exchange brings the output home. Inside the groups of a mesh the same exchange leaves
fewer heads and longer shards to whatever works between the groups (`forward_with`, `backward_with`).

Legend: W ranks, n a rank's rows, N the rows of all ranks; h heads of a rank, H all heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch import attention
from dilated_attention_pytorch.backends import Gradients
from dilated_attention_pytorch.parallel.grouping import GroupRows, group_rows, slice_length
from dilated_attention_pytorch.parallel.layouts import row_count
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.parallel.wire import start_all_to_all
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern, some_heads
from dilated_attention_pytorch.problem import Problem

Kept = tuple[Tensor, ...]
Forward = Callable[[Problem, Pattern], tuple[Tensor, Tensor, Kept]]
"""(out, lse, what the backward wants besides) of a rank's heads over all rows of the group."""
Backward = Callable[[Problem, Pattern, Tensor, "Tensor | None", Tensor, Tensor, Kept], Gradients]
"""The gradients of a rank's heads, from dout, dlse, out, lse and what was kept."""
Parts = Sequence[tuple[Tensor, GroupRows]]
"""Tensors (B, rows, heads, dim) and the rows of the group that they are of."""


def reasons_against(problem: Problem, pattern: Pattern, world: World) -> list[str]:
    """Why heads cannot be exchanged for tokens; empty means they can.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import Run
        >>> x, rows = torch.empty(1, 4, 6, 8), (Run(0, 1, 4),)
        >>> reasons_against(Problem(x, x, x, 1.0, rows, rows), Causal(), World(0, (rows,) * 4, (rows,) * 4))
        ["all_to_all deals 6 heads to 4 ranks, which must divide them; use method='ring' or 'gather', or 3, 2 ranks"]
    """
    heads, kv_heads, size = problem.num_heads, problem.k.shape[2], world.size
    reasons: list[str] = []
    if size == 1:
        return reasons
    if heads % size != 0:
        fitting = [
            str(w) for w in range(size - 1, 1, -1) if heads % w == 0 and (kv_heads % w == 0 or w % kv_heads == 0)
        ]
        ranks = f", or {', '.join(fitting)} ranks" if fitting else ""
        reasons.append(
            f"all_to_all deals {heads} heads to {size} ranks, which must divide them; "
            f"use method='ring' or 'gather'{ranks}"
        )
    elif kv_heads % size != 0 and size % kv_heads != 0:
        reasons.append(
            f"all_to_all deals {heads} query heads and {kv_heads} key-value heads to {size} ranks, and those of a rank "
            "would read parts of several key-value heads; use method='ring' or 'gather', or repeat the key-value heads "
            f"to a multiple of {size}"
        )
    if problem.bias is not None:
        reasons.append("all_to_all does not exchange a bias; use method='ring' or 'gather', or score=Relative")
    return reasons


def inside(problem: Problem, pattern: Pattern, world: World) -> tuple[Problem, Pattern]:
    """What is asked of this rank once it holds its heads of all rows of the world; q, k and v are on the meta device.

    Raises InvalidInput for a pattern of another number of heads.

    Example:
        >>> from dilated_attention_pytorch import Dilated
        >>> from dilated_attention_pytorch.problem import Run
        >>> x, rows = torch.empty(1, 4, 6, 8), ((Run(0, 2, 4),), (Run(1, 2, 4),))
        >>> given = Problem(x, x, x, 1.0, rows[1], rows[1])
        >>> local, pattern = inside(given, Dilated(8, 2), World(1, rows, rows))
        >>> local.q.shape, local.query_positions, pattern.first
        (torch.Size([1, 8, 3, 8]), (Run(start=0, step=1, length=8),), 1)
    """
    return (problem, pattern) if world.size == 1 else _inside(problem, pattern, world, _Sides.of(world))


def _inside(problem: Problem, pattern: Pattern, world: World, sides: _Sides) -> tuple[Problem, Pattern]:
    cut = _heads_of(problem.num_heads, world.size, world.rank)
    first, size = cut.start, cut.stop - cut.start
    q, k, v = (
        x.new_empty((x.shape[0], row_count(rows.positions), _share(x, world, 0).shape[2], x.shape[3]), device="meta")
        for x, rows in sides.inputs(problem)
    )
    before, total = (0, problem.num_heads) if problem.of_heads is None else problem.of_heads
    local = replace(
        problem,
        q=q,
        k=k,
        v=v,
        query_positions=sides.queries.positions,
        key_positions=sides.keys.positions,
        score=None if problem.score is None else problem.score.of_heads(first, size),
        of_heads=(before + first, total),
    )
    return local, some_heads(pattern, first, size, problem.num_heads)


def forward(problem: Problem, pattern: Pattern, world: World, backend: str) -> tuple[Tensor, Tensor, Kept]:
    """(out, lse) of this rank's rows and all heads; and its heads of all rows, which `backward` wants."""

    def compute(local: Problem, part: Pattern) -> tuple[Tensor, Tensor, Kept]:
        return *attention.forward(local, part, backend=backend), ()

    return forward_with(problem, pattern, world, compute)


def backward(
    problem: Problem,
    pattern: Pattern,
    world: World,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Kept,
    backend: str,
) -> Gradients:
    """The gradients of this rank's rows. In a world of several, of q, k, v, out and lse only shapes are read."""

    def compute(
        local: Problem, part: Pattern, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, kept: Kept
    ) -> Gradients:
        return attention.backward(local, part, dout, dlse, out, lse, backend=backend)

    return backward_with(problem, pattern, world, dout, dlse, out, lse, kept, compute)


def forward_with(problem: Problem, pattern: Pattern, world: World, compute: Forward) -> tuple[Tensor, Tensor, Kept]:
    """As `forward`, with ``compute`` on this rank's heads of all rows of the world: a ring between the groups, say."""
    if world.size == 1:
        return compute(problem, pattern)
    sides = _Sides.of(world)
    local, part = _inside(problem, pattern, world, sides)  # what does not fit is found before anything is sent
    q, k, v = _to_heads(world, sides.inputs(problem))
    out, lse, kept = compute(replace(local, q=q, k=k, v=v), part)
    out, rows = out.to(problem.result_dtype), sides.queries
    home, home_lse = _to_tokens(world, [(out, rows), (_by_row(lse), rows)], [problem.num_heads] * 2)
    return home, _by_head(home_lse), (q, k, v, out, lse, *kept)


def backward_with(
    problem: Problem,
    pattern: Pattern,
    world: World,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Kept,
    compute: Backward,
) -> Gradients:
    """As `backward`, with ``compute`` on this rank's heads of all rows, for what `forward_with` gave and kept.

    Where ranks share a key-value head, their shares of its gradient are sent and summed in the accumulate dtype.
    """
    if world.size == 1:
        return compute(problem, pattern, dout, dlse, out, lse, kept)
    q, k, v, out, lse, *rest = kept
    rows, keys = sides = _Sides.of(world)
    local, part = _inside(problem, pattern, world, sides)
    given = [(dout, rows)] if dlse is None else [(dout, rows), (_by_row(dlse), rows)]
    dout, *others = _to_heads(world, given)
    dlse = _by_head(others[0]) if others else None
    summed, dtype = problem.k.shape[2] < world.size, problem.result_dtype
    local = replace(local, q=q, k=k, v=v, partial=local.partial or summed)
    found = compute(local, part, dout, dlse, out, lse, tuple(rest))
    shares = [x.to(problem.accumulate_dtype) if summed else x for x in (found.k, found.v)]
    parts = [(found.q.to(dtype), rows), (shares[0], keys), (shares[1], keys)]
    heads = [problem.num_heads, problem.k.shape[2], problem.k.shape[2]]
    return Gradients(*(x.to(dtype) for x in _to_tokens(world, parts, heads)))


def traffic(problem: Problem, pattern: Pattern, world: World) -> Traffic:
    """Bytes that this rank receives; a gradient of lse would add ``B (N - n) h`` numbers of the accumulate dtype.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.problem import Run
        >>> x, rows = torch.empty(1, 4, 6, 8, device="meta"), ((Run(0, 1, 4),), (Run(4, 1, 4),))
        >>> given = Problem(x, x, x, 1.0, rows[0], rows[0])
        >>> traffic(given, Causal(), World(0, rows, rows)).forward == 4 * 4 * 3 * (3 * 8) + 4 * 4 * 3 * (8 + 1)
        True
    """
    if world.size == 1:
        return Traffic(0, 0)
    p, size = problem, world.size
    (d, dv), item, wide = (p.q.shape[3], p.v.shape[3]), p.q.element_size(), p.accumulate_dtype.itemsize
    (n, there), (m, there_k) = (
        (row_count(at[world.rank]), sum(map(row_count, at)) - row_count(at[world.rank]))
        for at in (world.queries, world.keys)
    )
    h, h_kv = (_share(x, world, 0).shape[2] for x in (p.q, p.k))
    result = p.result_dtype.itemsize
    summed = wide if p.k.shape[2] < size else result
    away = p.num_heads - h
    forward = (there * h * d + there_k * h_kv * (d + dv)) * item + n * away * (dv * result + wide)
    backward = there * h * dv * result + n * away * d * result + m * (size - 1) * h_kv * (d + dv) * summed
    return Traffic(p.batch * forward, p.batch * backward)


class _Sides(NamedTuple):
    queries: GroupRows
    keys: GroupRows

    @staticmethod
    def of(world: World) -> _Sides:
        queries = group_rows(world.queries)
        return _Sides(queries, queries if world.keys == world.queries else group_rows(world.keys))

    def inputs(self, problem: Problem) -> Parts:
        return [(problem.q, self.queries), (problem.k, self.keys), (problem.v, self.keys)]


def _heads_of(heads: int, size: int, rank: int) -> slice:
    """The heads that a rank works on: an equal share, or one that several ranks share."""
    if heads % size == 0:
        return slice(rank * (heads // size), (rank + 1) * (heads // size))
    assert size % heads == 0
    first = rank // (size // heads)
    return slice(first, first + 1)


def _share(x: Tensor, world: World, rank: int) -> Tensor:
    return x[:, :, _heads_of(x.shape[2], world.size, rank)]


def _by_row(lse: Tensor) -> Tensor:
    return lse.transpose(1, 2).unsqueeze(3)  # (B, H, N) -> (B, N, H, 1)


def _by_head(lse: Tensor) -> Tensor:
    return lse.squeeze(3).transpose(1, 2).contiguous()


def _to_heads(world: World, parts: Parts) -> list[Tensor]:
    """All heads of this rank's rows (B, n, H, dim) become this rank's heads of all rows (B, N, h, dim)."""
    ranks = range(world.size)
    sends = [[[_share(x, world, r)] for x, _ in parts] for r in ranks]
    mine = [_share(x, world, world.rank) for x, _ in parts]
    shapes = [[(x.shape[0], rows.counts[r], *x.shape[2:]) for x, (_, rows) in zip(mine, parts)] for r in ranks]
    blocks, found = _exchange(world, mine, sends, shapes), []
    for number, (x, (_, rows)) in enumerate(zip(mine, parts)):
        whole = x.new_empty((x.shape[0], sum(rows.counts), *x.shape[2:]))
        for block, cuts in zip(blocks, rows.slices):
            for cut, piece in zip(cuts, block[number].split(list(map(slice_length, cuts)), dim=1)):
                whole[:, cut] = piece
        found.append(whole)
    return found


def _to_tokens(world: World, parts: Parts, heads: Sequence[int]) -> list[Tensor]:
    """This rank's heads of all rows (B, N, h, dim) become all ``heads`` of its rows; shared ones are summed."""
    sends = [[[x[:, cut] for cut in rows.slices[r]] for x, rows in parts] for r in range(world.size)]
    shapes = [[(x.shape[0], rows.counts[world.rank], *x.shape[2:]) for x, rows in parts]] * world.size
    blocks, found = _exchange(world, [x for x, _ in parts], sends, shapes), []
    for number, count in enumerate(heads):
        own = [block[number] for block in blocks]
        sharing = len(own) * own[0].shape[2] // count
        groups = (own[first : first + sharing] for first in range(0, len(own), sharing))
        found.append(torch.cat([sum(group[1:], group[0]) for group in groups], dim=2))
    return found


def _exchange(
    world: World,
    like: Sequence[Tensor],
    sends: Sequence[Sequence[Sequence[Tensor]]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
) -> list[list[Tensor]]:
    """What comes, by source rank and part, in these shapes; ``sends`` are the rows for each rank and part, in pieces.

    One collective carries all parts of one dtype, which are those of ``like``.
    """
    assert world.group is not None, "this world is only planned"
    started = []
    for dtype in dict.fromkeys(x.dtype for x in like):
        which = [number for number, x in enumerate(like) if x.dtype == dtype]
        counts = [sum(piece.numel() for i in which for piece in row[i]) for row in sends]
        buffer, at = like[which[0]].new_empty(sum(counts)), 0
        for pieces in (row[i] for row in sends for i in which if row[i]):
            (b, _, h, d), rows = pieces[0].shape, sum(piece.shape[1] for piece in pieces)
            end = at + b * rows * h * d
            torch.cat(list(pieces), dim=1, out=buffer[at:end].view(b, rows, h, d))
            at = end
        expected = [[math.prod(shape[i]) for i in which] for shape in shapes]
        pending, received = start_all_to_all(world.group, buffer, counts, [sum(sizes) for sizes in expected])
        started.append((which, expected, pending, received))
    blocks = [[like[0]] * len(like) for _ in sends]
    for which, expected, pending, received in started:
        pending.wait()
        flat = iter(received.split([size for sizes in expected for size in sizes]))
        for row, shape in zip(blocks, shapes):
            for i in which:
                row[i] = next(flat).view(shape[i])
    return blocks
