"""A selector: a score for every block, a rule that chooses by it, and what the choice may read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import BlockSparse, Full, Pattern
from dilated_attention_pytorch.problem import Problem
from dilated_attention_pytorch.selection.blocks import (
    QueryBlocks,
    SelectedTiles,
    blocks_problem,
    table_shape,
)
from dilated_attention_pytorch.selection.reading import query_blocks

_CELLS = 1 << 24
"""Scores of so many blocks, over samples and heads, are held at once: 64 MiB."""


class BlockScore(ABC):
    """How much a block of keys seems to matter to a block of queries."""

    @abstractmethod
    def __call__(self, blocks: QueryBlocks) -> Tensor:
        """Logits (B, H, Q, K), float32: the log of the estimated mass, up to a constant of each block of queries.

        Of blocks that are not open they may be anything finite, and no other score may depend on their keys.
        """

    def check(self, block_size: int, reads_own: bool) -> None:
        """Raise InvalidInput when blocks of this size, or of which the own rows may not be read, have no score."""


class Rule(ABC):
    """Which blocks are chosen, given their scores."""

    needs_budget: ClassVar[bool] = False
    """Whether there is no choice without a budget."""

    @abstractmethod
    def __call__(self, scores: Tensor, blocks: QueryBlocks, budget: float | int | None) -> Tensor:
        """A table of bool (B, H, Q, K): within ``open_blocks``, with ``always`` (those count towards the budget)."""


@dataclass(frozen=True)
class Selector:
    """From q and k to the pattern of the blocks worth computing.

    Called as ``selector(q, k, budget, pattern)``. ``score`` judges blocks, ``rule`` chooses. ``block_size`` (tokens)
    counts from position 0. The first ``sink_blocks``, the last ``local_blocks`` up to a query's own, and its own
    diagonal block are always chosen where the pattern has pairs. With a causal pattern the choice for a block of
    queries reads only tokens before the block's first row (where q holds none, that row itself); ``lookahead`` lets it
    read the block's own rows (for prefill: the choice then depends on later tokens of the block, the attention itself
    stays causal).

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> from dilated_attention_pytorch.selection import MeanPooled, TopBlocks
        >>> q = torch.randn(1, 64, 2, 8)
        >>> chosen = Selector(MeanPooled(), TopBlocks(), block_size=8)(q, q, 3, Causal())
        >>> chosen.layout.shape, chosen.layout.sum(-1)[0, 0].tolist()
        (torch.Size([1, 2, 8, 8]), [1, 2, 3, 3, 3, 3, 3, 3])
    """

    score: BlockScore
    rule: Rule
    block_size: int = 128
    sink_blocks: int = 1
    local_blocks: int = 1
    lookahead: bool = False

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("sink_blocks", 0), ("local_blocks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(f"Selector: expected {name} of at least {least}. Got {value!r}.")
        if not isinstance(self.score, BlockScore) or not isinstance(self.rule, Rule):
            raise InvalidInput(
                "Selector: expected a score such as MeanPooled() and a rule such as TopBlocks(). "
                f"Got {type(self.score).__name__} and {type(self.rule).__name__}."
            )

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
        int; more than there are means all. Blocks that are always chosen count towards it. Further arguments as in
        `attend`. The layout is (B, H, Q, K) over all positions up to the last; rows before ``query_start`` are empty.
        Raises InvalidInput for a budget below one block, and without one where the rule needs it.
        """
        pattern = Full() if pattern is None else pattern
        problem = blocks_problem(q, k, pattern, key_padding_mask=key_padding_mask, query_start=query_start, scale=scale)
        shape = table_shape(problem, self.block_size)
        self._check_budget(budget, shape[-1])
        self.score.check(self.block_size, self.lookahead or not pattern.is_causal)
        layout = torch.zeros(shape, dtype=torch.uint8, device=q.device)
        if q.numel() > 0 and k.numel() > 0:
            self._choose(layout, problem, pattern, budget)
        return SelectedTiles(BlockSparse(self.block_size, layout), pattern)

    def _choose(self, layout: Tensor, problem: Problem, pattern: Pattern, budget: float | int | None) -> None:
        """Fill the rows of blocks that hold queries, so many at once that scores stay small."""
        blocks = query_blocks(
            problem,
            pattern,
            self.block_size,
            lookahead=self.lookahead,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )
        total, first = blocks.probe.shape[1], blocks.first_block
        at_once = max(1, _CELLS // (layout.shape[0] * layout.shape[1] * layout.shape[3]))
        with _full_precision(problem.q.device):
            for row in range(0, total, at_once):
                part = blocks.part(row, min(row + at_once, total))
                layout[:, :, first + row : first + row + at_once] = self.rule(self.score(part), part, budget)

    def _check_budget(self, budget: float | int | None, columns: int) -> None:
        if budget is None:
            if self.rule.needs_budget:
                raise InvalidInput(
                    f"Selector: {type(self.rule).__name__} needs a budget: a share in (0, 1] or a number of blocks."
                )
            return
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise InvalidInput(f"Selector: expected a budget as float (share) or int (blocks). Got {budget!r}.")
        if isinstance(budget, int):
            if budget < 1:
                raise InvalidInput(f"Selector: expected a budget of at least 1 block. Got {budget}.")
        elif math.isnan(budget) or not 0.0 < budget <= 1.0:
            raise InvalidInput(
                f"Selector: expected a budget in (0, 1], the share of blocks. Got {budget}; give blocks as an int."
            )
        elif budget * columns < 1.0 - 1e-9:
            raise InvalidInput(
                f"Selector: a budget of {budget} of {columns} blocks is below one block; the least is "
                f"{1 / columns:.3g}. Take a smaller block_size than {self.block_size}, or give blocks as an int."
            )


def _full_precision(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Autocast off: scores are float32 whatever the layers around them compute in."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
