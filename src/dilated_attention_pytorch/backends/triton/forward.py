# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-untyped,import-not-found"
"""Forward kernels: a list of tiles of any branches, one branch on a grid, and a TilePlan. walk.py has the legend.

Each writes out (B, Nq, H, Dv) and lse (B, H, Nq), both contiguous. With CARRY a launch goes on from what an earlier one
wrote there, so branches need no pass that merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.backends.triton.walk import (
    FORWARD,
    LN2,
    LOG2E,
    ceil_div,
    load_rows,
    store_rows,
    visit,
    visit_all,
    visit_segment,
)

# Numbers that change from call to call and would otherwise compile a kernel anew when they happen to be 1 or 16.
ANY_VALUE = [
    "QUERY_START", "KEY_START", "NQ", "NK", "H", "branches", "reach", "threshold", "segment_length", "rate",
    "first_segment", "behind", "ahead", "WIDTH", "FULL_WIDTH",
]  # fmt: skip


@triton.jit
def tile_rows(TILE, GROUP, RESIDUE, BM: tl.constexpr):
    """Head, sample, positions (ascending), which of them are rows, and the first and last: the tile of this program.

    launches.py says what the tables hold; of a group, columns 0 to 4 are read.
    """
    tile = TILE + 4 * tl.program_id(0).to(tl.int64)
    group = GROUP + 8 * tl.load(tile + 1).to(tl.int64)
    row = tl.load(tile + 2)
    base = tl.load(group)
    residue = RESIDUE + tl.load(group + 1)
    residues = tl.load(group + 2)
    rows = tl.load(group + 3)
    period = tl.load(group + 4)
    i = row + tl.arange(0, BM)
    last = tl.minimum(row + BM, rows) - 1
    held = tl.minimum(i, last)
    pos = base + held // residues * period + tl.load(residue + held % residues)
    low = base + row // residues * period + tl.load(residue + row % residues)
    high = base + last // residues * period + tl.load(residue + last % residues)
    sample = tl.load(tile + 3) + tl.program_id(1)
    return tl.load(tile), sample, pos, i <= last, low, high


@triton.jit
def load_queries(Q, at, stride, ok, SIGN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F32: tl.constexpr):
    """The tile's side of the product, times the sign of the scale: maxima are then taken before scaling."""
    q = load_rows(Q, at, stride, ok, D, DP, True, F32)
    if SIGN < 0:
        q = -q
    elif SIGN == 0:
        q = tl.zeros_like(q)
    return q


@triton.jit
def start_sums(OUT, LSE, at, stride, ok, BM: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, CARRY: tl.constexpr):
    """Weighted values, running maximum and running sum of the rows: nothing yet, or what OUT and LSE say."""
    if CARRY:
        top = tl.load(LSE + at, mask=ok, other=float("-inf")) * LOG2E
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        acc = load_rows(OUT, at, stride, ok, DV, DVP, True, False).to(tl.float32)
    else:
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DVP], tl.float32)
    return acc, top, total


@triton.jit
def store_sums(OUT, LSE, at, stride, ok, acc, top, total, DV: tl.constexpr, DVP: tl.constexpr):
    """Out and lse of the rows stand in memory: (0, -inf) for rows that saw nothing."""
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    store_rows(OUT, at, stride, ok, acc * inverse[:, None], DV, DVP)
    lse = top * LN2 + tl.log2(total) * LN2  # not (top + log2) * LN2: base 2 has larger numbers, and their roundings
    tl.store(LSE + at, tl.where(total > 0, lse, float("-inf")), mask=ok)


@triton.jit
def visible_end(KEY_LENGTH, sample, KEY_START, NK, PADDED: tl.constexpr):
    """One past the last position of a key that is there and is not padding."""
    end = KEY_START + NK
    if PADDED:
        end = tl.minimum(end, tl.load(KEY_LENGTH + sample))
    return end


