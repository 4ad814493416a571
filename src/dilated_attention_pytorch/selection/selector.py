"""A selector: a score for every block, a rule that chooses by it, and what the choice may read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.selection.blocks import QueryBlocks, SelectedTiles


class BlockScore(ABC):
    """How much a block of keys seems to matter to a block of queries."""

    @abstractmethod
    def __call__(self, blocks: QueryBlocks) -> Tensor:
        """Logits (B, H, Q, K), float32, higher is better; of blocks that are not open they may be anything finite."""


class Rule(ABC):
    """Which blocks are chosen, given their scores."""

    @abstractmethod
    def __call__(self, scores: Tensor, blocks: QueryBlocks, budget: float | int | None) -> Tensor:
        """A table of bool (B, H, Q, K): within ``open_blocks``, with ``always`` (those count towards the budget)."""


@dataclass(frozen=True)
class Selector:
    """From q and k to the pattern of the blocks worth computing.

    Called as ``selector(q, k, budget, pattern)``. ``score`` judges blocks, ``rule`` chooses. ``block_size`` (tokens)
    counts from position 0. The first ``sink_blocks`` and the last ``local_blocks`` up to a query's own are always
    chosen where the pattern has pairs. With a causal pattern the choice for a block of queries reads only tokens before
    the block's first row, and its own diagonal block is always chosen; ``lookahead`` lets it read the block's own rows
    (for prefill: the choice then depends on later tokens of the block, the attention itself stays causal).
    """

    score: BlockScore
    rule: Rule
    block_size: int = 128
    sink_blocks: int = 1
    local_blocks: int = 1
    lookahead: bool = False

    @torch.no_grad()
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        budget: float | int | None = None,
        pattern: Pattern | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_start: int | None = None,
        scale: float | None = None,
    ) -> SelectedTiles:
        """The chosen blocks of ``pattern`` (default: Full) for ``q (B, Nq, H, D)`` and ``k (B, Nk, Hkv, D)``.

        ``budget``: the share in (0, 1] of the blocks that a block of queries may see, rounded up, or their number as an
        int. Further arguments as in `attend`. Raises InvalidInput for a budget below one block.
        """
        raise NotImplementedError
