"""Coarse levels: blocks that were not chosen take part as one pooled key each, so that nothing is lost altogether.

Legend: B batch, N tokens (Nq, Nk), H query heads, Hkv key-value heads, Q query blocks, K key blocks, S keys of a block,
D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.merging import merge
from dilated_attention_pytorch.patterns import BlockSparse, Full, Pattern
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.problem import Problem, accumulate_dtype, positions_end
from dilated_attention_pytorch.selection.blocks import BOUND_CELLS, SelectedTiles, block_bounds, blocks_problem


def attend_with_coarse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: SelectedTiles,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    query_start: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention over the chosen blocks, and over one pooled key for each block that was not chosen.

    A pooled key is the mean of a block's unpadded keys, with the mean of their values, and counts as often as there are
    such keys; it takes part only where every one of them is visible to every row of the block of queries, as often to
    each, under the selection's own pattern. Both parts are merged by log-sum-exp, to one softmax over all: MRA's
    approximation (arXiv 2207.10284) with one level; NSA's compressed branch (arXiv 2502.11089) reads blocks likewise.
    With every block chosen it equals `attend`; where all keys of a block are equal, it equals full attention.

    Shapes, arguments, result and errors are those of `attend`. Gradients flow to k and v through their means; which
    blocks are pooled is a constant. Visibility is that which the pattern's `count_bounds` know of.

    Example:
        >>> from dilated_attention_pytorch.patterns import BlockSparse, Full
        >>> none = SelectedTiles(BlockSparse(4, torch.zeros(2, 2, dtype=torch.bool)), Full())
        >>> x = torch.zeros(1, 8, 1, 2)
        >>> attend_with_coarse(x, x, x, none, return_lse=True)[1].exp().round().flatten().tolist()
        [8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    """
    if not isinstance(selected, SelectedTiles):
        raise InvalidInput(
            "attend_with_coarse: expected the SelectedTiles that a selector gives, or "
            f"SelectedTiles(BlockSparse(...), pattern). Got {type(selected).__name__}."
        )
    options: dict[str, Any] = {"scale": scale, "backend": backend, "return_lse": True}
    fine = attend(q, k, v, selected, key_padding_mask=key_padding_mask, query_start=query_start, **options)
    problem = blocks_problem(
        q, k, selected.right, key_padding_mask=key_padding_mask, query_start=query_start, scale=scale
    )
    if problem.key_length == 0 or problem.query_length == 0:
        return fine if return_lse else fine[0]
    rows, size = selected.blocks.block_size
    counts = pooled_counts(problem, selected.right, (rows, size)).to(q.device)
    chosen = selected.layout.to(q.device)[..., : counts.shape[-2], : counts.shape[-1]] > 0
    counts = torch.where(chosen, 0, counts)
    keys, values = (pooled(x, size, problem.key_lengths) for x in (k, v))
    start = problem.query_positions[0].start
    pattern = SelectedTiles(BlockSparse((rows, 1), counts), Full())
    coarse = attend(q, keys, values, pattern, query_start=start, **options)
    out, lse = merge(fine, coarse)
    return (out, lse) if return_lse else out


def pooled(x: Tensor, block_size: int, lengths: tuple[int, ...] | None = None) -> Tensor:
    """The mean of each block's rows: (B, N, H, D) to (B, blocks, H, D), in x's dtype; differentiable.

    Of sample b only the first ``lengths[b]`` rows are held; a block that holds none gives 0.

    Example:
        >>> pooled(torch.tensor([1.0, 3.0, 5.0, 8.0]).view(1, 4, 1, 1), 2, (3,)).flatten().tolist()
        [2.0, 5.0]
    """
    batch, length = x.shape[:2]
    blocks = -(-length // block_size)
    held = _held(batch, length, block_size, lengths).to(x.device)  # (B, blocks)
    sums = x.to(accumulate_dtype(x.dtype))
    if lengths is not None:
        place = torch.arange(length, device=x.device)
        padding = place >= torch.tensor(lengths, device=x.device).view(-1, 1)
        sums = sums.masked_fill(padding[..., None, None], 0.0)
    sums = torch.nn.functional.pad(sums, (0, 0, 0, 0, 0, blocks * block_size - length))
    means: Tensor = sums.unflatten(1, (blocks, block_size)).sum(2) / held.clamp(min=1)[..., None, None]
    return means.to(x.dtype)


def _held(batch: int, length: int, block_size: int, lengths: tuple[int, ...] | None) -> Tensor:
    """Unpadded keys of every block: (B, K), int64."""
    ends = torch.tensor(lengths if lengths is not None else (length,) * batch).view(-1, 1)
    return (ends - torch.arange(-(-length // block_size)) * block_size).clamp(0, block_size)


def pooled_counts(problem: Problem, pattern: Pattern, block_size: tuple[int, int]) -> Tensor:
    """How often each block of queries sees the pooled key of each block: (B or 1, H or 1, Q, K), int32, on the CPU.

    It is the number of the block's unpadded keys, times the count of their pairs under ``pattern``; 0 where these are
    not known to be equal. A row of Q stands for every query of its block, held in the problem or not, so that a cached
    prefix changes nothing; rows before the first query are 0. ``block_size`` is that of (queries, keys), in tokens.
    """
    rows, size = block_size
    first, end = problem.query_positions[0].start // rows, -(-positions_end(problem.query_positions) // rows)
    key_low = torch.arange(-(-problem.key_length // size)) * size
    lengths = problem.key_lengths or (problem.key_length,)
    held = _held(len(lengths), problem.key_length, size, problem.key_lengths)

    def visible(query_low: Tensor, length: int) -> Tensor:
        key_high = torch.maximum((key_low + size).clamp(max=length) - 1, key_low)
        queries, keys = _block(query_low, query_low + rows - 1), _block(key_low, key_high)
        low, high = block_bounds(pattern, problem.num_heads, queries, keys)
        return torch.where(low == high, low, 0)

    parts = []
    at_once = max(1, BOUND_CELLS // (problem.num_heads * len(key_low)))
    for row in range(first, end, at_once):
        query_low = torch.arange(row, min(row + at_once, end)) * rows
        known = {n: visible(query_low, n) for n in set(lengths)}
        seen = known[lengths[0]]
        if len(lengths) > 1:
            seen = torch.stack([known[n][b % len(known[n])] for b, n in enumerate(lengths)])
        parts.append((seen * held[:, None, None, :]).int())
    return torch.nn.functional.pad(torch.cat(parts, -2), (0, 0, first, 0))


def _block(low: Tensor, high: Tensor) -> Block:
    return Block(low, high, (high > low).long())