@triton.jit(do_not_specialize=ANY_VALUE)
def forward_list(
    Q, K, V, OUT, LSE, TILE, GROUP, RESIDUE, BRANCH, PLACE, DOCUMENT, KEY_LENGTH, SEED, RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, document_sample, relative_head,
    QUERY_START, KEY_START, NQ, NK, H, branches, scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr,
    CARRY: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr, DOCUMENTS: tl.constexpr, PADDED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of the rows of one tile over the launch's branches; SHARE query heads read one kv head."""
    head, sample, pos, ok, low, high = tile_rows(TILE, GROUP, RESIDUE, BM)
    b = sample.to(tl.int64)
    h = head.to(tl.int64)
    at = (pos - QUERY_START).to(tl.int64)
    q = load_queries(Q + b * q_sample + h * q_head, at, q_row, ok, SIGN, D, DP, F32)
    out = OUT + (b * NQ * H + h) * DV
    lse = LSE + (b * H + h) * NQ
    acc, top, total = start_sums(out, lse, at, H * DV, ok, BM, DV, DVP, CARRY)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    acc, top, total = visit_all(
        acc, top, total, q, q, top, top, pos, ok, low, high,
        K + b * k_sample + h // SHARE * k_head, V + b * v_sample + h // SHARE * v_head, LSE, LSE,
        BRANCH, PLACE + head * branches, DOCUMENT + b * document_sample, RELATIVE_TABLE + h * relative_head,
        branches, QUERY_START, KEY_START, visible_end(KEY_LENGTH, sample, KEY_START, NK, PADDED), k_row, v_row,
        scale, reach, sample * H + head, seed, threshold, keep,
        BN, D, DP, DV, DVP, FORWARD, BEHIND, AHEAD, DOCUMENTS, RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    store_sums(out, lse, at, H * DV, ok, acc, top, total, DV, DVP)


@triton.jit(do_not_specialize=ANY_VALUE)
def forward_branch(
    Q, K, V, OUT, LSE, PLACE, KEY_LENGTH, SEED, RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, relative_head,
    QUERY_START, KEY_START, NQ, NK, H, segment_length, rate, behind, ahead, first_segment,
    scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr,
    CARRY: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr, PADDED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of BM grid places of one segment of one branch. Programs: (tile, segment, sample * head).

    Later tiles come first where queries see what is behind them: those are the heavy ones.
    """
    tile = tl.program_id(0)
    if AHEAD:
        tile = tl.num_programs(0) - 1 - tile
    head = tl.program_id(2) % H
    sample = tl.program_id(2) // H
    segment = (first_segment + tl.program_id(1)) * segment_length
    start = segment + tl.load(PLACE + head)
    places = ceil_div(tl.minimum(segment + segment_length, QUERY_START + NQ) - start, rate)
    if (start >= segment) & (tile * BM < places):
        i = tile * BM + tl.arange(0, BM)
        pos = start + tl.minimum(i, places - 1) * rate
        low = start + tile * BM * rate
        high = start + (tl.minimum(tile * BM + BM, places) - 1) * rate
        ok = (i < places) & (pos >= QUERY_START)
        b = sample.to(tl.int64)
        h = head.to(tl.int64)
        at = (pos - QUERY_START).to(tl.int64)
        q = load_queries(Q + b * q_sample + h * q_head, at, q_row, ok, SIGN, D, DP, F32)
        out = OUT + (b * NQ * H + h) * DV
        lse = LSE + (b * H + h) * NQ
        acc, top, total = start_sums(out, lse, at, H * DV, ok, BM, DV, DVP, CARRY)
        seed = 0
        if DROPOUT:
            seed = tl.load(SEED)
        acc, top, total = visit_segment(
            acc, top, total, q, q, top, top, pos, ok, True,
            tl.maximum(low, QUERY_START), high, start, segment + segment_length,
            K + b * k_sample + h // SHARE * k_head, V + b * v_sample + h // SHARE * v_head, LSE, LSE,
            RELATIVE_TABLE + h * relative_head, rate, behind, ahead,
            KEY_START, visible_end(KEY_LENGTH, sample, KEY_START, NK, PADDED), k_row, v_row,
            scale, reach, sample * H + head, seed, threshold, keep,
            BN, D, DP, DV, DVP, FORWARD, BEHIND, AHEAD, RELATIVE, DROPOUT, F32, PRECISION,
        )  # fmt: skip
        store_sums(out, lse, at, H * DV, ok, acc, top, total, DV, DVP)


@triton.jit
def block_rows(AT, n, N, BM: tl.constexpr, BLOCK: tl.constexpr, PLACED: tl.constexpr):
    """Row numbers of the n-th BM rows, which of them exist, their positions if asked for, and places in the block."""
    row = n * BM + tl.arange(0, BM)
    ok = row < N
    pos = row
    if PLACED:
        pos = tl.load(AT + row, mask=ok, other=0)
    return row, ok, pos, row % BLOCK


@triton.jit(do_not_specialize=ANY_VALUE)
def forward_blocks(
    Q, K, V, OUT, LSE, NUM, LIST, ENTRY, FULL_NUM, FULL_LIST, FULL_COUNT, COUNTS, QUERY_AT, KEY_AT, SEED,
    RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head,
    table_sample, table_head, relative_head,
    NQ, NK, H, WIDTH, FULL_WIDTH, scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr, RAGGED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of BM rows of a query block of a TilePlan. Programs: (BM rows, head, sample).

    Tables hold a row for each query block: `table_sample` and `table_head` count blocks, 0 where tables are shared.
    """
    head = tl.program_id(1)
    sample = tl.program_id(2)
    b = sample.to(tl.int64)
    h = head.to(tl.int64)
    row, ok, pos, local = block_rows(QUERY_AT, tl.program_id(0), NQ, BM, BLOCK_Q, RELATIVE > 0 or DROPOUT)
    at = row.to(tl.int64)
    q = load_queries(Q + b * q_sample + h * q_head, at, q_row, ok, SIGN, D, DP, F32)
    k = K + b * k_sample + h // SHARE * k_head
    v = V + b * v_sample + h // SHARE * v_head
    out = OUT + (b * NQ * H + h) * DV
    lse = LSE + (b * H + h) * NQ
    relative = RELATIVE_TABLE + h * relative_head
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    block = b * table_sample + h * table_head + tl.program_id(0) * BM // BLOCK_Q
    acc, top, total = start_sums(out, lse, at, H * DV, ok, BM, DV, DVP, False)
    acc, top, total = visit(
        acc, top, total, q, q, top, top, pos, local, ok, k, v, LSE, LSE,
        FULL_LIST + block * FULL_WIDTH, FULL_COUNT + block * FULL_WIDTH, COUNTS, KEY_AT, relative,
        0, tl.load(FULL_NUM + block) * (BLOCK_K // BN), NK, 0, 1, 0, k_row, v_row, 0, 0,
        scale, reach, sample * H + head, seed, threshold, keep,
        BN, D, DP, DV, DVP, FORWARD, RAGGED, False, False, 1, BLOCK_K, 0, 0, 0, RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    acc, top, total = visit(
        acc, top, total, q, q, top, top, pos, local, ok, k, v, LSE, LSE,
        LIST + block * WIDTH, ENTRY + block * WIDTH, COUNTS, KEY_AT, relative,
        0, tl.load(NUM + block) * (BLOCK_K // BN), NK, 0, 1, 0, k_row, v_row, 0, 0,
        scale, reach, sample * H + head, seed, threshold, keep,
        BN, D, DP, DV, DVP, FORWARD, True, False, False, 2, BLOCK_K, BLOCK_K, 1, BLOCK_Q * BLOCK_K,
        RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    store_sums(out, lse, at, H * DV, ok, acc, top, total, DV, DVP)
