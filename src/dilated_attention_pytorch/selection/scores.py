"""Scores of blocks: published estimates of the attention mass between a block of queries and a block of keys.

All are logits: the log of the mass, up to a constant of each block of queries. A block that holds fewer keys than
others (ragged, padded) has the log of its number of keys to its credit only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dilated_attention_pytorch.selection.blocks import QueryBlocks
from dilated_attention_pytorch.selection.selector import BlockScore


@dataclass(frozen=True)
class MeanPooled(BlockScore):
    """``scale <mean q, mean k> + ln(keys)``: MoBA's gate (arXiv 2502.13189, eq. 5-6), with queries pooled by block.

    It is the log of the mass when all keys of a block are equal.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch.selection import Selector, TopBlocks
        >>> k = torch.zeros(1, 8, 1, 2)
        >>> k[:, 2:4] = 1.0
        >>> Selector(MeanPooled(), TopBlocks(), 2, 0)(torch.ones(1, 2, 1, 2), k, 2).layout[0, 0, -1].tolist()
        [0, 1, 0, 1]
    """

    def __call__(self, blocks: QueryBlocks) -> Tensor:
        logits = blocks.products(blocks.probe_mean * blocks.scale, blocks.key_mean)
        return logits + blocks.key_blocks.count.log()[:, None, None, :]
