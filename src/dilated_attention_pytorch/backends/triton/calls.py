"""Kernel calls of a plan: which kernels on which grids, with everything that does not change from call to call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.triton.arguments import (
    Arguments,
    arithmetic,
    block_arguments,
    branch_arguments,
    document_arguments,
    power_of_two,
    strides,
    table_arguments,
)
from dilated_attention_pytorch.backends.triton.config import Blocks, TritonOptions, family_of
from dilated_attention_pytorch.backends.triton.costs import choose_split, device_named
from dilated_attention_pytorch.backends.triton.launches import (
    Launch,
    Layout,
    key_launches,
    layout_of,
    query_launches,
)
from dilated_attention_pytorch.memory import empty
from dilated_attention_pytorch.plans import Plan, StridedPlan, TilePlan
from dilated_attention_pytorch.problem import Problem


class Call(NamedTuple):
    """A kernel by its name, its grid, and the arguments that the plan decides."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Arguments


_known: WeakKeyDictionary[Plan, dict[object, tuple[Call, ...]]] = WeakKeyDictionary()
_lock = threading.Lock()


def calls(problem: Problem, plan: Plan, task: str, options: TritonOptions) -> tuple[Call, ...]:
    """The calls of a task, "forward", "queries" (dq) or "keys" (dk and dv); kept for as long as the plan lives."""
    p = problem
    with_positions = p.dropout_p > 0 or p.score is not None
    key = (task, options, p.q.dtype, arithmetic(p), p.q.shape[3], p.v.shape[3], p.kv_group, with_positions)
    with _lock:
        known = _known.setdefault(plan, {})
        if key in known:
            return known[key]
    if isinstance(plan, TilePlan):
        found = _tile_calls(p, plan, task, options)
    else:
        assert isinstance(plan, StridedPlan)
        found = _strided_calls(p, plan, task, options)
    made = tuple(call for call in found if min(call.grid) > 0)
    with _lock:
        known[key] = made
    return made


def _blocks(problem: Problem, kernel: str, options: TritonOptions) -> Blocks:
    head_dim = max(problem.q.shape[3], problem.v.shape[3])
    return options.blocks(family_of(problem.q.device), kernel, arithmetic(problem), head_dim)


def _launched_with(blocks: Blocks) -> Arguments:
    return {
        "BM": blocks.block_m,
        "BN": blocks.block_n,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _strided_calls(problem: Problem, plan: StridedPlan, task: str, options: TritonOptions) -> Iterator[Call]:
    p, branches = problem, plan.pattern.branches()
    assert branches is not None
    by_keys = task == "keys"
    fixed = branch_arguments(p, branches, by_keys)
    documents = document_arguments(p, branches, by_keys)
    for launch, blocks in _launches(p, layout_of(p, branches), task, options):
        arguments = fixed | table_arguments(launch, p.q.device) | _launched_with(blocks)
        if task == "forward":
            arguments["CARRY"] = launch.carry
        if launch.kind == "one":
            tiles, _, segments = launch.grid
            yield Call("forward_branch", (tiles, segments, p.num_heads * p.batch), arguments)
        else:
            yield Call(f"{task}_list", (len(launch.tile), launch.samples), arguments | documents)


def _launches(problem: Problem, layout: Layout, task: str, options: TritonOptions) -> Iterator[tuple[Launch, Blocks]]:
    """Forward may split branches into launches that go on from each other; gradients take all of them in one list."""
    if task != "forward":
        blocks = _blocks(problem, task, options)
        block = (blocks.block_m, blocks.block_n)
        made = key_launches(layout, block) if task == "keys" else query_launches(layout, block, only_lists=True)
        yield made[0], blocks
        return
    for i, part in enumerate(_split(problem, layout, options)):
        for kernel in ("branch", "list") if len(part) == 1 else ("list",):
            scored = problem.score is not None  # needs registers: more warps share a tile then
            blocks = _blocks(problem, "list" if scored else kernel, options)
            (launch,) = query_launches(layout, (blocks.block_m, blocks.block_n), [part], carry=i > 0)
            if kernel == "list" or launch.kind == "one":
                yield launch, blocks
                break


def _split(problem: Problem, layout: Layout, options: TritonOptions) -> tuple[tuple[int, ...], ...]:
    """The branches of each forward launch."""
    numbers = tuple(range(len(layout.branches)))
    if options.split != "auto" or len(numbers) == 1:
        return tuple((n,) for n in numbers) if options.split == "apart" else (numbers,)
    p, blocks = problem, _blocks(problem, "list", options)
    name = torch.cuda.get_device_name(p.q.device) if p.q.device.type == "cuda" else p.q.device.type
    width = power_of_two(max(p.q.shape[3], p.v.shape[3]))
    block = (blocks.block_m, blocks.block_n)
    return choose_split(layout, block, device_named(name), width, element_size=p.q.element_size())


def _tile_calls(problem: Problem, plan: TilePlan, task: str, options: TritonOptions) -> Iterator[Call]:
    p, by_keys = problem, task == "keys"
    blocks = _blocks(p, "blocks" if task == "forward" else task, options)
    own, other = reversed(plan.block_size) if by_keys else plan.block_size
    blocks = blocks._replace(block_m=min(blocks.block_m, own), block_n=min(blocks.block_n, other))
    rows, heads = (p.key_length, p.k.shape[2]) if by_keys else (p.query_length, p.num_heads)
    grid = (-(-rows // blocks.block_m), heads, p.batch)
    yield Call(f"{task}_blocks", grid, block_arguments(p, plan, by_keys) | _launched_with(blocks))


def run(kernel: Any, problem: Problem, grid: tuple[int, ...], arguments: Arguments) -> None:
    """The kernel has been started on the problem's device, with those of the arguments that it takes."""
    with _on(problem.q.device):
        kernel[grid](**chosen(kernel, arguments))


def chosen(kernel: Any, arguments: Arguments) -> Arguments:
    """Those of the arguments that the kernel takes."""
    return {name: arguments[name] for name in (*kernel.arg_names, "num_warps", "num_stages")}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device; make it the tensors' own."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


def statistics_call(problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Call:
    """The call that fills its ORIGIN and DELTA, each (B, H, Nq), with what the gradients' kernels read of every row."""
    p, dv = problem, problem.v.shape[3]
    origin, delta = (empty((p.batch, p.num_heads, p.query_length), torch.float32, p.q.device) for _ in range(2))
    arguments: Arguments = {
        "OUT": out,
        "DOUT": dout,
        "LSE": lse.contiguous(),
        "ORIGIN": origin,
        "DELTA": delta,
        **strides("o", out),
        **strides("g", dout),
        "DLSE": delta if dlse is None else dlse.contiguous(),
        "WITH_DLSE": dlse is not None,
        "NQ": p.query_length,
        "H": p.num_heads,
        "DV": dv,
        "DVP": power_of_two(dv),
        "BM": 64,
        "num_warps": 4,
        "num_stages": 1,
    }
    return Call("row_statistics", (-(-p.query_length // 64), p.num_heads, p.batch), arguments)
