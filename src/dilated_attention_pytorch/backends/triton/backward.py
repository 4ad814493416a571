# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-untyped,import-not-found"
"""Backward kernels: dq by tiles of queries, dk and dv by tiles of keys, with no atomic additions.

walk.py has the legend. Both kinds walk the forward kernels' relation, the tiles of keys with its sides exchanged. Sums
are float32, over every branch and, for dk and dv, over every query head that reads the key. Each gradient is written
once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.backends.triton.forward import (
    ANY_VALUE,
    block_rows,
    load_queries,
    tile_rows,
    visible_end,
)
from dilated_attention_pytorch.backends.triton.walk import (
    KEYS,
    LOG2E,
    QUERIES,
    load_rows,
    store_rows,
    visit,
    visit_all,
)


@triton.jit(do_not_specialize=ANY_VALUE)
def row_statistics(
    OUT, LSE, DOUT, DLSE, ORIGIN, DELTA, o_sample, o_row, o_head, g_sample, g_row, g_head, NQ, H,
    BM: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """Two numbers for each query row, (B, H, Nq): ORIGIN, from which its weights are counted, and DELTA.

    ORIGIN is lse in powers of two, infinite for rows without a key, whose weights are then 0; DELTA is
    <out, dout> - dlse. Programs: (BM rows, head, sample).
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = row < NQ
    at = row.to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    out = load_rows(OUT + b * o_sample + h * o_head, at, o_row, ok, DV, DVP, True, True)
    dout = load_rows(DOUT + b * g_sample + h * g_head, at, g_row, ok, DV, DVP, True, True)
    delta = tl.sum(out * dout, 1)
    place = (b * H + h) * NQ + at
    if WITH_DLSE:
        delta -= tl.load(DLSE + place, mask=ok, other=0.0)
    lse = tl.load(LSE + place, mask=ok, other=0.0)
    tl.store(ORIGIN + place, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=ok)
    tl.store(DELTA + place, delta, mask=ok)


@triton.jit
def load_statistics(ORIGIN, DELTA, at, ok):
    """Both numbers of rows; rows that are not there get weights 0."""
    return tl.load(ORIGIN + at, mask=ok, other=float("inf")), tl.load(DELTA + at, mask=ok, other=0.0)


