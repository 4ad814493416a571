"""A learned score of blocks: SeerAttention's gate (arXiv 2410.13276). `distillation.py` trains it.

Legend: B batch, H query heads, Hkv key-value heads, Q query blocks, K key blocks, D head dim, G gate dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.selection.blocks import QueryBlocks
from dilated_attention_pytorch.selection.selector import BlockScore


class Gate(nn.Module, BlockScore):
    """Logits of blocks from pooled queries and keys, through one linear map per head: AttnGate of arXiv 2410.13276.

    The mean of a block's queries goes through ``query_weight (H, D, G)``, the mean, the greatest and the least of a
    block's keys, side by side, through ``key_weight (Hkv, 3 D, G)``; the logit is their product over ``sqrt(G)``, and
    the log of the number of keys. ``kv_heads`` is H, and ``gate_dim`` is D, unless given. A new gate reads means only,
    through one projection for both sides: with ``gate_dim=head_dim`` it scores as `MeanPooled` does at the usual scale.

    Use it as the score of a `Selector`, which draws no gradient through it; `distil` trains it. It never passes a
    gradient on to queries and keys. Raises InvalidInput for numbers below 1, H no multiple of Hkv, or, when called,
    for blocks of other heads or dims.

    Example:
        >>> from dilated_attention_pytorch.selection import Selector, TopBlocks
        >>> q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)
        >>> Selector(Gate(4, 8, kv_heads=2), TopBlocks(), block_size=16)(q, k, 2).layout.sum(-1)[0, 0].tolist()
        [2, 2, 2, 2]
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        gate_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.kv_heads = num_heads if kv_heads is None else kv_heads
        self.gate_dim = head_dim if gate_dim is None else gate_dim
        for name in ("num_heads", "head_dim", "kv_heads", "gate_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"Gate: expected {name} to be an int of at least 1. Got {value!r}.")
        if self.num_heads % self.kv_heads != 0:
            raise InvalidInput(
                f"Gate: the number of query heads ({num_heads}) must be a multiple of kv_heads ({self.kv_heads})."
            )
        factory = {"device": device, "dtype": dtype}
        self.query_weight = nn.Parameter(torch.empty(num_heads, head_dim, self.gate_dim, **factory))  # type: ignore[arg-type]
        self.key_weight = nn.Parameter(torch.empty(self.kv_heads, 3 * head_dim, self.gate_dim, **factory))  # type: ignore[arg-type]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Both sides project their means alike: the identity, or where G is not D, a random orthogonal map."""
        projection = torch.eye(self.head_dim, device=self.query_weight.device)
        if self.gate_dim != self.head_dim:
            projection = nn.init.orthogonal_(projection.new_empty(self.head_dim, self.gate_dim))
        self.query_weight.copy_(projection.expand_as(self.query_weight))
        self.key_weight.zero_()
        self.key_weight[:, : self.head_dim] = projection.to(self.key_weight.dtype)

    def forward(self, blocks: QueryBlocks) -> Tensor:
        """Logits (B, H, Q, K), float32: the log of the estimated mass, up to a constant of each block of queries."""
        queries, keys = blocks.probe_mean, blocks.key_blocks
        found, expected = (*queries.shape[2:], keys.rows.shape[3]), (self.num_heads, self.head_dim, self.kv_heads)
        if found != expected:
            raise InvalidInput(
                f"Gate: made for (num_heads, head_dim, kv_heads) = {expected}. Got blocks of {found}; make a Gate for "
                "the layer's own heads."
            )
        pooled = torch.cat((keys.mean, keys.greatest, keys.least), -1)  # (B, K, Hkv, 3 D)
        mine = torch.einsum("bqhd,hdg->bqhg", queries.detach().to(self.query_weight.dtype), self.query_weight)
        other = torch.einsum("bkhd,hdg->bkhg", pooled.detach().to(self.key_weight.dtype), self.key_weight)
        logits = blocks.products(mine.float() / math.sqrt(self.gate_dim), other.float())
        return logits + keys.count.log()[:, None, None, :]

    def extra_repr(self) -> str:
        """The numbers that made it."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, kv_heads={self.kv_heads}, gate_dim={self.gate_dim}"
        )
