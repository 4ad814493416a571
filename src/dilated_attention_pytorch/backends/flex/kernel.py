"""One call of flex_attention on tables, eager or compiled.

Every compiled variant is `_attend` with lengths and batch size as symbols: heads, dims, dtype, scale and what score_mod
holds are constants. ``fullgraph=True`` raises where dynamo would otherwise fall back to dense eager attention.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.flex.tables import Tables
from dilated_attention_pytorch.errors import NoBackend
from dilated_attention_pytorch.problem import accumulate_dtype
from dilated_attention_pytorch.scores import Score

Rows = tuple[Tensor, Tensor]
"""Positions of the query rows and of the key rows, flat tables."""


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    *,
    scale: float,
    score: Score | None = None,
    rows: Rows | None = None,
    with_lse: bool = True,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Out (B, H, Nq, Dv) and lse (B, H, Nq), or None without it, of contiguous (B, N, H, D) tensors.

    ``rows`` is needed with a score rule. Raises NoBackend when torch gives up compiling one more variant.
    """
    given: tuple[Any, ...] = (*(x.transpose(1, 2) for x in (q, k, v)), tables, rows, score, scale, with_lse)
    if not compiled:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return _attend(*given)
    _mark(given[0], given[1], given[2], tables, (*(rows or ()), *(score.tables if score else ())))
    heads = (q.shape[2:], k.shape[2:], v.shape[2:])
    kind = "" if score is None else score.text
    holds = (tables.block_size, tables.weighted, tables.by_key is not None, scale, with_lse)
    try:
        return _compiled((q.device.type, q.dtype, heads, kind, *holds))(*given)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise NoBackend(
            f"flex: torch has compiled {torch._dynamo.config.recompile_limit} variants for heads and dims {heads} and "
            "gives up; raise torch._dynamo.config.recompile_limit, or use another backend."
        ) from error


@functools.lru_cache(maxsize=128)
def _compiled(constants: tuple[Any, ...]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`_attend` compiled for these constants; dynamo limits recompilations per code object, so each has its own."""
    code = _attend.__code__.replace(co_name=f"_attend_{abs(hash(constants))}")
    return torch.compile(types.FunctionType(code, globals(), code.co_name), fullgraph=True)


def _mark(q: Tensor, k: Tensor, v: Tensor, tables: Tables, captured: Sequence[Tensor]) -> None:
    """Tell dynamo that batch size, lengths and numbers of blocks are symbols, and sizes of captured tensors are not.

    ``dynamic=True`` would make symbols of scale and cap too, and kernels cannot hold those.
    """
    for x in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(x, (0, 2))
    for lists in (tables.by_query, tables.by_key):
        for x in () if lists is None else (lists.num, lists.idx, lists.full_num, lists.full_idx):
            torch._dynamo.maybe_mark_dynamic(x, [i for i in range(x.dim()) if i != 1])
    for x in (tables.entries, tables.strides, tables.counts, *captured):
        torch._dynamo.mark_static(x)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    rows: Rows | None,
    score: Score | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    block_q, block_k = tables.block_size
    entries, strides, counts, weighted = tables.entries, tables.strides, tables.counts, tables.weighted
    dtype = accumulate_dtype(q.dtype)

    def count(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        table = entries[b * strides[0] + h * strides[1] + i // block_q * strides[2] + j // block_k]
        return counts[(table * block_q + i % block_q) * block_k + j % block_k]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return count(b, h, i, j) > 0

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s.to(dtype)  # traced in q's dtype
        if score is not None and rows is not None:
            s = score.value(s, h, rows[0][i], rows[1][j])
        return s + count(b, h, i, j).to(dtype).log() if weighted else s

    lists, by_key = tables.by_query, tables.by_key
    mask = BlockMask.from_kv_blocks(
        lists.num,
        lists.idx,
        lists.full_num,
        lists.full_idx,
        BLOCK_SIZE=tables.block_size,
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    if by_key is not None:
        mask.q_num_blocks, mask.q_indices = by_key.num, by_key.idx
        mask.full_q_num_blocks, mask.full_q_indices = by_key.full_num, by_key.full_idx
    given: dict[str, Any] = {
        "score_mod": score_mod if weighted or score is not None else None,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if not with_lse:
        return flex_attention(q, k, v, **given), None
    out, aux = flex_attention(q, k, v, **given, return_aux=AuxRequest(lse=True))
    return out, aux.lse
