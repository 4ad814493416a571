"""Blocks of queries and keys, as selectors see them, and the pattern of chosen blocks.

Legend: B batch, H query heads, Hkv key-value heads, Q query blocks, K key blocks, S rows of a block, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import BlockSparse, Pattern
from dilated_attention_pytorch.patterns.base import And, Block


@dataclass(frozen=True, eq=False)
class SelectedTiles(And):
    """The pairs of a pattern that lie in chosen blocks: ``BlockSparse(block_size, layout) & pattern``, a constant.

    Backends, masks and gradients treat it as any pattern; its tables of tiles are made once and kept with the plans.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> chosen = SelectedTiles(BlockSparse(2, torch.eye(2, dtype=torch.bool)), Causal())
        >>> print(chosen.draw(4))
        1···
        11··
        ··1·
        ··11
        >>> chosen.density
        0.5
    """

    left: BlockSparse
    right: Pattern

    @property
    def blocks(self) -> BlockSparse:
        """The chosen blocks alone."""
        return self.left

    @property
    def layout(self) -> Tensor:
        """The table of chosen blocks: (B, H, Q, K), or with fewer dims where samples or heads share it."""
        return self.left.layout

    @property
    def density(self) -> float:
        """Share of all blocks that were chosen, whether the pattern has pairs there or not."""
        return float((self.layout > 0).float().mean())

    def overlap(self, other: SelectedTiles) -> float:
        """Jaccard index of two choices: blocks in both over blocks in either; 1 when neither has any.

        Raises InvalidInput when the tables differ in shape or block size.
        """
        mine, theirs = self.layout > 0, other.layout > 0
        if mine.shape != theirs.shape or self.left.block_size != other.left.block_size:
            raise InvalidInput(
                f"overlap: expected tables of one shape and block size. Got {tuple(mine.shape)} in blocks of "
                f"{self.left.block_size} and {tuple(theirs.shape)} in blocks of {other.left.block_size}."
            )
        either = int((mine | theirs).sum())
        return 1.0 if either == 0 else int((mine & theirs).sum()) / either


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """What a selector may read for each block of queries, and which blocks of keys it may choose.

    ``probe (B, Q, S, H, D)`` holds the queries to judge a block by, zeros where ``probe_held (Q, S)`` is False: its own
    rows, or, where causality must hold through the choice, rows before its first one. ``keys (B, K, S, Hkv, D)`` holds
    the blocks of keys, zeros where ``keys_held (B or 1, K, S)`` is False (past the end, padding). ``open_blocks (B or
    1, H or 1, Q, K)`` says which blocks may be chosen, ``always`` (same shape) which are chosen whatever their score.
    """

    probe: Tensor
    probe_held: Tensor
    keys: Tensor
    keys_held: Tensor
    open_blocks: Tensor
    always: Tensor
    scale: float

    @property
    def kv_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.probe.shape[3] // self.keys.shape[3]


def block_bounds(pattern: Pattern, num_heads: int, queries: Block, keys: Block) -> tuple[Tensor, Tensor]:
    """Least and greatest count of every block of queries against every block of keys: (B or 1, H or 1, Q, K)."""
    heads = num_heads if pattern.varies_by_head else 1
    shape = (heads, len(queries.low), len(keys.low))
    head, q, k = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    mine, other = (Block(*(x[i] for x in side)) for side, i in ((queries, q), (keys, k)))
    found = pattern.count_bounds(head, num_heads, mine, other)
    low, high = (torch.as_tensor(x) for x in found)
    return tuple(x.expand(*x.shape[:-1], len(q)).reshape(-1, *shape) for x in (low, high))  # type: ignore[return-value]
