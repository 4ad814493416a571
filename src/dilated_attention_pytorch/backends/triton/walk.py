# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-untyped,import-not-found"
"""The walk that every kernel shares: rows of a tile over documents, branches, segments and blocks of the other side.

Legend: a tile holds BM rows of its own side, at positions `pos`; the other side is visited BN rows at a time. MODE says
what is summed: FORWARD (rows are queries: running maximum, sum and weighted values), QUERIES (rows are queries: dq) or
KEYS (rows are keys, the other side is queries: dk and dv). D and DV are head dims, DP and DVP the powers of two that
hold them. Positions and lengths are int32 below FAR; offsets in memory are int64. Logits are in powers of two.

Which keys a row sees is worked out here, from positions and the branch table alone. A plan only says which rows stand
together in a tile: a poor plan is slow, never wrong. Numbers are divided only where they are not negative: on others
the interpreter floors and the compiler truncates.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORWARD = tl.constexpr(0)
QUERIES = tl.constexpr(1)
KEYS = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 29)


@triton.jit
def load_rows(base, at, stride, held, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, F32: tl.constexpr):
    """Rows `at` of a matrix: (len(at), DP), zero past column D and, with MASKED, where `held` is False."""
    d = tl.arange(0, DP)
    places = base + at[:, None] * stride + d[None, :]
    if MASKED:
        x = tl.load(places, mask=held[:, None] & (d[None, :] < D), other=0.0)
    elif DP > D:
        x = tl.load(places, mask=d[None, :] < D, other=0.0)
    else:
        x = tl.load(places)
    if F32:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(base, at, stride, held, x, D: tl.constexpr, DP: tl.constexpr):
    """Columns below D of x stand in the rows that are held, in the dtype of the memory."""
    d = tl.arange(0, DP)
    places = base + at[:, None] * stride + d[None, :]
    tl.store(places, x.to(base.dtype.element_ty), mask=held[:, None] & (d[None, :] < D))


@triton.jit
def relative_logits(i, j, relative, reach, RELATIVE: tl.constexpr):
    """What a Relative rule adds between query positions i and key positions j.

    `relative` points at the head's numbers: (1) what one token of distance adds, (2) a table from -reach to reach.
    """
    if RELATIVE == 1:
        added = tl.abs((i - j).to(tl.float32)) * tl.load(relative)
    else:
        added = tl.load(relative + tl.minimum(tl.maximum(i - j, -reach), reach) + reach)
    return added


@triton.jit
def kept_pairs(seed, threshold, row, i, j):
    """Which pairs dropout keeps: word 0 of Philox-4x32-10 at (i, j, row, 0), as dropout.py draws it."""
    zero = i * 0 + j * 0
    word, _, _, _ = tl.philox(seed, i + zero, j + zero, row + zero, zero)
    return word >= threshold.to(tl.uint32)


@triton.jit
def visit(
    a1, a2, a3, x1, x2, r1, r2, pos, local, row_ok, Y1, Y2, ORIGIN, DELTA, LIST, ENTRY, COUNTS, PLACES, RELATIVE_TABLE,
    begin, steps, end, first, step, other_start, stride1, stride2, behind, ahead,
    scale, reach, row, seed, threshold, keep,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, MODE: tl.constexpr,
    MASKED: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr,
    LOCAL_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr, ENTRY_SIZE: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of a tile, further by `steps` blocks of BN rows of the other side. This is the only key loop there is.

    Without TABLE the blocks hold places n = begin, begin + 1, ... below `end`, standing at positions first + n * step.
    With TABLE they are the blocks of BLOCK rows that LIST names; ENTRY is the one count of each (TABLE 1), or names its
    table in COUNTS (TABLE 2), where the tile's rows are `local`.
    """
    column = tl.arange(0, BN)
    # A row sees places from its floor to its limit. Rows that this is not for, and places that are not there, lie
    # beyond any bound that exists: one comparison for each pair and bound.
    limit = tl.where(row_ok, pos + ahead, -1)
    floor = tl.where(row_ok, pos - behind, 2 * FAR)
    for t in range(steps):
        if TABLE == 0:
            n = begin + t * BN + column
            place = first + n * step
            at = (place - other_start).to(tl.int64)
        else:
            item = t // (BLOCK // BN)
            inner = t % (BLOCK // BN) * BN + column
            n = tl.load(LIST + item) * BLOCK + inner
            at = n.to(tl.int64)
            place = n
        held = n < end
        if TABLE > 0 and (RELATIVE > 0 or DROPOUT):
            place = tl.load(PLACES + n, mask=held, other=0)
        y1 = load_rows(Y1, at, stride1, held, D, DP, MASKED, F32)
        y2 = load_rows(Y2, at, stride2, held, DV, DVP, MASKED, F32)

        s = tl.dot(x1, tl.trans(y1), input_precision=PRECISION)
        unit = scale
        shift = 0.0
        if RELATIVE > 0:
            if MODE == KEYS:
                s = s * scale + relative_logits(place[None, :], pos[:, None], RELATIVE_TABLE, reach, RELATIVE)
            else:
                s = s * scale + relative_logits(pos[:, None], place[None, :], RELATIVE_TABLE, reach, RELATIVE)
            unit = 1.0
        elif TABLE == 2:
            s = s * scale
            unit = 1.0
        if TABLE == 1:
            shift = tl.log2(tl.load(ENTRY + item).to(tl.float32))
        if TABLE == 2:
            table = COUNTS + tl.load(ENTRY + item) * ENTRY_SIZE
            count = tl.load(table + local[:, None] * LOCAL_STEP + inner[None, :] * COLUMN_STEP)
            s += tl.log2(count.to(tl.float32))
        if MASKED:
            if AHEAD:
                seen = tl.where(held, place, 2 * FAR)[None, :] <= limit[:, None]
                if BEHIND:
                    seen = seen & (place[None, :] >= floor[:, None])
            elif BEHIND:
                seen = tl.where(held, place, -2 * FAR)[None, :] >= floor[:, None]
            else:
                seen = held[None, :] & row_ok[:, None]
            s = tl.where(seen, s, float("-inf"))  # before the row maximum
        if DROPOUT:
            if MODE == KEYS:
                kept = kept_pairs(seed, threshold, row, place[None, :], pos[:, None])
            else:
                kept = kept_pairs(seed, threshold, row, pos[:, None], place[None, :])

        if MODE == FORWARD:
            top = tl.where(row_ok, tl.maximum(a2, tl.max(s, 1) * unit + shift), a2)
            # A row that this block is not for, or that saw nothing yet, gets weights 0 at no cost per pair.
            origin = tl.where(row_ok & (top > float("-inf")), top, float("inf"))
            decay = tl.where(a2 == top, 1.0, tl.exp2(a2 - top))
            p = tl.exp2(s * unit - (origin - shift)[:, None])
            a3 = a3 * decay + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(kept, p * keep, 0.0)
            a1 = a1 * decay[:, None]
            a1 = tl.dot(p.to(y2.dtype), y2, a1, input_precision=PRECISION)
            a2 = top
        else:
            dp = tl.dot(x2, tl.trans(y2), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(kept, dp * keep, 0.0)
            if MODE == QUERIES:
                p = tl.exp2(s * unit - (r1 - shift)[:, None])
                ds = p * (dp - r2[:, None])
            else:
                if MASKED:
                    origin = tl.load(ORIGIN + at, mask=held, other=float("inf"))
                    delta = tl.load(DELTA + at, mask=held, other=0.0)
                else:
                    origin = tl.load(ORIGIN + at)
                    delta = tl.load(DELTA + at)
                p = tl.exp2(s * unit - (origin - shift)[None, :])
                ds = p * (dp - delta[None, :])
                if DROPOUT:
                    p = tl.where(kept, p * keep, 0.0)
                a2 = tl.dot(p.to(y2.dtype), y2, a2, input_precision=PRECISION)
            a1 = tl.dot(ds.to(y1.dtype), y1, a1, input_precision=PRECISION)
    return a1, a2, a3


@triton.jit
def ceil_div(x, r):
    """The least n >= 0 with n * r >= x."""
    return (tl.maximum(x, 0) + r - 1) // r


@triton.jit
def visit_segment(
    a1, a2, a3, x1, x2, r1, r2, pos, row_ok, whole, low, high, base, stop, Y1, Y2, ORIGIN, DELTA, RELATIVE_TABLE,
    step, behind, ahead, other_start, other_end, stride1, stride2, scale, reach, row, seed, threshold, keep,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, MODE: tl.constexpr,
    BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of a tile, further by the other side's places of one segment: base, base + step, ... before `stop`.

    Only the rows of `row_ok`, which stand at positions from low to high, are on this grid; `whole` says that all are.
    A row sees `behind` tokens before it and `ahead` after it. Blocks that all rows see throughout skip the masks.
    """
    begin = ceil_div(other_start - base, step)
    end = ceil_div(tl.minimum(stop, other_end) - base, step)
    full_begin = begin
    full_end = end
    if BEHIND:
        begin = tl.maximum(begin, ceil_div(low - behind - base, step))
        full_begin = tl.maximum(begin, ceil_div(high - behind - base, step))
    if AHEAD:
        end = tl.minimum(end, tl.maximum(high + ahead - base + step, 0) // step)
        full_end = tl.minimum(end, tl.maximum(low + ahead - base + step, 0) // step)
    edge = tl.maximum(full_begin - begin + BN - 1, 0) // BN  # blocks that some row does not reach back to
    full = tl.maximum(full_end - begin - edge * BN, 0) // BN
    if MODE == KEYS:  # foreign rows are rows of the sums there, so their weights must be masked
        full = tl.where(whole, full, 0)
    if BEHIND:
        edge = tl.minimum(edge, tl.maximum(end - begin + BN - 1, 0) // BN)
        a1, a2, a3 = visit(
            a1, a2, a3, x1, x2, r1, r2, pos, pos, row_ok, Y1, Y2, ORIGIN, DELTA, Y1, Y1, Y1, Y1, RELATIVE_TABLE,
            begin, edge, end, base, step, other_start, stride1, stride2, behind, ahead,
            scale, reach, row, seed, threshold, keep,
            BN, D, DP, DV, DVP, MODE, True, BEHIND, AHEAD, 0, BN, 0, 0, 0, RELATIVE, DROPOUT, F32, PRECISION,
        )  # fmt: skip
        begin += edge * BN
    a1, a2, a3 = visit(
        a1, a2, a3, x1, x2, r1, r2, pos, pos, row_ok, Y1, Y2, ORIGIN, DELTA, Y1, Y1, Y1, Y1, RELATIVE_TABLE,
        begin, full, end, base, step, other_start, stride1, stride2, behind, ahead,
        scale, reach, row, seed, threshold, keep,
        BN, D, DP, DV, DVP, MODE, False, False, False, 0, BN, 0, 0, 0, RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip
    begin += full * BN
    rest = tl.maximum(end - begin + BN - 1, 0) // BN
    return visit(
        a1, a2, a3, x1, x2, r1, r2, pos, pos, row_ok, Y1, Y2, ORIGIN, DELTA, Y1, Y1, Y1, Y1, RELATIVE_TABLE,
        begin, rest, end, base, step, other_start, stride1, stride2, behind, ahead,
        scale, reach, row, seed, threshold, keep,
        BN, D, DP, DV, DVP, MODE, True, BEHIND, AHEAD, 0, BN, 0, 0, 0, RELATIVE, DROPOUT, F32, PRECISION,
    )  # fmt: skip


@triton.jit
def visit_document(
    a1, a2, a3, x1, x2, r1, r2, pos, ok, origin, end, low, high, Y1, Y2, ORIGIN, DELTA, BRANCH, PLACE, RELATIVE_TABLE,
    branches, other_start, other_end, stride1, stride2, scale, reach, row, seed, threshold, keep,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, MODE: tl.constexpr,
    BEHIND: tl.constexpr, AHEAD: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of a tile, further by every branch inside the document at origin <= p < end.

    BRANCH holds (segment length, rate, tokens seen behind, tokens seen ahead) of each branch as queries see keys; PLACE
    the head's place in each branch's grid, -1 where the head does not run it. Rows stand from low to high.
    """
    for b in range(branches):
        w = tl.load(BRANCH + 4 * b)
        r = tl.load(BRANCH + 4 * b + 1)
        behind = tl.load(BRANCH + 4 * b + 2)
        ahead = tl.load(BRANCH + 4 * b + 3)
        c = tl.load(PLACE + b)
        if MODE == KEYS:  # a key is seen from so far behind and ahead
            behind, ahead = ahead, behind
        on_grid = ok & (pos >= origin) & (pos < end) & (tl.maximum(pos - origin, 0) % w % r == c)
        some = tl.max(on_grid.to(tl.int32), 0)
        every = tl.min(on_grid.to(tl.int32), 0)
        first = (tl.maximum(low, origin) - origin) // w
        last = (tl.minimum(high, end - 1) - origin) // w
        for segment in range(first, tl.where(some > 0, last + 1, first)):
            start = origin + segment * w
            stop = tl.minimum(start + w, end)
            row_ok = on_grid & (pos >= start) & (pos < stop)
            whole = (every > 0) & (low >= start) & (high < stop)
            if MODE == QUERIES:
                origins = tl.where(row_ok, r1, float("inf"))  # foreign rows get weights 0
            else:
                origins = r1
            a1, a2, a3 = visit_segment(
                a1, a2, a3, x1, x2, origins, r2, pos, row_ok, whole, tl.maximum(low, start), tl.minimum(high, stop - 1),
                start + c, stop, Y1, Y2, ORIGIN, DELTA, RELATIVE_TABLE,
                r, behind, ahead, other_start, other_end, stride1, stride2, scale, reach, row, seed, threshold, keep,
                BN, D, DP, DV, DVP, MODE, BEHIND, AHEAD, RELATIVE, DROPOUT, F32, PRECISION,
            )  # fmt: skip
    return a1, a2, a3


@triton.jit
def visit_all(
    a1, a2, a3, x1, x2, r1, r2, pos, ok, low, high, Y1, Y2, ORIGIN, DELTA, BRANCH, PLACE, DOCUMENT, RELATIVE_TABLE,
    branches, own_start, other_start, other_end, stride1, stride2, scale, reach, row, seed, threshold, keep,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, MODE: tl.constexpr,
    BEHIND: tl.constexpr, AHEAD: tl.constexpr, DOCUMENTS: tl.constexpr,
    RELATIVE: tl.constexpr, DROPOUT: tl.constexpr, F32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of a tile over everything that its rows see: document by document where there are documents.

    DOCUMENT holds (first, one past the last) position of the document of each row of the tile's side; empty documents
    are those of rows past the last one. Rows without `ok` see nothing.
    """
    if DOCUMENTS:
        origin = tl.load(DOCUMENT + 2 * (low - own_start))
        while origin <= high:
            end = tl.load(DOCUMENT + 2 * (tl.maximum(origin, low) - own_start) + 1)
            a1, a2, a3 = visit_document(
                a1, a2, a3, x1, x2, r1, r2, pos, ok, origin, end, low, high, Y1, Y2, ORIGIN, DELTA, BRANCH, PLACE,
                RELATIVE_TABLE, branches, other_start, other_end, stride1, stride2, scale, reach, row, seed, threshold,
                keep, BN, D, DP, DV, DVP, MODE, BEHIND, AHEAD, RELATIVE, DROPOUT, F32, PRECISION,
            )  # fmt: skip
            origin = tl.where(end > origin, end, high + 1)
    else:
        a1, a2, a3 = visit_document(
            a1, a2, a3, x1, x2, r1, r2, pos, ok, 0, FAR, low, high, Y1, Y2, ORIGIN, DELTA, BRANCH, PLACE,
            RELATIVE_TABLE, branches, other_start, other_end, stride1, stride2, scale, reach, row, seed, threshold,
            keep, BN, D, DP, DV, DVP, MODE, BEHIND, AHEAD, RELATIVE, DROPOUT, F32, PRECISION,
        )  # fmt: skip
    return a1, a2, a3
