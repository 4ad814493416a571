"""What a selector may read of a problem: its tokens in blocks, which blocks may be chosen, and which always are.

Legend: B batch, H heads, Q query blocks, K key blocks, S rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.problem import Problem, positions_end
from dilated_attention_pytorch.selection.blocks import BOUND_CELLS, QueryBlocks, TokenBlocks, block_bounds


def query_blocks(
    problem: Problem,
    pattern: Pattern,
    block_size: int,
    *,
    lookahead: bool = False,
    sink_blocks: int = 1,
    local_blocks: int = 1,
) -> QueryBlocks:
    """What may be read and chosen for each block of queries of a problem whose rows stand at consecutive positions.

    With a causal pattern and no ``lookahead`` a block is judged by the ``block_size`` rows before its first one, as far
    as q holds them, or else by its first row, and only blocks of keys wholly before that row are open: nothing is read
    that some row of the block may not see. Otherwise it is judged by its own rows, and all is open where the pattern
    may have pairs. Rows of q at places that are padding among the keys do not count in blocks that have other rows.
    """
    start, end = problem.query_positions[0].start, positions_end(problem.query_positions)
    first = start // block_size
    own = _own_rows(problem, start - first * block_size, first, block_size)
    key_blocks = _cut(problem.k, 0, block_size)
    if problem.key_lengths is not None:
        key_blocks = _hold(key_blocks, key_blocks.held & (_places(key_blocks, 0) < _lengths(problem)))
    device = problem.q.device
    seen = _seen(pattern, problem, block_size, first).to(device)
    column = torch.arange(seen.shape[-1], device=device)
    mine = torch.arange(first, -(-end // block_size), device=device).view(-1, 1)
    local = (column <= mine) & (column > mine - max(local_blocks, 1))
    always = seen & ((column < sink_blocks) | local)
    reads_own = lookahead or not pattern.is_causal
    probes = own if reads_own else _rows_before(own, start - first * block_size)
    open_blocks = seen if reads_own else seen & (column < mine)
    lag = torch.zeros_like(mine[:, 0]) if reads_own else (mine[:, 0] > first).long()
    return QueryBlocks(probes, key_blocks, open_blocks, always, problem.scale, pattern, first, reads_own, lag)


def _cut(x: Tensor, before: int, size: int) -> TokenBlocks:
    """Tokens in blocks, the first of which starts ``before`` tokens earlier; a view where nothing is to be added."""
    n = x.shape[1]
    blocks = -(-(before + n) // size)
    after = blocks * size - before - n
    rows = pad(x, (0, 0, 0, 0, before, after)) if before or after else x
    place = torch.arange(blocks * size, device=x.device)
    held = (place >= before) & (place < before + n)
    return TokenBlocks(rows.unflatten(1, (blocks, size)), held.view(1, blocks, size))


def _hold(blocks: TokenBlocks, held: Tensor) -> TokenBlocks:
    """The same blocks with fewer rows held."""
    return TokenBlocks(blocks.rows.masked_fill(~held[..., None, None], 0.0), held)


def _places(blocks: TokenBlocks, first: int) -> Tensor:
    """Positions of the rows of blocks, the first of which is block ``first``: (1, blocks, S)."""
    _, count, size = blocks.held.shape
    return torch.arange(first * size, (first + count) * size, device=blocks.held.device).view(1, count, size)


def _lengths(problem: Problem) -> Tensor:
    return torch.tensor(problem.key_lengths, device=problem.q.device).view(-1, 1, 1)


def _own_rows(problem: Problem, before: int, first: int, size: int) -> TokenBlocks:
    own = _cut(problem.q, before, size)
    if problem.key_lengths is None:
        return own
    place = _places(own, first)
    kept = own.held & ((place < _lengths(problem)) | (place >= problem.key_length))
    return _hold(own, torch.where(kept.any(-1, keepdim=True), kept, own.held))


def _rows_before(own: TokenBlocks, first_row: int) -> TokenBlocks:
    """For each block the rows of the one before; for the first, which has none, its own first row."""
    is_first = torch.arange(own.held.shape[2], device=own.held.device) == first_row
    row = _hold(own.part(0, 1), own.held[:, :1] & is_first)
    rest = own.part(0, own.held.shape[1] - 1)
    return TokenBlocks(torch.cat((row.rows, rest.rows), 1), torch.cat((row.held, rest.held), 1))


def _seen(pattern: Pattern, problem: Problem, size: int, first: int) -> Tensor:
    """Which blocks of keys may hold a pair with each block of queries: (B or 1, H or 1, Q, K)."""
    lengths = problem.key_lengths or (problem.key_length,)
    known = {n: _seen_up_to(n, pattern, problem, size, first) for n in set(lengths)}
    if len(lengths) == 1:
        return known[lengths[0]]
    rows = [known[n][b : b + 1] if len(known[n]) > 1 else known[n] for b, n in enumerate(lengths)]
    return torch.cat(rows)


def _seen_up_to(length: int, pattern: Pattern, problem: Problem, size: int, first: int) -> Tensor:
    """The same for a sample with ``length`` keys."""
    start, end = problem.query_positions[0].start, positions_end(problem.query_positions)
    key_low = torch.arange(-(-problem.key_length // size)) * size
    keys = _stretch(key_low, key_low + size, (0, length))
    query_low = torch.arange(first, -(-end // size)) * size
    queries = _stretch(query_low, query_low + size, (start, end))
    at_once = max(1, BOUND_CELLS // (problem.num_heads * max(1, len(key_low))))
    parts = []
    for row in range(0, len(query_low), at_once):
        some = Block(*(x[row : row + at_once] for x in queries))
        parts.append((block_bounds(pattern, problem.num_heads, some, keys)[1] > 0) & (key_low < length))
    return torch.cat(parts, 2)


def _stretch(low: Tensor, end: Tensor, within: Sequence[int]) -> Block:
    low = low.clamp(min=within[0])
    high = torch.maximum(end.clamp(max=within[1]) - 1, low)
    return Block(low, high, (high > low).long())
