"""A tile plan computed by a dense kernel: units with equally many tiles in one call, full tiles without a mask.

Key rows are packed once, block by block; neighbouring blocks are then read in place and only others are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.backends.base import Gradients
from dilated_attention_pytorch.backends.kernel import Kernel
from dilated_attention_pytorch.backends.tile_pieces import PARTIAL, Part, TilePiece, TilePieces, pieces_of
from dilated_attention_pytorch.memory import Workspace, empty
from dilated_attention_pytorch.plans import TilePlan
from dilated_attention_pytorch.problem import Problem

ALIKE_ROWS = 64
"""PyTorch computes the last numbers of a tensor, those past whole vectors, by other functions than the rest."""
SERIAL_ROWS = 1 << 15
"""From so many numbers on PyTorch shares them out among threads on a CPU, at any place."""


@dataclass(frozen=True)
class TiledWalk:
    """A kernel on the pieces of tile plans; both passes are pure. Partial tiles need a kernel with additive masks.

    Tensors are packed in ``dtype`` and summed in the accumulate dtype. ``packed_rows`` bounds the rows (tokens x heads
    x samples) that are packed at once, but for those of one head; None packs everything. ``gathered_rows`` bounds the
    key rows that are copied for one call.
    """

    kernel: Kernel
    dtype: torch.dtype
    packed_rows: int | None
    gathered_rows: int

    def forward(self, problem: Problem, plan: TilePlan) -> tuple[Tensor, Tensor]:
        """Out (B, Nq, H, D) in the dtype of results and lse (B, H, Nq) in the accumulate dtype."""
        p = problem
        out = empty(p.q.shape, p.result_dtype, p.q.device, "results")
        lse = empty((p.batch, p.num_heads, p.query_length), p.accumulate_dtype, p.q.device, "results")
        if p.q.numel() == 0 or p.k.numel() == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        work = _Buffers(p, plan, self)
        for part in _parts(p, plan, self.packed_rows):
            part_out, part_lse = _forward_part(part, work)
            work.unpack(part, part_out, out)
            work.unpack(part, part_lse, lse.transpose(1, 2).unsqueeze(-1))
        return out, lse

    def backward(
        self, problem: Problem, plan: TilePlan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """The gradients through the plan's pairs, given the global out and lse."""
        p = problem
        grads = Gradients(*(empty(x.shape, p.result_dtype, x.device, "results") for x in (p.q, p.k, p.v)))
        if p.q.numel() == 0 or p.k.numel() == 0:
            return Gradients(*(x.zero_() for x in grads[:3]))
        work = _Buffers(p, plan, self, 0 if dlse is None else self.kernel.columns)
        for part in _parts(p, plan, self.packed_rows):
            dq, dk, dv = _backward_part(part, work, dout, dlse, out, lse)
            work.unpack(part, dq, grads.q)
            work.unpack(part, dk, grads.k, of_keys=True)
            work.unpack(part, dv, grads.v, of_keys=True)
        return grads


