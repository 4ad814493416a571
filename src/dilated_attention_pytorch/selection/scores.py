"""Scores of blocks: published estimates of the attention mass between a block of queries and a block of keys.

All are logits: the log of the mass, up to a constant of each block of queries, float32. A block that holds fewer keys
than others (ragged, padded) has the log of their number to its credit only.

Legend: B batch, H query heads, Hkv key-value heads, G query heads of a key-value head, Q query blocks, K key blocks,
U and V strided rows of a block of queries and of keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.selection.blocks import QueryBlocks
from dilated_attention_pytorch.selection.mass import block_shares, mass_of
from dilated_attention_pytorch.selection.selector import BlockScore

_PAIRS = 1 << 20
"""Strided logits that are held at once: 4 MiB; more, and causal rows that could end early are read to the end."""
_TINY = torch.finfo(torch.float32).tiny


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
        return blocks.products(blocks.probe_mean * blocks.scale, blocks.key_mean) + _log_keys(blocks)


@dataclass(frozen=True)
class MinMax(BlockScore):
    """``scale sum_d max(q_d min_d, q_d max_d) + ln(keys)``: Quest's bound (arXiv 2406.10774, alg. 1).

    ``min_d`` and ``max_d`` are those of channel d over the keys of the block. Quest judges one query; here the bound
    is averaged over the queries of the probe, exactly, from the means of their positive and of their negative parts.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch.selection import Selector, TopBlocks
        >>> k = torch.zeros(1, 8, 1, 2)
        >>> k[:, 2], k[:, 3] = 1.0, -1.0  # their mean is 0
        >>> Selector(MinMax(), TopBlocks(), 2, 0)(torch.ones(1, 2, 1, 2), k, 2).layout[0, 0, -1].tolist()
        [0, 1, 0, 1]
    """

    def __call__(self, blocks: QueryBlocks) -> Tensor:
        q, k = blocks.probes, blocks.key_blocks
        positive = q.rows.clamp(min=0).sum(2, dtype=torch.float32) / q.count[..., None, None]
        negative = q.mean - positive
        if blocks.scale < 0:
            positive, negative = negative, positive
        bound = blocks.products(positive, k.greatest) + blocks.products(negative, k.least)
        return blocks.scale * bound + _log_keys(blocks)


@dataclass(frozen=True)
class Antidiagonal(BlockScore):
    """Sums along antidiagonals: XAttention (arXiv 2503.16428, alg. 1).

    ``stride`` neighbouring queries and as many keys give one logit: scale times the mean of ``<q, k>`` along their
    antidiagonal, which crosses every vertical and every diagonal line of the square. The score is the log of the
    softmax of these logits over the open blocks, summed over the block of keys and averaged over the probe. The
    arithmetic is 1 / (2 stride) of full attention's. ``block_size`` must be a multiple of ``stride``.

    Example:
        >>> from dilated_attention_pytorch.selection import Selector, TopBlocks
        >>> k = torch.zeros(1, 8, 1, 2)
        >>> k[:, 2] = 1.0
        >>> Selector(Antidiagonal(2), TopBlocks(), 2, 0)(torch.ones(1, 2, 1, 2), k, 2).layout[0, 0, -1].tolist()
        [0, 1, 0, 1]
    """

    stride: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise InvalidInput(f"Antidiagonal: expected a stride of at least 1 token. Got {self.stride!r}.")

    def check(self, block_size: int, reads_own: bool) -> None:
        """Raise InvalidInput unless the blocks are whole strides."""
        if block_size % self.stride != 0:
            raise InvalidInput(
                f"Antidiagonal: the selector's block_size must be a multiple of stride ({self.stride}). Got "
                f"{block_size}; try Antidiagonal(stride={_largest_divisor(block_size, self.stride)})."
            )

    def __call__(self, blocks: QueryBlocks) -> Tensor:
        (batch, q_blocks, _, heads, _), k_blocks = blocks.probe.shape, blocks.keys.shape[1]
        mass = torch.zeros(batch, heads, q_blocks, k_blocks, device=blocks.probe.device)
        group, strides = blocks.kv_group, blocks.block_size // self.stride
        at_once = max(1, _PAIRS // (batch * group * strides * strides * k_blocks))
        for kv_head in range(heads // group):
            members = slice(kv_head * group, (kv_head + 1) * group)
            keys = self._strided(blocks.keys[..., kv_head : kv_head + 1, :].flip(2), 1)[:, 0]  # (B, K V, stride D)
            for row in range(0, q_blocks, at_once):
                part = blocks.part(row, min(row + at_once, q_blocks))
                last = part.open_columns
                if last == 0:
                    continue
                queries = self._strided(part.probe[..., members, :], group)
                logits = queries.flatten(1, 2) @ keys[:, : last * strides].transpose(1, 2)
                logits = logits.view(batch, group, -1, strides, last, strides)
                mass[:, members, row : row + at_once, :last] = self._mass(logits, part, members)
        return mass.clamp(min=_TINY).log()

    def _strided(self, rows: Tensor, heads: int) -> Tensor:
        """``stride`` rows as one: (B, blocks, S, heads, D) to (B, heads, blocks S / stride, stride D), float32."""
        b, blocks, size, _, dim = rows.shape
        rows = rows.float().reshape(b, blocks * size // self.stride, self.stride, heads, dim)
        return rows.permute(0, 3, 1, 2, 4).reshape(b, heads, -1, self.stride * dim)

    def _mass(self, logits: Tensor, blocks: QueryBlocks, members: slice) -> Tensor:
        """From sums of ``<q, k>`` (B, G, Q, U, K, V) to the mean softmax mass (B, G, Q, K) over the open blocks."""
        last, strides = logits.shape[4:]
        open_blocks = blocks.open_blocks[..., :last]
        open_blocks = open_blocks if open_blocks.shape[1] == 1 else open_blocks[:, members]
        visible = open_blocks[:, :, :, None, :, None]
        rows = torch.ones(1, 1, 1, strides, device=logits.device)  # which strided queries count: (B or 1, 1, Q, U)
        if blocks.probes.complete and blocks.key_blocks.complete:
            logits = logits * (blocks.scale / self.stride)
        else:
            held_q = blocks.probe_held.flatten(1).unflatten(1, (-1, self.stride)).float()  # (B or 1, Q U, stride)
            held_k = blocks.keys_held[:, :last].flip(2).flatten(1).unflatten(1, (-1, self.stride)).float()
            pairs = (held_q @ held_k.transpose(1, 2)).clamp(min=1)
            logits = logits * (blocks.scale / pairs).view(len(pairs), 1, *logits.shape[2:])
            keys = held_k.sum(-1).view(-1, 1, 1, 1, last, strides)
            logits = logits + keys.log()  # -inf where there is none
            rows = (held_q.sum(-1) > 0).view(len(held_q), 1, -1, strides)
        share = block_shares(logits, visible) * rows[..., None]  # (B, G, Q, U, K)
        return share.sum(3) / rows.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Oracle(BlockScore):
    """The log of the exact attention mass of each block, at half the cost of full attention: the limit of any score.

    For measurements. It reads the block's own queries: with a causal pattern the selector needs ``lookahead=True``,
    else InvalidInput is raised.
    """

    def check(self, block_size: int, reads_own: bool) -> None:
        """Raise InvalidInput unless the own rows may be read."""
        if not reads_own:
            raise InvalidInput(
                "Oracle: reads the block's own queries, which a causal choice must not; expected "
                "Selector(..., lookahead=True) or a pattern that is not causal."
            )

    def __call__(self, blocks: QueryBlocks) -> Tensor:
        self.check(blocks.block_size, blocks.reads_own)
        return mass_of(blocks).clamp(min=_TINY).log()


def _log_keys(blocks: QueryBlocks) -> Tensor:
    """Log of the keys that each block holds: (B or 1, 1, 1, K)."""
    return blocks.key_blocks.count.log()[:, None, None, :]


def _largest_divisor(number: int, at_most: int) -> int:
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)
