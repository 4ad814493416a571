"""A strided plan computed by one of PyTorch's fused kernels: pack a chunk, run its pieces, merge in place, copy out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.backends.sdpa.kernels import Kernel, choose_kernel
from dilated_attention_pytorch.backends.sdpa.masked import masked_backward, masked_forward
from dilated_attention_pytorch.memory import Workspace, empty
from dilated_attention_pytorch.merging import merge_into
from dilated_attention_pytorch.plans import DensePlan, Plan, StridedPlan
from dilated_attention_pytorch.plans.strided import Chunk, Piece, Rows
from dilated_attention_pytorch.problem import Problem

PACKED_ROWS = 16384
"""Rows (tokens x heads x samples) packed at once on the CPU; on a GPU everything that shares pieces is."""


class SdpaBackend(Backend):
    """PyTorch's own fused kernels: one call per piece of a StridedPlan, or one masked call for a short DensePlan."""

    name = "sdpa"
    plans = (StridedPlan, DensePlan)

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        reasons = []
        if problem.dropout_p > 0:
            reasons.append("the fused kernels' dropout is not ours (one draw per pair); use backend='dense'")
        if problem.bias is not None:
            reasons.append("the fused kernels give no gradient of a bias; use backend='dense'")
        if problem.score is not None:
            reasons.append("the fused kernels have no score rules; use backend='dense'")
        if problem.v.shape[3] != problem.q.shape[3]:
            reasons.append(f"Dv ({problem.v.shape[3]}) must equal D ({problem.q.shape[3]}); use backend='dense'")
        if problem.scale <= 0:
            reasons.append(f"the fused kernels mask before they scale and need a scale above 0 ({problem.scale})")
        if isinstance(plan, DensePlan) and plan.log_counts is None:
            reasons.append("no closed form, and too long for one masked call; use backend='dense'")
        kernel = _kernel(problem, plan)
        if isinstance(kernel, str):
            reasons.append(kernel)
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        p, kernel = problem, _kernel(problem, plan)
        assert isinstance(kernel, Kernel)
        if isinstance(plan, DensePlan):
            assert plan.log_counts is not None
            return masked_forward(p, plan.log_counts, kernel, _work_dtype(p))
        assert isinstance(plan, StridedPlan)
        out = empty(p.q.shape, p.q.dtype, p.q.device)
        lse = empty((p.batch, p.num_heads, p.query_length), p.accumulate_dtype, p.q.device)
        work, masks = Workspace(_work_dtype(p), p.q.device), _Masks(_work_dtype(p), p.q.device)
        for block in _blocks(p, plan):
            block_out, block_lse = _forward_block(block, p, kernel, work, masks)
            block.query_rows(out).copy_(block_out)
            block.lse_rows(lse).copy_(block_lse)
        return out, lse

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        p, kernel = problem, _kernel(problem, plan)
        assert isinstance(kernel, Kernel)
        if isinstance(plan, DensePlan):
            assert plan.log_counts is not None
            return masked_backward(p, plan.log_counts, kernel, _work_dtype(p), dout, dlse, out, lse)
        assert isinstance(plan, StridedPlan)
        dq = empty(p.q.shape, p.q.dtype, p.q.device)
        shared = p.kv_group > 1  # several query heads add to one kv head: sum in the accumulate dtype
        kv_dtype = p.accumulate_dtype if shared else p.k.dtype
        dk, dv = (torch.zeros(x.shape, dtype=kv_dtype, device=x.device) for x in (p.k, p.v))
        work, masks = Workspace(_work_dtype(p), p.q.device), _Masks(_work_dtype(p), p.q.device)
        for block in _blocks(p, plan):
            grads = _backward_block(block, p, kernel, work, masks, dout, dlse, out, lse)
            block.query_rows(dq).copy_(grads[0])
            for target, grad in zip((dk, dv), grads[1:]):
                rows = block.key_rows(target)
                rows.add_(grad) if shared else rows.copy_(grad)
        return Gradients(dq, dk.to(p.k.dtype), dv.to(p.v.dtype))


