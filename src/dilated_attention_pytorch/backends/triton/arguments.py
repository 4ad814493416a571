"""What the kernels are called with: a problem's tensors, strides, numbers and switches, by the kernels' names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.triton.launches import Launch, Table
from dilated_attention_pytorch.patterns import Branch, Documents
from dilated_attention_pytorch.plans import TilePlan
from dilated_attention_pytorch.problem import Positions, Problem, positions_tensor
from dilated_attention_pytorch.scores import Relative

LOG2E = 1.4426950408889634

Arguments = dict[str, Any]


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with its last dim contiguous, copied only where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(letter: str, x: Tensor) -> Arguments:
    """The strides of (B, N, H, D), in elements, under the kernels' names."""
    sample, row, head, _ = x.stride()
    return {f"{letter}_sample": sample, f"{letter}_row": row, f"{letter}_head": head}


def common_arguments(problem: Problem, interpreted: bool) -> Arguments:
    """What every kernel but `row_statistics` takes: q, k, v, the scale, the score rule, dropout and the precision."""
    p = problem
    q, k, v = (unit_stride(x) for x in (p.q, p.k, p.v))
    d, dv = p.q.shape[3], p.v.shape[3]
    sign = (p.scale > 0) - (p.scale < 0)
    return {
        "Q": q,
        "K": k,
        "V": v,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        "NQ": p.query_length,
        "NK": p.key_length,
        "H": p.num_heads,
        "SHARE": p.kv_group,
        "scale": abs(p.scale) * LOG2E if sign else 1.0,
        "SIGN": sign,
        "D": d,
        "DP": power_of_two(d),
        "DV": dv,
        "DVP": power_of_two(dv),
        **_relative_arguments(p),
        "SEED": q if p.seed is None else p.seed,  # read with dropout only
        "DROPOUT": p.dropout_p > 0,
        "threshold": int(p.dropout_p * 2.0**32),
        "keep": 1.0 / (1.0 - p.dropout_p),
        "F32": interpreted and p.q.dtype != torch.float32,  # the interpreter's products of bfloat16 are wrong
        "PRECISION": "tf32" if arithmetic(p) == "tf32" else "ieee",
    }


def power_of_two(d: int) -> int:
    """The least power of two from 16 that holds d columns."""
    return max(16, 1 << (d - 1).bit_length())


def _relative_arguments(problem: Problem) -> Arguments:
    rule = problem.score
    if not isinstance(rule, Relative):
        return {"RELATIVE": 0, "RELATIVE_TABLE": problem.q, "relative_head": 0, "reach": 0}
    table = rule.tables[0].to(problem.q.device, torch.float32) * LOG2E
    if rule.slopes is not None:
        return {"RELATIVE": 1, "RELATIVE_TABLE": -table, "relative_head": 1, "reach": 0}
    table = table.contiguous()
    width = table.shape[1]
    return {
        "RELATIVE": 2,
        "RELATIVE_TABLE": table,
        "relative_head": 0 if table.shape[0] == 1 else width,
        "reach": width // 2,
    }


def arithmetic(problem: Problem) -> str:
    """How matrix products are computed: "half", "ieee", or "tf32" where PyTorch's own products of float32 may be."""
    if problem.q.dtype != torch.float32:
        return "half"
    nvidia = problem.q.device.type == "cuda" and torch.version.hip is None
    return "tf32" if nvidia and torch.get_float32_matmul_precision() != "highest" else "ieee"


def branch_arguments(problem: Problem, branches: tuple[Branch, ...], by_keys: bool) -> Arguments:
    """What the kernels that walk branches take besides: where rows start, padding, and which bounds exist.

    ``by_keys``: the tiles hold keys, so "behind" and "ahead" are those of queries around a key.
    """
    p = problem
    bounded = [any(b.window is not None for b in branches), any(b.is_causal or b.window is not None for b in branches)]
    behind, ahead = reversed(bounded) if by_keys else bounded
    lengths = p.key_lengths
    return {
        "QUERY_START": p.query_positions[0].start,
        "KEY_START": p.key_positions[0].start,
        "PADDED": lengths is not None,
        "KEY_LENGTH": torch.tensor([0] if lengths is None else lengths, dtype=torch.int32, device=p.q.device),
        "BEHIND": behind,
        "AHEAD": ahead,
    }


