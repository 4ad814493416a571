"""The tables of a TilePlan as FlexAttention takes them: captured tensors for score_mod and mask_mod, and block lists.

All patterns are read through the same tensors, so that a new pattern, mask or packing runs kernels that are compiled
already. Captured tensors are flat and as long as the next of a few sizes: sizes of captured tensors are constants of a
kernel (symbols among them break torch 2.13's CPU code), and few sizes mean few kernels.

Legend: Q query blocks, K key blocks, T distinct tables of counts.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dilated_attention_pytorch.plans import TilePlan, TileRanges
from dilated_attention_pytorch.problem import Positions, positions_tensor

LEAST_ENTRIES = 1 << 18
LEAST_COUNTS = 1 << 22
LEAST_ROWS = 1 << 16
GROWTH = 4
"""Flat tables are as long as the least size times a power of this."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Which blocks of the other side each block visits: ``num`` (B or 1, H or 1, blocks), ``idx`` (.., blocks, all)."""

    num: Tensor
    idx: Tensor
    full_num: Tensor
    full_idx: Tensor


@dataclass(frozen=True, eq=False)
class Tables:
    """A TilePlan for one kernel call.

    ``entries`` says which table of ``counts`` the tile (sample, head, query block, key block) has, at the place that
    ``strides`` (3,) gives; tiles that are not visited have one of zeros. ``weighted`` says that some count is above 1.
    """

    block_size: tuple[int, int]
    weighted: bool
    entries: Tensor  # flat, int32
    strides: Tensor  # (3,) int32, of a sample, a head, a query block; 0 where all are alike
    counts: Tensor  # flat, uint8 or int32: T tables of block_size
    by_query: BlockLists
    by_key: BlockLists | None  # only the backward pass walks key blocks


_tables: WeakKeyDictionary[TilePlan, dict[tuple[int, bool], Tables]] = WeakKeyDictionary()
_lock = threading.Lock()


def tables_of(plan: TilePlan, least_block: int = 1, training: bool = False) -> Tables:
    """The tables of a plan, made once for as long as the plan lives.

    Blocks are joined until both sides are multiples of ``least_block``, a power of two; ``training`` adds ``by_key``.
    """
    with _lock:
        known = _tables.setdefault(plan, {})
        if (least_block, training) not in known:
            known[least_block, training] = _make_tables(plan, least_block, training)
        return known[least_block, training]


def table_bytes(plan: TilePlan | TileRanges, least_block: int, training: bool) -> int:
    """What `tables_of` would take, roughly."""
    b, h, *blocks = plan.grid
    sizes = (max(1, least_block // size) for size in plan.block_size)
    q_blocks, k_blocks = (-(-n // size) for n, size in zip(blocks, sizes))
    return b * h * q_blocks * k_blocks * 4 * (5 if training else 3)


def row_positions(positions: Positions, device: torch.device) -> Tensor:
    """Positions of the rows as a flat table, int32 where they fit."""
    rows = positions_tensor(positions, device)
    fits = all(max(run.start, run.start + run.step * (run.length - 1)) < 2**31 for run in positions)
    return _flat(rows.to(torch.int32) if fits else rows, LEAST_ROWS)


def _flat(x: Tensor, least: int) -> Tensor:
    size = least
    while size < x.numel():
        size *= GROWTH
    table = torch.zeros(size, dtype=x.dtype, device=x.device)
    table[: x.numel()] = x.flatten()
    return table


def _make_tables(plan: TilePlan, least_block: int, training: bool) -> Tables:
    entries, counts = _entries(plan)
    factors = tuple(max(1, least_block // size) for size in plan.block_size)
    if factors != (1, 1):
        entries, counts = _joined(entries, counts, (factors[0], factors[1]))
    b, h, q_blocks, k_blocks = entries.shape
    low, high = counts.flatten(1).amin(1), counts.flatten(1).amax(1)
    full, partial = ((x & (high > 0))[entries.long()] for x in (low == high, low < high))
    strides = [h * q_blocks * k_blocks if b > 1 else 0, q_blocks * k_blocks if h > 1 else 0, k_blocks]
    return Tables(
        block_size=(counts.shape[1], counts.shape[2]),
        weighted=bool((high[entries.long()] > 1).any()),
        entries=_flat(entries, LEAST_ENTRIES),
        strides=torch.tensor(strides, dtype=torch.int32, device=entries.device),
        counts=_flat(counts, LEAST_COUNTS),
        by_query=_block_lists(partial, full),
        by_key=_block_lists(partial.transpose(2, 3), full.transpose(2, 3)) if training else None,
    )


def _entries(plan: TilePlan) -> tuple[Tensor, Tensor]:
    """The table of each tile (B or 1, H or 1, Q, K), int32, and the tables (T, *block_size): 0 and each count of full
    tiles throughout, then the plan's own. There are at least two blocks a side: a single one would be a constant of its
    own kernels.
    """
    b, h, q_blocks = plan.kv_num.shape
    shape = (b, h, max(2, q_blocks), max(2, plan.q_num.shape[2]))
    device = plan.counts.device
    throughout = torch.nn.functional.pad(plan.full_count.flatten(), (1, 0)).unique()
    entries = torch.zeros(shape, dtype=torch.int32, device=device)
    partial = (plan.kv_num, plan.kv_idx, plan.kv_table + len(throughout))
    full = (plan.full_num, plan.full_idx, torch.searchsorted(throughout, plan.full_count, out_int32=True))
    for num, idx, entry in (partial, full):
        held = torch.arange(idx.shape[-1], device=device) < num.unsqueeze(-1)
        sample, head, row, _ = held.nonzero(as_tuple=True)
        entries[sample, head, row, idx[held].long()] = entry[held]
    tables = throughout.to(torch.uint8) if bool(throughout[-1] <= 255) else throughout
    return entries, torch.cat([tables.view(-1, 1, 1).expand(-1, *plan.block_size), plan.counts])


def _joined(entries: Tensor, counts: Tensor, factors: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same for blocks that are ``factors`` times as long; equal groups of tiles share a table again."""
    (fq, fk), (b, h, q_blocks, k_blocks) = factors, entries.shape
    pads = [max(2, -(-n // f)) * f - n for n, f in ((k_blocks, fk), (q_blocks, fq))]
    entries = torch.nn.functional.pad(entries, (0, pads[0], 0, pads[1]))
    q_blocks, k_blocks = entries.shape[2] // fq, entries.shape[3] // fk
    groups = entries.view(b, h, q_blocks, fq, k_blocks, fk).transpose(3, 4).reshape(-1, fq * fk)
    code = torch.zeros(len(groups), dtype=torch.int64, device=entries.device)
    for member in (torch.zeros_like(groups[:, 0]), *groups.unbind(1)):
        distinct, code = torch.unique(code * len(counts) + member, return_inverse=True)
    example = torch.zeros(len(distinct), dtype=torch.int64, device=code.device)
    example[code] = torch.arange(len(code), device=code.device)
    tables = counts[groups[example].long()].view(-1, fq, fk, *counts.shape[1:])
    joined = tables.transpose(2, 3).reshape(len(distinct), fq * counts.shape[1], fk * counts.shape[2])
    return code.view(b, h, q_blocks, k_blocks).to(torch.int32), joined


def _block_lists(partial: Tensor, full: Tensor) -> BlockLists:
    lists = []
    for held in (partial, full):
        order = torch.argsort(held.to(torch.uint8), dim=-1, descending=True, stable=True)
        lists += [held.sum(-1).to(torch.int32), order.to(torch.int32)]
    return BlockLists(*lists)
