"""A score that tries the mean-pooled estimate on a few queries, and looks for lines where it fails: FlexPrefill.

Legend: B batch, H query heads, Hkv key-value heads, G query heads of a key-value head, Q query blocks, K key blocks,
S rows of a block, P tried queries, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.selection.blocks import QueryBlocks
from dilated_attention_pytorch.selection.mass import block_shares
from dilated_attention_pytorch.selection.scores import MeanPooled
from dilated_attention_pytorch.selection.selector import BlockScore

_PAIRS = 1 << 21
"""Logits that are held at once: 8 MiB."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LastQueries(BlockScore):
    """A probe of the last queries with a divergence test: FlexPrefill (arXiv 2502.20766, alg. 1-3).

    The last ``queries`` of each block's probe attend to every key of the open blocks. Where the square root of the
    Jensen-Shannon divergence (nats) between their mass by block and the share that `MeanPooled` gives is below
    ``tau``, the pooled estimate holds and is the score. Elsewhere the head is taken to follow lines: the mass that the
    tried queries gave to a block (a vertical line), or to the block as far back from them as it is from the block of
    queries (a slash), whichever is more. FlexPrefill probes once, with the last queries of the whole sequence; here
    each block of queries has a probe of its own, so that a causal choice reads nothing later. The arithmetic is
    ``queries / (2 block_size)`` of full attention's.

    Example:
        >>> from dilated_attention_pytorch.selection import Selector, TopBlocks
        >>> k = torch.zeros(1, 8, 1, 2)
        >>> k[:, 2], k[:, 3] = 9.0, -9.0  # their mean is 0
        >>> Selector(LastQueries(1), TopBlocks(), 2, 0)(torch.ones(1, 2, 1, 2), k, 2).layout[0, 0, -1].tolist()
        [0, 1, 0, 1]
    """

    queries: int = 4
    tau: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.queries, bool) or not isinstance(self.queries, int) or self.queries < 1:
            raise InvalidInput(f"LastQueries: expected at least 1 query. Got {self.queries!r}.")
        if not 0.0 <= self.tau <= 1.0:
            raise InvalidInput(f"LastQueries: expected tau in [0, 1]; the test never exceeds 0.833. Got {self.tau}.")

    def __call__(self, blocks: QueryBlocks) -> Tensor:
        tried = self._mass(blocks)
        pooled = MeanPooled()(blocks).masked_fill(~blocks.open_blocks, -torch.inf).log_softmax(-1)
        pooled = pooled.exp().nan_to_num(nan=0.0)  # nothing open: 0
        moved = torch.cat((torch.zeros_like(tried[..., :1]), tried[..., :-1]), -1)
        slash = torch.where(blocks.lag.view(-1, 1) > 0, moved, tried)
        holds = divergence(tried, pooled).sqrt() < self.tau
        return torch.where(holds.unsqueeze(-1), pooled, torch.maximum(tried, slash)).clamp(min=_TINY).log()

    def _mass(self, blocks: QueryBlocks) -> Tensor:
        """Mass of each open block in the attention of the tried queries: (B, H, Q, K)."""
        (batch, q_blocks, size, heads, _), k_blocks = blocks.probe.shape, blocks.keys.shape[1]
        mass = torch.zeros(batch, heads, q_blocks, k_blocks, device=blocks.probe.device)
        rows, held = self._last(blocks)
        group, whole = blocks.kv_group, blocks.key_blocks.complete
        at_once = max(1, _PAIRS // (batch * group * rows.shape[2] * size * k_blocks))
        for kv_head in range(heads // group):
            members = slice(kv_head * group, (kv_head + 1) * group)
            keys = blocks.keys[..., kv_head, :].float().flatten(1, 2)  # (B, K S, D)
            for row in range(0, q_blocks, at_once):
                part = blocks.part(row, min(row + at_once, q_blocks))
                columns = part.open_columns
                if columns == 0:
                    continue
                probe = rows[:, row : row + at_once, :, members].float() * blocks.scale
                probe = probe.permute(0, 3, 1, 2, 4)  # (B, G, Q, P, D)
                logits = probe.flatten(1, 3) @ keys[:, : columns * size].transpose(1, 2)
                may = part.open_blocks[..., :columns]
                may = (may if may.shape[1] == 1 else may[:, members])[:, :, :, None, :, None]
                visible = may if whole else may & blocks.keys_held[:, None, None, None, :columns]
                share = block_shares(logits.view(*probe.shape[:4], columns, size), visible)
                weight = (
                    held[:, row : row + at_once, :, None]
                    / held.sum(-1).clamp(min=1)[:, row : row + at_once, None, None]
                )
                mass[:, members, row : row + at_once, :columns] = (share * weight.unsqueeze(1)).sum(3)
        return mass

    def _last(self, blocks: QueryBlocks) -> tuple[Tensor, Tensor]:
        """The last queries of each probe (B, Q, P, H, D), and which of them are held (B or 1, Q, P)."""
        number = min(self.queries, blocks.block_size)
        place = torch.arange(blocks.block_size, device=blocks.probe.device)
        last = torch.where(blocks.probe_held, place, -1).topk(number, -1).values
        index = last.clamp(min=0).expand(len(blocks.probe), -1, -1)[..., None, None]
        return blocks.probe.gather(2, index.expand(-1, -1, -1, *blocks.probe.shape[3:])), last >= 0


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of shares over the last dim, in nats: 0 when equal, ln 2 when apart.

    Example:
        >>> import math
        >>> p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
        >>> (divergence(p, q) / math.log(2)).tolist()
        [1.0, 0.0]
    """
    middle = (p + q) / 2
    both = (torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q))
    return (sum(both, torch.zeros_like(p)).sum(-1) / 2).clamp(min=0.0)