def document_arguments(problem: Problem, branches: tuple[Branch, ...], by_keys: bool) -> Arguments:
    """The table of documents: for each row of a side, where its document starts and ends (positions)."""
    documents, device = branches[0].documents, problem.q.device
    if documents is None:
        table = torch.zeros((1, 1, 2), dtype=torch.int32, device=device)
    else:
        assert isinstance(documents, Documents)
        table = document_table(documents, problem.key_positions if by_keys else problem.query_positions, device)
    return {
        "DOCUMENTS": documents is not None,
        "DOCUMENT": table,
        "document_sample": 0 if table.shape[0] == 1 else table.stride(0),
    }


def document_table(documents: Documents, positions: Positions, device: torch.device) -> Tensor:
    """(samples or 1, rows, 2), int32: the first position of each row's document and one past its last.

    Rows past the last document stand in an empty one.

    Example:
        >>> from dilated_attention_pytorch.problem import Run
        >>> document_table(Documents([2, 1]), (Run(1, 1, 3),), torch.device("cpu")).tolist()
        [[[0, 2], [2, 3], [3, 3]]]
    """
    at = positions_tensor(positions, device)
    bounds = torch.atleast_2d(documents.bounds(device))
    document, place = (x.reshape(bounds.shape[0], -1) for x in documents.locate(at))
    start = at - place
    end = torch.where(document >= 0, bounds.gather(1, document.clamp(min=0) + 1), start)
    return torch.stack((start, end), -1).to(torch.int32).contiguous()


def table_arguments(launch: Launch, device: torch.device) -> Arguments:
    """The tables of a launch on the device."""

    def put(table: Table) -> Tensor:
        return torch.from_numpy(table).to(device)

    found: Arguments = {"BRANCH": put(launch.branch), "PLACE": put(launch.offset), "branches": len(launch.branch)}
    if launch.kind == "one":
        w, r, behind, ahead = launch.branch[0].tolist()
        return {
            "PLACE": found["PLACE"],
            "segment_length": w,
            "rate": r,
            "behind": behind,
            "ahead": ahead,
            "first_segment": launch.grid[1],
        }
    return found | {"TILE": put(launch.tile), "GROUP": put(launch.group), "RESIDUE": put(launch.residue)}


def block_arguments(problem: Problem, plan: TilePlan, by_keys: bool) -> Arguments:
    """What the kernels that walk a TilePlan take besides: its tables by query block, or by key block."""
    if by_keys:
        num, idx, table = plan.q_num, plan.q_idx, plan.q_table
        full_num, full_idx, full_count = plan.full_q_num, plan.full_q_idx, plan.full_q_count
    else:
        num, idx, table = plan.kv_num, plan.kv_idx, plan.kv_table
        full_num, full_idx, full_count = plan.full_num, plan.full_idx, plan.full_count
    samples, heads, blocks = num.shape
    device, placed = problem.q.device, problem.dropout_p > 0 or problem.score is not None
    positions = [
        positions_tensor(x, device).to(torch.int32) if placed else num
        for x in (problem.query_positions, problem.key_positions)
    ]
    other = (problem.query_length, plan.block_size[0]) if by_keys else (problem.key_length, plan.block_size[1])
    return {
        "NUM": num,
        "LIST": idx,
        "ENTRY": table,
        "WIDTH": idx.shape[-1],
        "FULL_NUM": full_num,
        "FULL_LIST": full_idx,
        "FULL_COUNT": full_count,
        "FULL_WIDTH": full_idx.shape[-1],
        "COUNTS": plan.counts,
        "QUERY_AT": positions[0],
        "KEY_AT": positions[1],
        "table_sample": 0 if samples == 1 else heads * blocks,
        "table_head": 0 if heads == 1 else blocks,
        "BLOCK_Q": plan.block_size[0],
        "BLOCK_K": plan.block_size[1],
        "RAGGED": other[0] % other[1] != 0,
    }
