"""What the library is measured against: the same kernel on ready-made pieces, and torchscale's dataflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.sdpa.kernels import CpuFlash
from dilated_attention_pytorch.benchmark.cases import Case

KERNEL = CpuFlash()


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


def gather_scatter(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) by torchscale's dataflow on the same kernel: gather each branch, scatter it to full length, mix.

    Every branch is copied out of q, k, v; its output is written to full length with zeros, its lse with -inf off the
    grid; all of them are stacked and mixed by a softmax over the branches. Shapes as `attend`, batch 1, every length a
    multiple.
    """
    scale = 1 / math.sqrt(case.head_dim)
    outs, lses = [], []
    for w, r in zip(case.segment_lengths, case.dilation_rates):
        gathered = [torch.empty(case.tokens // w, w // r, case.heads, case.head_dim) for _ in range(3)]
        for x, dense in zip((q, k, v), gathered):
            for grid, heads in _grids(x[0], w, r):
                dense[:, :, heads] = grid
        queries, keys, values = (x.transpose(1, 2) for x in gathered)
        out, lse = KERNEL.forward(queries, keys, values, scale, False, None)
        full = torch.zeros(case.tokens, case.heads, case.head_dim)
        full_lse = torch.full((case.tokens, case.heads), -torch.inf)
        for grid, heads in _grids(full, w, r):
            grid.copy_(out.transpose(1, 2)[:, :, heads])
        for grid, heads in _grids(full_lse, w, r):
            grid.copy_(lse.transpose(1, 2)[:, :, heads])
        outs.append(full)
        lses.append(full_lse)
    stacked = torch.stack(lses)
    weights = torch.softmax(stacked, 0).unsqueeze(-1)
    mixed = sum((o * w for o, w in zip(outs, weights)), torch.zeros_like(outs[0]))
    return mixed.unsqueeze(0), stacked.logsumexp(0).t().unsqueeze(0)


def _grids(x: Tensor, w: int, r: int) -> Iterator[tuple[Tensor, slice]]:
    """The rows of ``x (N, H, ...)`` on each grid class, (S, w / r, H / r, ...), with the heads that use it."""
    for place in range(r):
        heads = slice(place, None, r)
        yield x.unflatten(0, (x.shape[0] // w, w))[:, place::r, heads], heads
