"""The backend that runs anything the definition allows, in chunks of bounded memory; never wrong, only slow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.dropout import dropout_factors
from dilated_attention_pytorch.memory import empty
from dilated_attention_pytorch.plans import DensePlan, Plan
from dilated_attention_pytorch.plans.base import block_counts
from dilated_attention_pytorch.problem import Problem, positions_tensor

CHUNK_ELEMENTS = 1 << 21
"""Logits held at once: with a handful of temporaries, some tens of MiB."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Logits of some samples, all heads of one kv head, and some queries, with what they are made of."""

    samples: slice
    kv_head: int
    heads: slice
    rows: slice
    q: Tensor  # (b, h, n, D) in the accumulate dtype
    raw: Tensor  # scaled products before score rule and bias
    logits: Tensor  # (b, h, n, Nk), -inf where the count is 0
    derivative: Tensor | None
    keep: Tensor | None


class DenseBackend(Backend):
    """Softmax over all keys with log-counts added, chunk by chunk; ops that every device has."""

    name = "dense"
    plans = (DensePlan,)

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        return []

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        p, dtype = problem, problem.accumulate_dtype
        out = empty((p.batch, p.query_length, p.num_heads, p.v.shape[3]), p.result_dtype, p.q.device)
        lse = empty((p.batch, p.num_heads, p.query_length), dtype, p.q.device)
        for c in _chunks(problem, plan):
            row_lse = _logsumexp(c.logits)
            weights = _weights(c.logits, row_lse)
            if c.keep is not None:
                weights = weights * c.keep
            values = p.v[c.samples, :, c.kv_head].to(dtype).unsqueeze(1)  # (b, 1, Nk, Dv)
            out[c.samples, c.rows, c.heads] = (weights @ values).transpose(1, 2).to(out.dtype)
            lse[c.samples, c.heads, c.rows] = row_lse
        return out, lse

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        p, dtype = problem, problem.accumulate_dtype
        dq = empty(p.q.shape, p.result_dtype, p.q.device)
        dk = torch.zeros(p.k.shape, dtype=dtype, device=p.k.device)
        dv = torch.zeros(p.v.shape, dtype=dtype, device=p.v.device)
        dbias = None if p.bias is None else torch.zeros(p.bias.shape, dtype=dtype, device=p.bias.device)
        for c in _chunks(problem, plan):
            values = p.v[c.samples, :, c.kv_head].to(dtype).unsqueeze(1)
            keys = p.k[c.samples, :, c.kv_head].to(dtype).unsqueeze(1)
            grad = dout[c.samples, c.rows, c.heads].transpose(1, 2).to(dtype)  # (b, h, n, Dv)
            delta = (grad * out[c.samples, c.rows, c.heads].transpose(1, 2).to(dtype)).sum(-1)
            if dlse is not None:
                delta = delta - dlse[c.samples, c.heads, c.rows].to(dtype)
            weights = _weights(c.logits, lse[c.samples, c.heads, c.rows])
            dropped = weights if c.keep is None else weights * c.keep
            dweights = grad @ values.transpose(2, 3)
            if c.keep is not None:
                dweights = dweights * c.keep
            dlogits = weights * (dweights - delta.unsqueeze(-1))
            dv[c.samples, :, c.kv_head] += (dropped.transpose(2, 3) @ grad).sum(1)
            if dbias is not None:
                _add_reduced(dbias, dlogits, c, p)
            if c.derivative is not None:
                dlogits = dlogits * c.derivative
            dq[c.samples, c.rows, c.heads] = (p.scale * (dlogits @ keys)).transpose(1, 2).to(dq.dtype)
            dk[c.samples, :, c.kv_head] += p.scale * (dlogits.transpose(2, 3) @ c.q).sum(1)
        return Gradients(dq, dk.to(p.result_dtype), dv.to(p.result_dtype), dbias)


def _logsumexp(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dim; -inf for rows that are -inf throughout or have no columns."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return torch.logsumexp(logits, -1)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """``exp(logits - lse)``, 0 in rows whose lse is -inf: they have no key."""
    return torch.exp(logits - torch.where(lse > -torch.inf, lse, torch.inf).unsqueeze(-1))


def _add_reduced(dbias: Tensor, dlogits: Tensor, chunk: _Chunk, problem: Problem) -> None:
    """Add a chunk's gradient to the bias gradient, summed over the dims along which the bias was broadcast."""
    places = (chunk.samples, chunk.heads, chunk.rows, slice(0, problem.key_length))
    target = dbias.view((1,) * (4 - dbias.dim()) + tuple(dbias.shape))
    summed = [d for d in range(4) if target.shape[d] == 1]
    index = tuple(slice(0, 1) if d in summed else place for d, place in enumerate(places))
    target[index] += dlogits.sum(summed, keepdim=True) if summed else dlogits


def _chunks(problem: Problem, plan: Plan) -> Iterator[_Chunk]:
    """The problem's logits in chunks of about CHUNK_ELEMENTS, nothing for an empty problem."""
    p = problem
    q_positions = positions_tensor(p.query_positions, p.q.device)
    k_positions = positions_tensor(p.key_positions, p.q.device)
    group = p.kv_group
    rows = max(1, min(p.query_length, CHUNK_ELEMENTS // max(1, group * p.key_length)))
    samples = max(1, CHUNK_ELEMENTS // max(1, group * rows * p.key_length))
    for kv_head in range(p.k.shape[2]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        for row in range(0, p.query_length, rows):
            row_slice = slice(row, min(row + rows, p.query_length))
            counts = block_counts(
                plan.pattern,
                p,
                torch.arange(heads.start, heads.stop, device=p.q.device),
                q_positions[row_slice],
                k_positions,
            )
            for first in range(0, p.batch, samples):
                sample_slice = slice(first, min(first + samples, p.batch))
                mine = counts if counts.shape[0] == 1 else counts[sample_slice]
                yield _chunk(p, mine, sample_slice, kv_head, heads, row_slice, q_positions[row_slice], k_positions)


def _chunk(
    p: Problem,
    counts: Tensor,
    samples: slice,
    kv_head: int,
    heads: slice,
    rows: slice,
    q_positions: Tensor,
    k_positions: Tensor,
) -> _Chunk:
    dtype, device = p.accumulate_dtype, p.q.device
    head = torch.arange(heads.start, heads.stop, device=device).view(-1, 1, 1)
    i = q_positions.view(-1, 1)
    q = p.q[samples, rows, heads].transpose(1, 2).to(dtype)
    keys = p.k[samples, :, kv_head].to(dtype).unsqueeze(1)
    raw = p.scale * (q @ keys.transpose(2, 3))
    logits, derivative, keep = raw, None, None
    if p.score is not None:
        logits = p.score.value(raw, head, i, k_positions)
        derivative = p.score.derivative(raw, head, i, k_positions)
    if p.bias is not None:
        full = (p.batch, p.num_heads, p.query_length, p.key_length)
        logits = logits + p.bias.expand(full)[samples, heads, rows].to(dtype)
    if p.dropout_p > 0:
        assert p.seed is not None
        row = p.dropout_rows(torch.arange(samples.start, samples.stop, device=device).view(-1, 1, 1, 1), head)
        keep = dropout_factors(p.seed, p.dropout_p, row, i, k_positions, dtype)
    logits = torch.where(counts > 0, logits + counts.to(dtype).log(), -torch.inf)
    return _Chunk(samples, kv_head, heads, rows, q, raw, logits, derivative, keep)