@triton.jit(do_not_specialize=ANY_VALUE)
def queries_list(
    Q, K, V, DOUT, ORIGIN, DELTA, DQ, TILE, GROUP, RESIDUE, BRANCH, PLACE, DOCUMENT, KEY_LENGTH, SEED, RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, g_sample, g_row, g_head,
    document_sample, relative_head,
    QUERY_START, KEY_START, NQ, NK, H, branches, scale, softmax_scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr,
    BEHIND: tl.constexpr, AHEAD: tl.constexpr, DOCUMENTS: tl.constexpr, PADDED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the rows of one tile of queries."""
    head, sample, pos, ok, low, high = tile_rows(TILE, GROUP, RESIDUE, BM)
    b = sample.to(tl.int64)
    h = head.to(tl.int64)
    at = (pos - QUERY_START).to(tl.int64)
    q = load_queries(Q + b * q_sample + h * q_head, at, q_row, ok, SIGN, D, DP, F32)
    dout = load_rows(DOUT + b * g_sample + h * g_head, at, g_row, ok, DV, DVP, True, F32)
    origin, delta = load_statistics(ORIGIN + (b * H + h) * NQ, DELTA + (b * H + h) * NQ, at, ok)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    dq = tl.zeros([BM, DP], tl.float32)
    idle = tl.zeros([BM], tl.float32)
    dq, _, _ = visit_all(
        dq, idle, idle, q, dout, origin, delta, pos, ok, low, high,
        K + b * k_sample + h // SHARE * k_head, V + b * v_sample + h // SHARE * v_head, ORIGIN, DELTA,
        BRANCH, PLACE + head * branches, DOCUMENT + b * document_sample, RELATIVE_TABLE + h * relative_head,
        branches, QUERY_START, KEY_START, visible_end(KEY_LENGTH, sample, KEY_START, NK, PADDED), k_row, v_row,
        scale, reach, sample * H + head, seed, threshold, keep,
        BN, D, DP, DV, DVP, QUERIES, BEHIND, AHEAD, DOCUMENTS, RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    store_rows(DQ + (b * NQ * H + h) * D, at, H * D, ok, dq * softmax_scale, D, DP)


@triton.jit(do_not_specialize=ANY_VALUE)
def keys_list(
    Q, K, V, DOUT, ORIGIN, DELTA, DK, DV_OUT, TILE, GROUP, RESIDUE, BRANCH, PLACE, DOCUMENT, KEY_LENGTH, SEED,
    RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, g_sample, g_row, g_head,
    document_sample, relative_head,
    QUERY_START, KEY_START, NQ, NK, H, branches, scale, softmax_scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr,
    BEHIND: tl.constexpr, AHEAD: tl.constexpr, DOCUMENTS: tl.constexpr, PADDED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the rows of one tile of keys, over the SHARE query heads that read its kv head.

    BEHIND and AHEAD speak of keys here: whether some branch bounds how far behind, or ahead, of a key its queries are.
    """
    head, sample, pos, ok, low, high = tile_rows(TILE, GROUP, RESIDUE, BM)
    b = sample.to(tl.int64)
    at = (pos - KEY_START).to(tl.int64)
    k = load_queries(K + b * k_sample + head.to(tl.int64) * k_head, at, k_row, ok, SIGN, D, DP, F32)
    v = load_rows(V + b * v_sample + head.to(tl.int64) * v_head, at, v_row, ok, DV, DVP, True, F32)
    visible = ok & (pos < visible_end(KEY_LENGTH, sample, KEY_START, NK, PADDED))
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    dk = tl.zeros([BM, DP], tl.float32)
    dv = tl.zeros([BM, DVP], tl.float32)
    idle = tl.zeros([BM], tl.float32)
    for member in range(SHARE):
        query_head = head * SHARE + member
        h = query_head.to(tl.int64)
        dk, dv, _ = visit_all(
            dk, dv, idle, k, v, idle, idle, pos, visible, low, high,
            Q + b * q_sample + h * q_head, DOUT + b * g_sample + h * g_head,
            ORIGIN + (b * H + h) * NQ, DELTA + (b * H + h) * NQ,
            BRANCH, PLACE + query_head * branches, DOCUMENT + b * document_sample, RELATIVE_TABLE + h * relative_head,
            branches, KEY_START, QUERY_START, QUERY_START + NQ, q_row, g_row,
            scale, reach, sample * H + query_head, seed, threshold, keep,
            BN, D, DP, DV, DVP, KEYS, BEHIND, AHEAD, DOCUMENTS, RELATIVE, DROPOUT, F32, PRECISION,
        )  # fmt: skip
    kv_heads = H // SHARE
    store_rows(DK + (b * NK * kv_heads + head) * D, at, kv_heads * D, ok, dk * softmax_scale, D, DP)
    store_rows(DV_OUT + (b * NK * kv_heads + head) * DV, at, kv_heads * DV, ok, dv, DV, DVP)


@triton.jit(do_not_specialize=ANY_VALUE)
def queries_blocks(
    Q, K, V, DOUT, ORIGIN, DELTA, DQ, NUM, LIST, ENTRY, FULL_NUM, FULL_LIST, FULL_COUNT, COUNTS, QUERY_AT, KEY_AT, SEED,
    RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, g_sample, g_row, g_head,
    table_sample, table_head, relative_head,
    NQ, NK, H, WIDTH, FULL_WIDTH, scale, softmax_scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr, RAGGED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BM rows of a query block of a TilePlan. Programs: (BM rows, head, sample)."""
    head = tl.program_id(1)
    sample = tl.program_id(2)
    b = sample.to(tl.int64)
    h = head.to(tl.int64)
    row, ok, pos, local = block_rows(QUERY_AT, tl.program_id(0), NQ, BM, BLOCK_Q, RELATIVE > 0 or DROPOUT)
    at = row.to(tl.int64)
    q = load_queries(Q + b * q_sample + h * q_head, at, q_row, ok, SIGN, D, DP, F32)
    dout = load_rows(DOUT + b * g_sample + h * g_head, at, g_row, ok, DV, DVP, True, F32)
    origin, delta = load_statistics(ORIGIN + (b * H + h) * NQ, DELTA + (b * H + h) * NQ, at, ok)
    k = K + b * k_sample + h // SHARE * k_head
    v = V + b * v_sample + h // SHARE * v_head
    relative = RELATIVE_TABLE + h * relative_head
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    block = b * table_sample + h * table_head + tl.program_id(0) * BM // BLOCK_Q
    dq = tl.zeros([BM, DP], tl.float32)
    idle = tl.zeros([BM], tl.float32)
    dq, _, _ = visit(
        dq, idle, idle, q, dout, origin, delta, pos, local, ok, k, v, ORIGIN, DELTA,
        FULL_LIST + block * FULL_WIDTH, FULL_COUNT + block * FULL_WIDTH, COUNTS, KEY_AT, relative,
        0, tl.load(FULL_NUM + block) * (BLOCK_K // BN), NK, 0, 1, 0, k_row, v_row, 0, 0,
        scale, reach, sample * H + head, seed, threshold, keep,
        BN, D, DP, DV, DVP, QUERIES, RAGGED, False, False, 1, BLOCK_K, 0, 0, 0, RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    dq, _, _ = visit(
        dq, idle, idle, q, dout, origin, delta, pos, local, ok, k, v, ORIGIN, DELTA,
        LIST + block * WIDTH, ENTRY + block * WIDTH, COUNTS, KEY_AT, relative,
        0, tl.load(NUM + block) * (BLOCK_K // BN), NK, 0, 1, 0, k_row, v_row, 0, 0,
        scale, reach, sample * H + head, seed, threshold, keep,
        BN, D, DP, DV, DVP, QUERIES, True, False, False, 2, BLOCK_K, BLOCK_K, 1, BLOCK_Q * BLOCK_K,
        RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    store_rows(DQ + (b * NQ * H + h) * D, at, H * D, ok, dq * softmax_scale, D, DP)


@triton.jit(do_not_specialize=ANY_VALUE)
def keys_blocks(
    Q, K, V, DOUT, ORIGIN, DELTA, DK, DV_OUT, NUM, LIST, ENTRY, FULL_NUM, FULL_LIST, FULL_COUNT, COUNTS,
    QUERY_AT, KEY_AT, SEED, RELATIVE_TABLE,
    q_sample, q_row, q_head, k_sample, k_row, k_head, v_sample, v_row, v_head, g_sample, g_row, g_head,
    table_sample, table_head, relative_head,
    NQ, NK, H, WIDTH, FULL_WIDTH, scale, softmax_scale, reach, threshold, keep,
    SHARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SIGN: tl.constexpr, RAGGED: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM rows of a key block of a TilePlan. Programs: (BM rows, kv head, sample)."""
    kv_head = tl.program_id(1)
    sample = tl.program_id(2)
    b = sample.to(tl.int64)
    row, ok, pos, local = block_rows(KEY_AT, tl.program_id(0), NK, BM, BLOCK_K, RELATIVE > 0 or DROPOUT)
    at = row.to(tl.int64)
    k = load_queries(K + b * k_sample + kv_head.to(tl.int64) * k_head, at, k_row, ok, SIGN, D, DP, F32)
    v = load_rows(V + b * v_sample + kv_head.to(tl.int64) * v_head, at, v_row, ok, DV, DVP, True, F32)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    dk = tl.zeros([BM, DP], tl.float32)
    dv = tl.zeros([BM, DVP], tl.float32)
    idle = tl.zeros([BM], tl.float32)
    for member in range(SHARE):
        head = kv_head * SHARE + member
        h = head.to(tl.int64)
        q = Q + b * q_sample + h * q_head
        dout = DOUT + b * g_sample + h * g_head
        origin = ORIGIN + (b * H + h) * NQ
        delta = DELTA + (b * H + h) * NQ
        relative = RELATIVE_TABLE + h * relative_head
        block = b * table_sample + h * table_head + tl.program_id(0) * BM // BLOCK_K
        dk, dv, _ = visit(
            dk, dv, idle, k, v, idle, idle, pos, local, ok, q, dout, origin, delta,
            FULL_LIST + block * FULL_WIDTH, FULL_COUNT + block * FULL_WIDTH, COUNTS, QUERY_AT, relative,
            0, tl.load(FULL_NUM + block) * (BLOCK_Q // BN), NQ, 0, 1, 0, q_row, g_row, 0, 0,
            scale, reach, sample * H + head, seed, threshold, keep,
            BN, D, DP, DV, DVP, KEYS, RAGGED, False, False, 1, BLOCK_Q, 0, 0, 0, RELATIVE, DROPOUT, F32, PRECISION,
        )  # fmt: skip
        dk, dv, _ = visit(
            dk, dv, idle, k, v, idle, idle, pos, local, ok, q, dout, origin, delta,
            LIST + block * WIDTH, ENTRY + block * WIDTH, COUNTS, QUERY_AT, relative,
            0, tl.load(NUM + block) * (BLOCK_Q // BN), NQ, 0, 1, 0, q_row, g_row, 0, 0,
            scale, reach, sample * H + head, seed, threshold, keep,
            BN, D, DP, DV, DVP, KEYS, True, False, False, 2, BLOCK_Q, 1, BLOCK_K, BLOCK_Q * BLOCK_K,
            RELATIVE, DROPOUT, F32, PRECISION,
        )  # fmt: skip
    kv_heads = H // SHARE
    store_rows(DK + (b * NK * kv_heads + kv_head) * D, at, kv_heads * D, ok, dk * softmax_scale, D, DP)
    store_rows(DV_OUT + (b * NK * kv_heads + kv_head) * DV, at, kv_heads * DV, ok, dv, DV, DVP)
