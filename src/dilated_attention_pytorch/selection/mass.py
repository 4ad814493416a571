"""Exact attention mass of blocks, and how much of it a choice holds: what scores estimate and recall measures.

Legend: B batch, H query heads, Hkv key-value heads, G query heads of a key-value head, Q query blocks, K key blocks,
S rows of a block, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import dense_counts
from dilated_attention_pytorch.selection.blocks import (
    QueryBlocks,
    SelectedTiles,
    blocks_problem,
    table_shape,
)
from dilated_attention_pytorch.selection.reading import query_blocks

_PAIRS = 1 << 22
"""Logits that are held at once: a few tensors of 16 MiB."""


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    block_size: int,
    *,
    key_padding_mask: Tensor | None = None,
    query_start: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, H, Q, K), float32: the share of attention that goes to each block of keys, averaged over a block's queries.

    Attention under ``pattern`` as `attend` computes it, for ``q (B, Nq, H, D)`` and ``k (B, Nk, Hkv, D)``; in parts,
    so that memory stays small, at about half its cost. Rows of the table before ``query_start`` are 0; a query that
    sees no key adds 0. Queries at places of padded keys do not count in blocks that have others.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> x = torch.zeros(1, 4, 1, 8)
        >>> block_mass(x, x, Causal(), 2)[0, 0].round(decimals=3).tolist()
        [[1.0, 0.0], [0.5830000042915344, 0.4169999957084656]]
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise InvalidInput(f"block_mass: expected a block_size of at least 1 token. Got {block_size!r}.")
    problem = blocks_problem(q, k, pattern, key_padding_mask=key_padding_mask, query_start=query_start, scale=scale)
    mass = torch.zeros(table_shape(problem, block_size), device=q.device)
    if q.numel() > 0 and k.numel() > 0:
        blocks = query_blocks(problem, pattern, block_size, lookahead=True)
        mass[:, :, blocks.first_block :] = mass_of(blocks)
    return mass


def mass_of(blocks: QueryBlocks) -> Tensor:
    """`block_mass` of blocks that are judged by their own rows: (B, H, Q, K), float32."""
    assert blocks.reads_own, "the rows before a block have no place in its own attention"
    (batch, q_blocks, size, heads, _), k_blocks = blocks.probe.shape, blocks.keys.shape[1]
    mass = torch.zeros(batch, heads, q_blocks, k_blocks, device=blocks.probe.device)
    at_once = max(1, _PAIRS // (size * size * k_blocks * blocks.kv_group))
    for row in range(0, q_blocks, at_once):
        part = blocks.part(row, min(row + at_once, q_blocks))
        if part.open_columns > 0:
            _fill(mass[:, :, row : row + at_once, : part.open_columns], part)
    return mass


def _fill(mass: Tensor, blocks: QueryBlocks) -> None:
    """Write the mass of the first columns, one key-value head of one sample at a time."""
    batch, heads, _, columns = mass.shape
    group, size = blocks.kv_group, blocks.block_size
    q, k = blocks.probe, blocks.keys[:, :columns]
    device = q.device
    at = torch.arange(q.shape[1] * size, device=device).view(-1, 1) + blocks.first_block * size
    to = torch.arange(columns * size, device=device)
    shared = None if blocks.pattern.varies_by_head else _counts(blocks, torch.zeros(1, device=device).long(), at, to)
    weight = blocks.probe_held / blocks.probes.count[..., None]  # (B or 1, Q, S)
    for kv_head in range(heads // group):
        members = torch.arange(kv_head * group, (kv_head + 1) * group, device=device)
        counts = _counts(blocks, members, at, to) if shared is None else shared
        for b in range(batch):
            rows = q[b, :, :, members].float().permute(2, 0, 1, 3).flatten(1, 2)  # (G, Q S, D)
            logits = blocks.scale * rows @ k[b, :, :, kv_head].float().flatten(0, 1).T
            held = blocks.keys_held[b % len(blocks.keys_held), :columns].flatten()
            share = _shares(logits, counts[b % len(counts)] * held).unflatten(2, (columns, size)).sum(-1)
            by_row = share.unflatten(1, (-1, size)) * weight[b % len(weight), ..., None]
            mass[b, members] = by_row.sum(2)


def _counts(blocks: QueryBlocks, heads: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Counts of the pattern with a leading sample dim: (B or 1, heads, queries, keys)."""
    counts = dense_counts(blocks.pattern, heads.view(-1, 1, 1), blocks.probe.shape[3], q, k)
    return counts if counts.dim() == 4 else counts.unsqueeze(0)


def _shares(logits: Tensor, counts: Tensor) -> Tensor:
    """Softmax of logits, each key counted as often as it is seen; 0 where a row sees none."""
    logits = logits.masked_fill_(counts == 0, -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    seen = (logits - peak.masked_fill(peak == -torch.inf, 0.0)).exp_() * counts
    total = seen.sum(-1, keepdim=True)
    return seen / total.masked_fill(total == 0, 1.0)


def block_shares(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible of logits (..., K, V), summed over V: (..., K); 0 where nothing is visible.

    ``visible`` broadcasts to the logits; with a last dim of 1 whole blocks are visible or not, which is faster.

    Example:
        >>> logits, last = torch.zeros(2, 2), torch.tensor([[True, True], [False, True]])
        >>> block_shares(logits, last)
        tensor([0.6667, 0.3333])
    """
    if visible.shape[-1] > 1:
        logits, visible = logits.masked_fill(~visible, -torch.inf), visible.any(-1, keepdim=True)
    hidden = ~visible[..., 0]
    peak = logits.amax(-1).masked_fill(hidden, -torch.inf).amax(-1)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)[..., None, None]
    weight = (logits - peak).exp_().sum(-1).masked_fill(hidden, 0.0)
    total = weight.sum(-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1.0)


def mass_recall(selected: SelectedTiles | Tensor, mass: Tensor) -> Tensor:
    """(B, H): the share of the mass that lies in chosen blocks; blocks of queries weigh alike, 1 where there is none.

    ``mass (B, H, Q, K)`` is that of `block_mass`; a tensor in place of a choice is its layout.

    Example:
        >>> mass_recall(torch.tensor([[True, False]]), torch.tensor([[[[0.75, 0.25]]]]))
        tensor([[0.7500]])
    """
    layout = selected if isinstance(selected, Tensor) else selected.layout
    fits = mass.dim() == 4 and layout.dim() <= 4 and layout.shape[-2:] == mass.shape[-2:]
    if not fits or any(n not in (1, m) for n, m in zip(layout.shape[-3::-1], mass.shape[-3::-1])):
        raise InvalidInput(
            f"mass_recall: expected mass (B, H, Q, K) and a layout of its shape, or with fewer dims. Got "
            f"{tuple(mass.shape)} and {tuple(layout.shape)}; take block_mass with the selector's block_size."
        )
    total = mass.sum((-2, -1))
    chosen = (mass * (layout > 0)).sum((-2, -1))
    return torch.where(total > 0, chosen / total, 1.0)
