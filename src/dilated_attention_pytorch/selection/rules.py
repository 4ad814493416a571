"""Rules: which blocks are chosen, given their scores. Among equal scores the lower block comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dilated_attention_pytorch.selection.blocks import QueryBlocks
from dilated_attention_pytorch.selection.selector import Rule


@dataclass(frozen=True)
class TopBlocks(Rule):
    """As many blocks as the budget says: those always chosen, then those with the highest scores.

    Example:
        >>> from dilated_attention_pytorch.selection import MeanPooled, Selector
        >>> q = torch.zeros(1, 12, 1, 2)
        >>> Selector(MeanPooled(), TopBlocks(), block_size=2)(q, q, 0.5).layout[0, 0].sum(-1).tolist()
        [3, 3, 3, 3, 3, 3]
    """

    needs_budget: ClassVar[bool] = True

    def __call__(self, scores: Tensor, blocks: QueryBlocks, budget: float | int | None) -> Tensor:
        candidates = blocks.open_blocks & ~blocks.always
        return _best(scores, candidates, _left(blocks, budget)) | blocks.always


def _left(blocks: QueryBlocks, budget: float | int | None) -> Tensor:
    """Blocks that may be chosen besides those always chosen: (B or 1, H or 1, Q)."""
    return (blocks.allowed(budget) - blocks.always.sum(-1)).clamp(min=0)


def _best(scores: Tensor, candidates: Tensor, number: Tensor) -> Tensor:
    """The ``number`` (broadcasts to (B, H, Q)) candidates of the highest scores, or all of them: (B, H, Q, K)."""
    most = min(int(number.max()), scores.shape[-1]) if number.numel() else 0
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ranked = torch.where(candidates, scores.nan_to_num(nan=-torch.inf), -torch.inf)
    highest = ranked.topk(most, -1).values
    number = number.expand(scores.shape[:-1]).unsqueeze(-1)
    last = torch.where(number > 0, highest.gather(-1, (number - 1).clamp(0, most - 1)), torch.inf)
    above = ranked > last
    ties = (ranked == last) & candidates
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= number - above.sum(-1, keepdim=True)))