def _parts(p: Problem, plan: TilePlan, packed_rows: int | None) -> Iterator[Part]:
    """Some key-value heads of one sample, or all of some samples, within `packed_rows` where one head is."""
    group, kv_heads = p.kv_group, p.k.shape[2]
    fan = group if plan.kv_num.shape[1] == 1 else 1
    room = kv_heads * p.batch
    if packed_rows is not None:
        room = max(1, packed_rows // max(p.query_length * group, p.key_length))
    heads, samples = min(kv_heads, room), max(1, room // kv_heads)
    for b in range(0, p.batch, samples):
        for h in range(0, kv_heads, heads):
            last = min(h + heads, kv_heads)
            yield Part((b, min(b + samples, p.batch)), (h * group, last * group), group, fan)


class _Buffers:
    """What one call uses again for each of its parts, and the moving of rows between tensors and units."""

    def __init__(self, problem: Problem, plan: TilePlan, walk: TiledWalk, extra: int = 0) -> None:
        self.problem, self.plan, self.walk, self.kernel = problem, plan, walk, walk.kernel
        device, dim = problem.q.device, problem.q.shape[3]
        self.extra, self.width = extra, dim + extra
        self.packed, self.sums = (Workspace(dtype, device, "tiles") for dtype in (walk.dtype, problem.accumulate_dtype))
        self.q_size, self.k_size = (
            min(size, n) for size, n in zip(plan.block_size, (problem.query_length, problem.key_length))
        )
        self.lowest = torch.finfo(problem.accumulate_dtype).min
        self._masks = dict[tuple[int, ...], tuple[Tensor, Tensor]]()

    def pieces(self, part: Part) -> TilePieces:
        p, walk, most = self.problem, self.walk, self.kernel.max_batch
        if p.q.device.type == "cpu":
            alone = max(1, (SERIAL_ROWS - 1) // _padded(part.fan * self.q_size))
            most = alone if most is None else min(most, alone)
        return pieces_of(self.plan, part, p.key_length, walk.gathered_rows, most)

    def units(self, part: Part) -> tuple[int, int]:
        """How many there are, and their rows, padded."""
        return math.prod(part.shape) * self.plan.kv_num.shape[2], part.fan * self.q_size

    def pack(self, part: Part, name: str, x: Tensor, of_keys: bool = False) -> Tensor:
        """Rows of (B, N, H, D) as (units, rows, D + extra), or as (blocks of keys, rows, D + extra).

        The extra columns are 0, and so are rows that pad the last block of queries, and padded keys.
        """
        rows, fan, size = self._rows(part, x, of_keys)
        b, n, h, d = rows.shape
        buffer = self.packed.take(name, (b, h // fan, -(-n // size), fan, size, self.width))
        for source, target in _by_block(rows, buffer):
            target[..., :d].copy_(source)
        if self.extra:
            buffer[..., d:].zero_()
        if not of_keys and n % size:
            buffer[:, :, -1, :, n % size :].zero_()
        lengths = self.problem.key_lengths
        if of_keys and lengths is not None:
            for i, length in enumerate(lengths[slice(*part.samples)]):  # the padding may hold anything
                buffer[i].view(h, -1, self.width)[:, length:].zero_()
        return buffer.view(-1, fan * size, self.width)

    def pack_lse(self, part: Part, lse: Tensor) -> Tensor:
        """(units, rows) of the global lse, inf for rows without a key and rows that pad: exp(logit - inf) is 0."""
        rows, fan, size = self._rows(part, lse.transpose(1, 2).unsqueeze(-1), False)
        buffer = self.sums.take("l", (rows.shape[0], rows.shape[2] // fan, -(-rows.shape[1] // size), fan, size, 1))
        buffer.fill_(torch.inf)
        for source, target in _by_block(rows, buffer):
            target.copy_(source)
        return buffer.view(-1, fan * size).masked_fill_(buffer.view(-1, fan * size) == -torch.inf, torch.inf)

    def unpack(self, part: Part, packed: Tensor, x: Tensor, of_keys: bool = False) -> None:
        """Copy (units, rows, D ...) or (blocks of keys, rows, D ...) to rows of (B, N, H, D)."""
        rows, fan, size = self._rows(part, x, of_keys)
        b, n, h, d = rows.shape
        for target, source in _by_block(rows, packed.view(b, h // fan, -(-n // size), fan, size, -1)):
            target.copy_(source[..., :d])

    def _rows(self, part: Part, x: Tensor, of_keys: bool) -> tuple[Tensor, int, int]:
        """The part's rows of x, the fan and the block size of that side."""
        low, high = part.heads
        if of_keys:
            return x[slice(*part.samples), :, low // part.group : high // part.group], 1, self.k_size
        return x[slice(*part.samples), :, low:high], part.fan, self.q_size

    def keys(self, name: str, packed: Tensor, piece: TilePiece) -> Tensor:
        """(n, 1, keys, D) of packed blocks: in place where they are neighbours, else gathered."""
        n, m = piece.blocks.shape
        if piece.run is not None:
            first, step = piece.run
            block = packed.stride(0)
            start, strides = packed.storage_offset() + first * block, (step * block, 0, self.width, 1)
            return packed.as_strided((n, 1, piece.key_rows, self.width), strides, start)
        buffer = self.packed.take(name, (n * m, *packed.shape[1:]))
        torch.index_select(packed, 0, piece.blocks.view(-1), out=buffer)
        return buffer.view(n, 1, -1, self.width)[:, :, : piece.key_rows]

    def mask(self, part: Part, piece: TilePiece) -> tuple[Tensor, Tensor] | None:
        """(log-counts (n or 1, 1, rows, keys), rows without a key (n or 1, 1, rows)) of a piece of partial tiles."""
        if piece.count != PARTIAL:
            return None
        assert piece.tables is not None
        shared = len(piece.tables) == 1
        key = (part.fan, piece.key_rows, *piece.tables[0].tolist()) if shared else ()
        if shared and key in self._masks:
            return self._masks[key]
        n, m = piece.tables.shape
        counts = self.plan.counts[:, : self.q_size, : self.k_size].index_select(0, piece.tables.view(-1))
        counts = counts.view(n, 1, m, self.q_size, self.k_size).transpose(2, 3)  # (n, 1, q rows, m, k rows)
        logs = counts.to(self.walk.dtype).log_().expand(-1, part.fan, -1, -1, -1)
        logs = logs.reshape(n, 1, part.fan * self.q_size, m * self.k_size)[..., : piece.key_rows]
        made = logs, logs.amax(-1) == -torch.inf
        if shared:
            self._masks = {key: made}
        return made


def _by_block(rows: Tensor, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of (b, N, H, D) and of (b, H / fan, blocks, fan, size, D) on the same rows: whole blocks, and the last."""
    fan, size = blocks.shape[3:5]
    whole, left = divmod(rows.shape[1], size)
    split = rows.unflatten(2, (-1, fan))  # (b, N, H / fan, fan, D)
    yield split[:, : whole * size].unflatten(1, (whole, size)).permute(0, 3, 1, 4, 2, 5), blocks[:, :, :whole]
    if left:
        yield split[:, whole * size :].permute(0, 2, 3, 1, 4), blocks[:, :, whole, :, :left]


def _take(x: Tensor, piece: TilePiece) -> Tensor:
    """The rows of the piece's units, in place where they stand side by side."""
    if piece.first_unit is not None:
        return x[piece.first_unit : piece.first_unit + len(piece.units)]
    return x.index_select(0, piece.units)


def _give(x: Tensor, piece: TilePiece, rows: Tensor) -> None:
    """Write the rows of the piece's units."""
    if piece.first_unit is not None:
        x[piece.first_unit : piece.first_unit + len(piece.units)].copy_(rows)
    else:
        x.index_copy_(0, piece.units, rows.to(x.dtype))


def _padded(rows: int) -> int:
    return -(-rows // ALIKE_ROWS) * ALIKE_ROWS


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a part of some units into the running out (n, rows, D) and lse (n, rows), in place; every lse is finite.

    As `merging.merge_into`, and a unit's numbers do not depend on which others stand beside it, bit for bit: tables
    that were chosen from data put causal rows beside other ones when later tokens change.
    """
    rows = lse.shape[1]
    now, new = (pad(x, (0, _padded(rows) - rows)) for x in (lse, part_lse))
    weight = torch.sigmoid(new - now)[:, :rows].unsqueeze(-1)  # 1 where nothing was seen before
    out.mul_(1 - weight).add_(part_out * weight)  # each product and sum rounded, in whatever vectors
    lse.copy_(torch.logaddexp(now, new)[:, :rows])


def _profiled(piece: TilePiece, rows: int, kernel: Kernel) -> AbstractContextManager[object]:
    """A range that names the piece, when a profiler listens."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return nullcontext()
    kind = "partial" if piece.count == PARTIAL else "full"
    place = "in place" if piece.run is not None else "gathered"
    name = f"{kernel.name}: {kind} tiles, {len(piece.units)} x ({rows} x {piece.key_rows}), {place}"
    return torch.profiler.record_function(name)


def _forward_part(part: Part, work: _Buffers) -> tuple[Tensor, Tensor]:
    """(out (units, rows, D), lse (units, rows, 1)) of a part."""
    p, kernel = work.problem, work.kernel
    found, (units, rows) = work.pieces(part), work.units(part)
    q = work.pack(part, "q", p.q)
    k, v = (work.pack(part, name, x, of_keys=True) for name, x in (("k", p.k), ("v", p.v)))
    out, lse = work.sums.take("out", (units, rows, work.width)), work.sums.take("lse", (units, rows))
    if not found.whole:
        out.zero_()
        lse.fill_(work.lowest)  # finite, so that differences are no NaN
    for piece in found.pieces:
        mask = work.mask(part, piece)
        inputs = _take(q, piece).unsqueeze(1), work.keys("ks", k, piece), work.keys("vs", v, piece)
        with _profiled(piece, rows, kernel):
            part_out, part_lse = kernel.forward(*inputs, p.scale, False, None if mask is None else mask[0])
        part_out, part_lse = part_out.squeeze(1), part_lse.squeeze(1)
        if mask is not None:
            unseen = mask[1].squeeze(1)
            part_lse = part_lse.masked_fill(unseen, work.lowest)
            part_out = part_out.masked_fill(unseen.unsqueeze(-1), 0)
        elif piece.count != 1:
            part_lse = part_lse + math.log(piece.count)
        if piece.fresh:
            _give(out, piece, part_out)
            _give(lse, piece, part_lse)
            continue
        now_out, now_lse = _take(out, piece), _take(lse, piece)
        _merge(now_out, now_lse, part_out.to(out.dtype), part_lse)
        if piece.first_unit is None:
            _give(out, piece, now_out)
            _give(lse, piece, now_lse)
    return out, lse.masked_fill_(lse == work.lowest, -torch.inf).unsqueeze(-1)


def _backward_part(
    part: Part, work: _Buffers, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq (units, rows, D + extra), dk and dv (blocks of keys, rows, D + extra)) of a part.

    A gradient of lse enters as one more column, as on strided pieces: v is 0 there, dout 1 and out -dlse.
    """
    p, kernel, d = work.problem, work.kernel, work.problem.q.shape[3]
    found, (_, rows) = work.pieces(part), work.units(part)
    q, g, o = (work.pack(part, name, x) for name, x in (("q", p.q), ("g", dout), ("o", out)))
    k, v = (work.pack(part, name, x, of_keys=True) for name, x in (("k", p.k), ("v", p.v)))
    l = work.pack_lse(part, lse)  # noqa: E741
    if dlse is not None:
        g[..., d] = 1
        o[..., d] = -work.pack(part, "dlse", dlse.transpose(1, 2).unsqueeze(-1))[..., 0]
    dq = work.sums.take("dq", q.shape)
    dk, dv = (work.sums.take(name, k.shape).zero_() for name in ("dk", "dv"))
    if not found.whole:
        dq.zero_()
    for piece in found.pieces:
        mask = work.mask(part, piece)
        mine = [_take(x, piece).unsqueeze(1) for x in (g, q, o)]
        keys = work.keys("ks", k, piece), work.keys("vs", v, piece)
        row_lse = _take(l, piece).unsqueeze(1)
        if piece.count not in (PARTIAL, 1):
            row_lse = row_lse - math.log(piece.count)
        with _profiled(piece, rows, kernel):
            grads = kernel.backward(
                mine[0], mine[1], *keys, mine[2], row_lse, p.scale, False, None if mask is None else mask[0]
            )
        share = grads[0].squeeze(1)
        if piece.fresh:
            _give(dq, piece, share)
        elif piece.first_unit is not None:
            _take(dq, piece).add_(share)
        else:
            dq.index_add_(0, piece.units, share.to(dq.dtype))
        for target, grad in ((dk, grads[1]), (dv, grads[2])):
            _add_blocks(target, piece, grad.squeeze(1).to(target.dtype))
    return dq, dk, dv


def _add_blocks(target: Tensor, piece: TilePiece, grad: Tensor) -> None:
    """Add (n, key rows, D) to the blocks of keys that they belong to; the last block may lack rows."""
    n, m = piece.blocks.shape
    size = target.shape[1]
    lacks = m * size - piece.key_rows
    whole = m - (lacks > 0)
    if whole:
        blocks = grad[:, : whole * size].reshape(n * whole, size, -1)
        target.index_add_(0, piece.blocks[:, :whole].reshape(-1), blocks)
    if lacks:
        target[:, : size - lacks].index_add_(0, piece.blocks[:, -1], grad[:, whole * size :])
