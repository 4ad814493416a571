"""What the library is measured against: the same kernel on ready-made pieces, and torchscale's dataflow."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.backends.kernel import Kernel
from dilated_attention_pytorch.backends.sdpa.kernels import CpuFlash
from dilated_attention_pytorch.benchmark.cases import Case

KERNEL: Kernel = CpuFlash()


def ready_made_pieces(
    case: Case, with_backward: bool, one_head_at_a_time: bool = False, is_causal: bool = False
) -> Callable[[], None]:
    """A run of the fused kernel over contiguous dense problems of the lengths ``w / r``: no views, no merging.

    With ``one_head_at_a_time`` the same arithmetic runs head by head in the same few buffers, which stay in cache.
    """
    scale = 1 / math.sqrt(case.head_dim)
    problems = []
    for w, r in zip(case.segment_lengths, case.dilation_rates):
        heads = 1 if one_head_at_a_time else case.heads
        shape = (case.tokens // w, heads, w // r, case.head_dim)
        problems.append(tuple(torch.randn(shape) for _ in range(4)))
    repeats = case.heads if one_head_at_a_time else 1

    def run() -> None:
        for _ in range(repeats):
            for q, k, v, dout in problems:
                out, lse = KERNEL.forward(q, k, v, scale, is_causal, None)
                if with_backward:
                    KERNEL.backward(dout, q, k, v, out, lse, scale, is_causal, None)

    return run


def gather_scatter(case: Case, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel = KERNEL) -> tuple[Tensor, Tensor]:
    """(out, lse) by torchscale's dataflow on a fused kernel: gather each branch, scatter it to full length, mix.

    Every branch is copied out of q, k, v; its output is written to full length with zeros, its lse with -inf off the
    grid; all of them are stacked and mixed by a softmax over the branches. Shapes as `attend`, batch 1. Lengths that
    are no multiple of a segment, and segments that are none of a rate, are filled up with zeros, as torchscale does.
    """
    scale, n = 1 / math.sqrt(case.head_dim), q.shape[1]
    outs, lses = [], []
    for segment_length, r in zip(case.segment_lengths, case.dilation_rates):
        w = min(segment_length, n)
        gathered = [_gathered(x[0], w, r) for x in (q, k, v)]
        queries, keys, values = (x.transpose(1, 2) for x in gathered)
        out, lse = kernel.forward(queries, keys, values, scale, False, None)
        full = _scattered(out.transpose(1, 2), w, r, n, 0.0)
        outs.append(full)
        lses.append(_scattered(lse.transpose(1, 2), w, r, n, -torch.inf))
    stacked = torch.stack(lses)
    weights = torch.softmax(stacked, 0).unsqueeze(-1).to(q.dtype)
    mixed = sum((o * w for o, w in zip(outs, weights)), torch.zeros_like(outs[0]))
    return mixed.unsqueeze(0), stacked.logsumexp(0).t().unsqueeze(0)


def _gathered(x: Tensor, w: int, r: int) -> Tensor:
    """The rows of ``x (N, H, D)`` that each head's grid holds: (S, ceil(w / r), H, D), zeros past the end."""
    n, places = x.shape[0], -(-w // r)
    segments = (x if n % w == 0 else pad(x, (0, 0, 0, 0, 0, -n % w))).unflatten(0, (-1, w))
    segments = segments if places * r == w else pad(segments, (0, 0, 0, 0, 0, places * r - w))  # pad always copies
    dense = segments.new_empty((segments.shape[0], places, *x.shape[1:]))
    for place in range(r):
        dense[:, :, place::r] = segments[:, place::r, place::r]
    return dense


def _scattered(x: Tensor, w: int, r: int, n: int, fill: float) -> Tensor:
    """Rows (S, ceil(w / r), H, ...) at their places among N, ``fill`` at all others: (N, H, ...)."""
    full = x.new_full((x.shape[0], x.shape[1] * r, *x.shape[2:]), fill)
    for place in range(r):
        full[:, place::r, place::r] = x[:, :, place::r]
    return full[:, :w].flatten(0, 1)[:n]