class _Block:
    """Some samples and heads of a chunk, packed together: (samples, heads, rows, D) views of the problem's tensors."""

    def __init__(self, chunk: Chunk, samples: slice, heads: slice, kv_heads: slice) -> None:
        self.chunk, self.samples, self.heads, self.kv_heads = chunk, samples, heads, kv_heads

    def query_rows(self, x: Tensor) -> Tensor:
        return x[self.samples, slice(*self.chunk.queries), self.heads].transpose(1, 2)

    def key_rows(self, x: Tensor) -> Tensor:
        return x[self.samples, slice(*self.chunk.keys), self.kv_heads].transpose(1, 2)

    def lse_rows(self, lse: Tensor) -> Tensor:
        return lse[self.samples, self.heads, slice(*self.chunk.queries)]


class _Masks:
    """Additive masks of windowed pieces, made once per call for equal pieces."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._known: dict[object, Tensor] = {}

    def of(self, piece: Piece) -> Tensor | None:
        if piece.band is None:
            return None
        key = (piece.band, piece.queries.length, piece.keys.length)
        if key not in self._known:
            seen = piece.band.visible(key[1], key[2], self._device)
            mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
            self._known[key] = mask.masked_fill_(~seen, -torch.inf)
        return self._known[key]


def _kernel(problem: Problem, plan: Plan) -> Kernel | str:
    device = problem.q.device
    has_masks = not isinstance(plan, StridedPlan) or any(
        piece.band is not None for chunk in plan.chunks for piece in chunk.pieces
    )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    kind = "cpu" if device.type == "meta" else device.type
    return choose_kernel(kind, problem.q.dtype, problem.q.shape[3], has_masks, capability)


def _work_dtype(problem: Problem) -> torch.dtype:
    """On the CPU half types are cast while packing: the kernel is slower in bfloat16 than in float32 there."""
    return problem.accumulate_dtype if problem.q.device.type == "cpu" else problem.q.dtype


def _blocks(problem: Problem, plan: StridedPlan) -> Iterator[_Block]:
    group = problem.kv_group
    for chunk in plan.chunks:
        first, last = chunk.samples
        rows = max(chunk.queries[1] - chunk.queries[0], chunk.keys[1] - chunk.keys[0], 1)
        room = max(1, PACKED_ROWS // rows) if problem.q.device.type == "cpu" else chunk.heads.size * (last - first)
        heads = chunk.heads.size if group == 1 else 1
        heads = min(heads, room)
        samples = max(1, room // heads)
        for h in range(0, chunk.heads.size, heads):
            part = chunk.heads.part(h, min(heads, chunk.heads.size - h))
            kv_part = part if group == 1 else slice(part.start // group, part.start // group + 1)
            for b in range(first, last, samples):
                yield _Block(chunk, slice(b, min(b + samples, last)), part, kv_part)


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


def _forward_block(block: _Block, p: Problem, kernel: Kernel, work: Workspace, masks: _Masks) -> tuple[Tensor, Tensor]:
    """(out (samples, heads, n, D), lse (samples, heads, n)) of a block."""
    chunk, source = block.chunk, block.query_rows(p.q)
    b, h, n, d = source.shape
    q = _pack(work, "q", source)
    k, v = _pack(work, "k", block.key_rows(p.k)), _pack(work, "v", block.key_rows(p.v))
    out: Tensor | None = None
    for piece in chunk.pieces:
        folds = _folds(piece, b * h, n, k.shape[1])
        q_view = _view(q, piece.queries, piece.segments, folds)
        k_view, v_view = (_view(x, piece.keys, piece.segments, folds) for x in (k, v))
        with _profiled(piece, kernel):
            part_out, part_lse = kernel.forward(q_view, k_view, v_view, p.scale, piece.is_causal, masks.of(piece))
        if out is None and piece.fresh and _covers(piece, piece.queries, n):
            out, lse = part_out.reshape(b * h, n, d), part_lse.reshape(b * h, n)
            continue
        if out is None:
            out, lse = _running(work, (b * h, n, d), chunk.complete)
        rows_out, rows_lse = (_view(x, piece.queries, piece.segments, folds) for x in (out, lse))
        if piece.fresh:
            rows_out.copy_(part_out)
            rows_lse.copy_(part_lse)
        else:
            merge_into(rows_out, rows_lse, part_out, part_lse)
    if out is None:
        out, lse = _running(work, (b * h, n, d), False)
    return out.view(b, h, n, d), lse.view(b, h, n)


def _running(work: Workspace, shape: tuple[int, int, int], complete: bool) -> tuple[Tensor, Tensor]:
    """Buffers for out and lse; rows that no fresh piece writes start as rows that saw nothing."""
    out, lse = work.take("out", shape), work.take("lse", shape[:2])
    if not complete:
        out.zero_()
        lse.fill_(-torch.inf)
    return out, lse


def _backward_block(
    block: _Block,
    p: Problem,
    kernel: Kernel,
    work: Workspace,
    masks: _Masks,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a block, each (samples, heads, rows, D).

    A gradient of lse enters as one more column: v is 0 there, dout 1 and out -dlse, so the kernel's row sum of
    ``dout * out`` becomes what the definition asks for.
    """
    chunk, d = block.chunk, p.q.shape[3]
    extra = 0 if dlse is None else 1
    packed = {name: _pack(work, name, block.query_rows(x), extra) for name, x in (("g", dout), ("q", p.q), ("o", out))}
    packed |= {name: _pack(work, name, block.key_rows(x), extra) for name, x in (("k", p.k), ("v", p.v))}
    rows_lse = block.lse_rows(lse)
    b, h, n = rows_lse.shape
    m, nk = b * h, packed["k"].shape[1]
    lse_packed = work.take("l", (m, n))
    lse_packed.view(b, h, n).copy_(rows_lse)
    if dlse is not None:
        packed["g"][..., d] = 1
        packed["o"].view(b, h, n, d + 1)[..., d].copy_(block.lse_rows(dlse)).neg_()
    sums: list[Tensor] | None = None
    for piece in chunk.pieces:
        folds = _folds(piece, m, n, nk)
        g, q, o, row_lse = (
            _view(x, piece.queries, piece.segments, folds) for x in (packed["g"], packed["q"], packed["o"], lse_packed)
        )
        k, v = (_view(packed[name], piece.keys, piece.segments, folds) for name in ("k", "v"))
        with _profiled(piece, kernel):
            grads = kernel.backward(g, q, k, v, o, row_lse, p.scale, piece.is_causal, masks.of(piece))
        sides = (piece.queries, piece.keys, piece.keys)
        lengths = (n, nk, nk)
        if sums is None and all(_covers(piece, rows, size) for rows, size in zip(sides, lengths)):
            sums = [x.reshape(m, size, d + extra) for x, size in zip(grads, lengths)]
            continue
        if sums is None:
            complete = (chunk.complete, chunk.complete_keys, chunk.complete_keys)
            sums = [work.take(f"d{i}", (m, size, d + extra)) for i, size in enumerate(lengths)]
            for x, whole in zip(sums, complete):
                if not whole:
                    x.zero_()
        fresh = (piece.fresh, piece.fresh_keys, piece.fresh_keys)
        for x, grad, rows, is_fresh in zip(sums, grads, sides, fresh):
            target = _view(x, rows, piece.segments, folds)
            target.copy_(grad) if is_fresh else target.add_(grad)
    if sums is None:
        sums = [work.take(f"d{i}", (m, size, d + extra)).zero_() for i, size in enumerate((n, nk, nk))]
    return tuple(x.view(b, h, x.shape[1], d + extra)[..., :d] for x in sums)  # type: ignore[return-value]
