"""A strided plan computed by a dense kernel: pack a chunk, run its pieces, merge in place, copy out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Gradients
from dilated_attention_pytorch.backends.kernel import Kernel, Mask
from dilated_attention_pytorch.memory import Workspace, empty, zeros
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.plans import StridedPlan
from dilated_attention_pytorch.plans.strided import Chunk, Piece, Rows
from dilated_attention_pytorch.problem import Problem


@dataclass(frozen=True)
class StridedWalk:
    """A kernel on the pieces of strided plans; both passes are pure.

    Tensors are packed in ``dtype`` and summed in the accumulate dtype. ``packed_rows`` bounds the rows (tokens x heads
    x samples) that are packed at once; None packs everything that shares pieces.
    """

    kernel: Kernel
    dtype: torch.dtype
    packed_rows: int | None = None

    def forward(self, problem: Problem, plan: StridedPlan) -> tuple[Tensor, Tensor]:
        """Out (B, Nq, H, D) in the dtype of results and lse (B, H, Nq) in the accumulate dtype."""
        p = problem
        out = empty(p.q.shape, p.result_dtype, p.q.device, "results")
        lse = empty((p.batch, p.num_heads, p.query_length), p.accumulate_dtype, p.q.device, "results")
        work = _Buffers(p, self)
        for block in _blocks(p, plan, self):
            block_out, block_lse = _forward_block(block, p, work)
            block.query_rows(out).copy_(block_out)
            block.lse_rows(lse).copy_(block_lse)
        return out, lse

    def backward(
        self, problem: Problem, plan: StridedPlan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """The gradients through the plan's pairs, given the global out and lse."""
        p, limit = problem, self.kernel.max_head_dim
        if dlse is not None and limit is not None and p.q.shape[3] + self.kernel.columns > limit:
            return self._lse_apart(p, plan, dout, dlse, out, lse)
        dq = empty(p.q.shape, p.result_dtype, p.q.device, "results")
        shared = p.kv_group > 1  # several query heads add to one kv head: sum in the accumulate dtype
        kv_dtype = p.accumulate_dtype if shared else p.result_dtype
        dk, dv = (zeros(x.shape, kv_dtype, x.device, "results") for x in (p.k, p.v))
        work = _Buffers(p, self)
        for block in _blocks(p, plan, self):
            grads = _backward_block(block, p, work, dout, dlse, out, lse)
            block.query_rows(dq).copy_(grads[0])
            for target, grad in zip((dk, dv), grads[1:]):
                rows = block.key_rows(target)
                rows.add_(grad) if shared else rows.copy_(grad)
        return Gradients(dq, dk.to(p.result_dtype), dv.to(p.result_dtype))

    def _lse_apart(
        self, p: Problem, plan: StridedPlan, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Two passes where D has no room for a column: the second has v 0 and one column, whose out is -dlse."""
        first = self.backward(p, plan, dout, None, out, lse)
        unit, negated = torch.zeros_like(dout), torch.zeros_like(out)
        unit[..., 0] = 1
        negated[..., 0] = -dlse.transpose(1, 2)
        second = self.backward(replace(p, v=torch.zeros_like(p.v)), plan, unit, None, negated, lse)
        return Gradients(first.q + second.q, first.k + second.k, first.v)


class _Buffers:
    """What one call uses again for each block: packed inputs, sums, and the masks of equal windowed pieces."""

    def __init__(self, problem: Problem, walk: StridedWalk) -> None:
        device = problem.q.device
        self.kernel, self.dtype = walk.kernel, walk.dtype
        self.packed, self.sums = (Workspace(dtype, device, "work") for dtype in (walk.dtype, problem.accumulate_dtype))
        self._device, self._masks = device, dict[object, Tensor]()

    def mask(self, piece: Piece) -> Mask:
        if piece.band is None or self.kernel.takes_bands:
            return piece.band
        key = (piece.band, piece.queries.length, piece.keys.length)
        if key not in self._masks:
            seen = piece.band.visible(key[1], key[2], self._device)
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self._device)
            self._masks[key] = mask.masked_fill_(~seen, -torch.inf)
        return self._masks[key]


class _Block:
    """Some samples and heads of a chunk, packed together: (samples, heads, rows, D) views of the problem's tensors."""

    def __init__(self, chunk: Chunk, pieces: list[Piece], samples: slice, heads: slice, kv_heads: slice) -> None:
        self.chunk, self.pieces = chunk, pieces
        self.samples, self.heads, self.kv_heads = samples, heads, kv_heads

    def query_rows(self, x: Tensor) -> Tensor:
        return x[self.samples, slice(*self.chunk.queries), self.heads].transpose(1, 2)

    def key_rows(self, x: Tensor) -> Tensor:
        return x[self.samples, slice(*self.chunk.keys), self.kv_heads].transpose(1, 2)

    def lse_rows(self, lse: Tensor) -> Tensor:
        return lse[self.samples, self.heads, slice(*self.chunk.queries)]


def _blocks(problem: Problem, plan: StridedPlan, walk: StridedWalk) -> Iterator[_Block]:
    group, limit = problem.kv_group, walk.kernel.max_batch
    for chunk in plan.chunks:
        first, last = chunk.samples
        room = chunk.heads.size * (last - first)
        if walk.packed_rows is not None:
            rows = max(chunk.queries[1] - chunk.queries[0], chunk.keys[1] - chunk.keys[0], 1)
            room = max(1, walk.packed_rows // rows)
        pieces = list(chunk.pieces)
        if limit is not None:
            pieces = [part for piece in pieces for part in _within(piece, limit)]
            room = min(room, max(1, limit // max((p.segments for p in pieces), default=1)))
        heads = min(chunk.heads.size if group == 1 else 1, room)
        samples = max(1, room // heads)
        for h in range(0, chunk.heads.size, heads):
            part = chunk.heads.part(h, min(heads, chunk.heads.size - h))
            kv_part = part if group == 1 else slice(part.start // group, part.start // group + 1)
            for b in range(first, last, samples):
                yield _Block(chunk, pieces, slice(b, min(b + samples, last)), part, kv_part)


def _within(piece: Piece, limit: int) -> Iterator[Piece]:
    """The piece in parts of at most ``limit`` segments; they share no rows, so each is as fresh as the whole."""
    for done in range(0, piece.segments, limit):
        sides = (piece.queries, piece.keys)
        queries, keys = (rows._replace(start=rows.start + done * rows.stride) for rows in sides)
        yield replace(piece, segments=min(limit, piece.segments - done), queries=queries, keys=keys)


def _pack(work: Workspace, name: str, rows: Tensor, extra: int = 0) -> Tensor:
    """(samples, heads, n, D) copied to a contiguous (samples * heads, n, D + extra); the extra columns are zero."""
    b, h, n, d = rows.shape
    packed = work.take(name, (b * h, n, d + extra))
    packed.view(b, h, n, d + extra)[..., :d].copy_(rows)
    if extra:
        packed[..., d:].zero_()
    return packed


def _view(packed: Tensor, rows: Rows, segments: int, folds: bool) -> Tensor:
    """A piece's rows of packed (m, n, D) or (m, n): (m * segments, 1, length, D), or (m, segments, length, D)."""
    m, n = packed.shape[:2]
    inner, row = packed.stride()[2:], packed.stride(1)
    start = packed.storage_offset() + rows.start * row
    if folds:
        stride = n * row if segments == 1 else rows.stride * row
        size, strides = (m * segments, 1, rows.length), (stride, stride, rows.step * row)
    else:
        size, strides = (m, segments, rows.length), (n * row, rows.stride * row, rows.step * row)
    return packed.as_strided(size + packed.shape[2:], strides + inner, start)


def _profiled(piece: Piece, kernel: Kernel) -> AbstractContextManager[object]:
    """A range that names the piece, when a profiler listens."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return nullcontext()
    kind = "banded" if piece.band is not None else "causal" if piece.is_causal else "full"
    sizes = f"{piece.segments} x ({piece.queries.length} x {piece.keys.length})"
    return torch.profiler.record_function(f"{kernel.name}: {kind} {sizes}, every {piece.queries.step}")


def _folds(piece: Piece, m: int, num_queries: int, num_keys: int) -> bool:
    """Samples and segments fold into one dim, of the queries and of the keys alike."""
    s = piece.segments
    whole = num_queries == s * piece.queries.stride and num_keys == s * piece.keys.stride
    return m == 1 or s == 1 or whole


def _covers(piece: Piece, rows: Rows, n: int) -> bool:
    """The piece's result has exactly the layout of packed (m, n, D), so it can be taken as it comes."""
    whole = rows.start == 0 and rows.step == 1 and piece.segments * rows.length == n
    return whole and (piece.segments == 1 or rows.stride == rows.length)


def _forward_block(block: _Block, p: Problem, work: _Buffers) -> tuple[Tensor, Tensor]:
    """(out (samples, heads, n, D), lse (samples, heads, n)) of a block."""
    complete, source = block.chunk.complete, block.query_rows(p.q)
    b, h, n, d = source.shape
    q = _pack(work.packed, "q", source)
    k, v = _pack(work.packed, "k", block.key_rows(p.k)), _pack(work.packed, "v", block.key_rows(p.v))
    out: Tensor | None = None
    for piece in block.pieces:
        folds = _folds(piece, b * h, n, k.shape[1])
        q_view = _view(q, piece.queries, piece.segments, folds)
        k_view, v_view = (_view(x, piece.keys, piece.segments, folds) for x in (k, v))
        with _profiled(piece, work.kernel):
            part_out, part_lse = work.kernel.forward(q_view, k_view, v_view, p.scale, piece.is_causal, work.mask(piece))
        if out is None and piece.fresh and _covers(piece, piece.queries, n):
            sums_dtype = part_out.dtype if len(block.pieces) == 1 else p.accumulate_dtype
            out = part_out.reshape(b * h, n, d).contiguous().to(sums_dtype)
            lse = part_lse.reshape(b * h, n).contiguous()
            continue
        if out is None:
            out, lse = _running(work.sums, (b * h, n, d), complete)
        rows_out, rows_lse = (_view(x, piece.queries, piece.segments, folds) for x in (out, lse))
        if piece.fresh:
            rows_out.copy_(part_out)
            rows_lse.copy_(part_lse)
        else:
            merge_into(rows_out, rows_lse, part_out.to(out.dtype), part_lse)
    if out is None:
        out, lse = _running(work.sums, (b * h, n, d), False)
    return out.view(b, h, n, d), lse.view(b, h, n)


def _running(work: Workspace, shape: tuple[int, int, int], complete: bool) -> tuple[Tensor, Tensor]:
    """Buffers for out and lse; rows that no fresh piece writes start as rows that saw nothing."""
    out, lse = work.take("out", shape), work.take("lse", shape[:2])
    if not complete:
        out.zero_()
        lse.fill_(-torch.inf)
    return out, lse


def _backward_block(
    block: _Block, p: Problem, work: _Buffers, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a block, each (samples, heads, rows, D).

    A gradient of lse enters as one more column: v is 0 there, dout 1 and out -dlse, so the kernel's row sum of
    ``dout * out`` becomes what the definition asks for. Further columns are 0 and only keep rows aligned.
    """
    kernel, pack, d = work.kernel, work.packed, p.q.shape[3]
    extra = 0 if dlse is None else kernel.columns
    packed = {name: _pack(pack, name, block.query_rows(x), extra) for name, x in (("g", dout), ("q", p.q), ("o", out))}
    packed |= {name: _pack(pack, name, block.key_rows(x), extra) for name, x in (("k", p.k), ("v", p.v))}
    rows_lse = block.lse_rows(lse)
    b, h, n = rows_lse.shape
    m, nk = b * h, packed["k"].shape[1]
    lse_packed = work.sums.take("l", (m, n))
    lse_packed.view(b, h, n).copy_(rows_lse)
    if dlse is not None:
        packed["g"][..., d] = 1
        packed["o"].view(b, h, n, d + extra)[..., d].copy_(block.lse_rows(dlse)).neg_()
    sums: list[Tensor] | None = None
    for piece in block.pieces:
        folds = _folds(piece, m, n, nk)
        g, q, o, row_lse = (
            _view(x, piece.queries, piece.segments, folds) for x in (packed["g"], packed["q"], packed["o"], lse_packed)
        )
        k, v = (_view(packed[name], piece.keys, piece.segments, folds) for name in ("k", "v"))
        with _profiled(piece, kernel):
            grads = kernel.backward(g, q, k, v, o, row_lse, p.scale, piece.is_causal, work.mask(piece))
        sides, lengths = (piece.queries, piece.keys, piece.keys), (n, nk, nk)
        if sums is None and all(_covers(piece, rows, size) for rows, size in zip(sides, lengths)):
            sums_dtype = grads[0].dtype if len(block.pieces) == 1 else p.accumulate_dtype
            sums = [x.reshape(m, size, d + extra).contiguous().to(sums_dtype) for x, size in zip(grads, lengths)]
            continue
        if sums is None:
            sums = _gradient_sums(block.chunk, work.sums, m, lengths, d + extra)
        fresh = (piece.fresh, piece.fresh_keys, piece.fresh_keys)
        for x, grad, rows, is_fresh in zip(sums, grads, sides, fresh):
            target = _view(x, rows, piece.segments, folds)
            target.copy_(grad) if is_fresh else target.add_(grad)
    if sums is None:
        sums = [work.sums.take(f"d{i}", (m, size, d + extra)).zero_() for i, size in enumerate((n, nk, nk))]
    return tuple(x.view(b, h, x.shape[1], d + extra)[..., :d] for x in sums)  # type: ignore[return-value]


def _gradient_sums(chunk: Chunk, work: Workspace, m: int, lengths: tuple[int, int, int], d: int) -> list[Tensor]:
    """Buffers for dq, dk, dv; those of which fresh pieces do not write every row start at 0."""
    sums = [work.take(f"d{i}", (m, size, d)) for i, size in enumerate(lengths)]
    for x, whole in zip(sums, (chunk.complete, chunk.complete_keys, chunk.complete_keys)):
        if not whole:
            x.zero_()
    return sums
