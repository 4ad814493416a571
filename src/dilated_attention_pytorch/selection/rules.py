"""Rules: which blocks are chosen, given their scores. Among equal scores the lower block comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_attention_pytorch.errors import InvalidInput
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


@dataclass(frozen=True)
class Mass(Rule):
    """The fewest blocks whose softmax share over the open blocks reaches ``gamma`` in (0, 1], the always chosen first.

    XAttention's and FlexPrefill's rule (arXiv 2503.16428, 2502.20766). A budget caps the number of blocks.

    Example:
        >>> from dilated_attention_pytorch.selection import MeanPooled, Selector
        >>> q = torch.zeros(1, 12, 1, 2)
        >>> Selector(MeanPooled(), Mass(0.4), block_size=2)(q, q).layout[0, 0].sum(-1).tolist()
        [3, 3, 3, 3, 3, 3]
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma <= 1.0:
            raise InvalidInput(f"Mass: expected gamma in (0, 1], a share of the attention mass. Got {self.gamma}.")

    def __call__(self, scores: Tensor, blocks: QueryBlocks, budget: float | int | None) -> Tensor:
        share = _shares(scores, blocks)
        held = (share * blocks.always).sum(-1, keepdim=True)
        candidates = (blocks.open_blocks & ~blocks.always).expand(scores.shape)
        ranked, order = torch.where(candidates, share, -1.0).sort(dim=-1, descending=True, stable=True)
        reached = held + pad(ranked.clamp(min=0.0).cumsum(-1)[..., :-1], (1, 0))  # before each block
        place = torch.arange(scores.shape[-1], device=scores.device)
        total = share.sum(-1, keepdim=True)
        wanted = (ranked >= 0) & (reached < self.gamma * total) & (place < _left(blocks, budget).unsqueeze(-1))
        return torch.zeros_like(wanted).scatter(-1, order, wanted) | blocks.always


@dataclass(frozen=True)
class Threshold(Rule):
    """Blocks whose softmax share over the open blocks is at least ``value``, in [0, 1]. A budget caps their number.

    Example:
        >>> from dilated_attention_pytorch.selection import MeanPooled, Selector
        >>> q = torch.zeros(1, 12, 1, 2)
        >>> Selector(MeanPooled(), Threshold(0.2), block_size=2)(q, q).layout[0, 0].sum(-1).tolist()
        [1, 2, 2, 2, 2, 2]
    """

    value: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0:
            raise InvalidInput(f"Threshold: expected a value in [0, 1], a share of the attention. Got {self.value}.")

    def __call__(self, scores: Tensor, blocks: QueryBlocks, budget: float | int | None) -> Tensor:
        candidates = blocks.open_blocks & ~blocks.always & (_shares(scores, blocks) >= self.value)
        return _best(scores, candidates, _left(blocks, budget)) | blocks.always


def _shares(scores: Tensor, blocks: QueryBlocks) -> Tensor:
    """Softmax of the scores over the open blocks, 0 elsewhere: (B, H, Q, K)."""
    given = scores.nan_to_num(nan=-torch.inf).masked_fill(~blocks.open_blocks, -torch.inf)
    return given.softmax(-1).nan_to_num(nan=0.0)  # nothing open: 0


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
    chosen = (ranked >= last) & candidates
    if bool((chosen.sum(-1, keepdim=True) <= number).all()):
        return chosen
    above = ranked > last  # some share the last score: the lower blocks among them
    ties = chosen & ~above
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= number - above.sum(-1, keepdim=True)))
