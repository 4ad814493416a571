"""Whether rows may see anything of other rows: what is certain to be empty is neither sent nor computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.problem import Positions, Run

PARTS = 16
"""Blocks into which a run is cut for its bounds."""
MOST_BLOCKS = 4096
"""Blocks of all ranks together, about: in a large world runs are cut into fewer."""


def sees(
    pattern: Pattern,
    num_heads: int,
    queries: Positions,
    keys: Positions,
    key_lengths: Sequence[int] | None = None,
) -> bool:
    """Whether any query may see any key; False is certain.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> sees(Causal(), 1, (Run(0, 1, 8),), (Run(8, 1, 8),)), sees(Causal(), 1, (Run(8, 1, 8),), (Run(0, 1, 8),))
        (False, True)
    """
    return bool(_may_see(pattern, num_heads, [queries], [keys], key_lengths, PARTS)[0, 0])


def sources(
    pattern: Pattern, num_heads: int, world: World, key_lengths: Sequence[int] | None = None
) -> tuple[list[bool], list[bool]]:
    """By rank: whether this rank may see its keys, and whether its queries may see this rank's keys.

    Every rank finds the same of the same pair of ranks.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> rows = ((Run(0, 1, 8),), (Run(8, 1, 8),))
        >>> sources(Causal(), 1, World(0, rows, rows))
        ([True, False], [True, True])
    """
    runs = sum(map(len, (*world.queries, *world.keys)))
    parts = max(1, min(PARTS, MOST_BLOCKS // max(1, runs)))
    mine = world.rank
    seen = _may_see(pattern, num_heads, [world.queries[mine]], world.keys, key_lengths, parts)[0]
    seeing = _may_see(pattern, num_heads, world.queries, [world.keys[mine]], key_lengths, parts)[:, 0]
    return seen.tolist(), seeing.tolist()


def _may_see(
    pattern: Pattern,
    num_heads: int,
    queries: Sequence[Positions],
    keys: Sequence[Positions],
    key_lengths: Sequence[int] | None,
    parts: int,
) -> Tensor:
    """(ranks of queries, ranks of keys), bool."""
    device = pattern.tables[0].device if pattern.tables else torch.device("cpu")
    limit = None if key_lengths is None else max(key_lengths, default=0)
    (q, q_owner), (k, k_owner) = (_blocks(side, parts, device) for side in (queries, keys))
    found = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    if q.low.numel() == 0 or k.low.numel() == 0:
        return found
    head = torch.arange(num_heads if pattern.varies_by_head else 1, device=device).view(-1, 1, 1)
    _, most = pattern.count_bounds(head, num_heads, Block(*(x.view(-1, 1) for x in q)), k)
    may = torch.as_tensor(most, device=device) > 0
    may = may.expand(torch.broadcast_shapes(may.shape, (q.low.numel(), k.low.numel())))
    may = may.flatten(0, -3).any(0) if may.dim() > 2 else may
    if limit is not None:
        may = may & (k.low < limit)
    at = may.nonzero().cpu()
    found[q_owner[at[:, 0]], k_owner[at[:, 1]]] = True
    return found


def _blocks(ranks: Sequence[Positions], parts: int, device: torch.device) -> tuple[Block, Tensor]:
    """The rows of ranks in blocks of a run, and the rank of each block."""
    low, high, step, owner = [], [], [], []
    for rank, positions in enumerate(ranks):
        for run in positions:
            for first, length in _equal(run, parts):
                low.append(run.start + run.step * first)
                high.append(run.start + run.step * (first + length - 1))
                step.append(run.step if length > 1 else 0)
                owner.append(rank)
    numbers = (torch.tensor(x, dtype=torch.int64, device=device) for x in (low, high, step))
    return Block(*numbers), torch.tensor(owner, dtype=torch.int64)


def _equal(run: Run, parts: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of up to ``parts`` parts."""
    parts = min(parts, run.length)
    sizes = [run.length // parts + (i < run.length % parts) for i in range(parts)]
    return zip(accumulate([0, *sizes[:-1]]), sizes)
