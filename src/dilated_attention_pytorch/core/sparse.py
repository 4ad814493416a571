"""What the pattern types of 0.2 are here: a table of blocks by name, or a selector that chooses from the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.core.config import SparseAttentionConfig
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import BlockSparse, Pattern, axial, global_local, hybrid, random_blocks
from dilated_attention_pytorch.selection import Gate, Mass, MeanPooled, Selector, TopBlocks
from dilated_attention_pytorch.selection.blocks import QueryBlocks
from dilated_attention_pytorch.selection.selector import Rule

HELD = 0.95
"""The share of the estimated attention that adaptive layers keep, where no share of blocks was given."""


@dataclass(frozen=True)
class MassBetween(Rule):
    """As many blocks as hold ``gamma`` of the estimated attention, and at least the share ``least`` of those visible.

    The budget is the most. `Mass` and `TopBlocks` take blocks in the same order, so the larger choice is their union.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 16, 1, 2)
        >>> [int(Selector(MeanPooled(), MassBetween(gamma, 0.5), 2)(q, q, 0.75).layout[0, 0, 0].sum())
        ...  for gamma in (0.1, 0.7, 1.0)]
        [4, 6, 6]
    """

    gamma: float
    least: float

    def __call__(self, scores: Tensor, blocks: QueryBlocks, budget: float | int | None) -> Tensor:
        return Mass(self.gamma)(scores, blocks, budget) | TopBlocks()(scores, blocks, self.least)


def make_selector(
    config: SparseAttentionConfig,
    num_heads: int | None = None,
    head_dim: int | None = None,
    kv_heads: int | None = None,
) -> tuple[Selector, float]:
    """The selector and the budget of an adaptive config.

    "learned" scores by a `Gate`, which has to know the heads; any other pattern type by mean queries and keys. Raises
    InvalidInput where they are not known.
    """
    if config.pattern_type == "learned":
        if num_heads is None or head_dim is None:
            raise InvalidInput(
                "pattern_type='learned' has a gate for every head: give num_heads= and head_dim=, or make the layer "
                "with create_multihead_dilated_attention"
            )
        score: Gate | MeanPooled = Gate(num_heads, head_dim, kv_heads=kv_heads)
    else:
        score = MeanPooled()
    share = config.fixed_share
    rule: Rule = TopBlocks() if share is not None else MassBetween(HELD, config.min_sparsity)
    return Selector(score, rule, config.block_size), config.max_sparsity if share is None else float(share)


def make_table(config: SparseAttentionConfig) -> dict[str, Any]:
    """The options of `BlockSparseAttention` that a config which is not adaptive asks for."""
    options: dict[str, Any] = {"block_size": config.block_size, "density": config.kept}
    if config.pattern_type == "dilated_sparse":
        return {"kind": "dilated_sparse", "dilation_rates": config.dilation_rates, **options}
    if config.pattern_type == "random":
        return {"kind": "random_blocks", "per_head": True, **options}
    kinds = {"axial": square_axial, "hybrid": global_and_random}
    return {"kind": kinds.get(config.pattern_type, config.pattern_type), **options}


def square_axial(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int,
    density: float,
    grid: tuple[int, int] | None = None,
) -> Pattern:
    """`axial` attention on a grid of (rows, columns); unless given, the squarest with as many tokens.

    Raises InvalidInput for a length that only a single row holds (a prime).
    """
    length = max(query_length, key_length or 0)
    if grid is None:
        rows = next(n for n in range(math.isqrt(length), 0, -1) if length % n == 0)
        if rows == 1 and length > 3:
            raise InvalidInput(f"axial: {length} tokens make no grid of rows and columns; give grid=, or other lengths")
        grid = (rows, length // rows)
    return axial(length, grid=grid, block_size=block_size, density=density)


def global_and_random(
    query_length: int, key_length: int | None = None, *, block_size: int, density: float, seed: int = 0
) -> BlockSparse:
    """BigBird's (arXiv 2007.14062): a window with global blocks, and random blocks; each brings half of ``density``."""
    half: dict[str, Any] = {"block_size": block_size, "density": density / 2}
    near, far = (
        global_local(query_length, key_length, **half),
        random_blocks(query_length, key_length, **half, seed=seed),
    )
    return hybrid(near, far)
