"""Where dense, dilated, block-sparse and adaptive attention each win, by number of tokens and density.

The four compute different patterns with the same number of pairs (dense: all of them), so this compares seconds, not
results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.benchmark.attention import forward_run, threads, training_run
from dilated_attention_pytorch.benchmark.cases import Case
from dilated_attention_pytorch.benchmark.measure import Spread, interleaved_seconds, seconds_of
from dilated_attention_pytorch.benchmark.sparse import block_pairs
from dilated_attention_pytorch.explanation import explain
from dilated_attention_pytorch.patterns import Full, Pattern, longnet, random_blocks
from dilated_attention_pytorch.selection import MeanPooled, Selector, TopBlocks

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v and a gradient of the output."""
WAYS = ("dense", "dilated", "block-sparse", "adaptive")
WORKS = ("forward", "forward + backward")
FIGURE_DENSITY = 0.10
TIE = 1.05
"""Ways whose medians are within this factor of the fastest win with it."""


@dataclass(frozen=True)
class WinnerSizes:
    """What is compared: B 1, H heads of head dim D.

    Where dense attention is above ``too_long`` FLOPs nothing is measured, above ``once`` all ways run once, without a
    warm-up, at those densities that keep the others below ``once``.
    """

    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536)
    densities: tuple[float, ...] = (0.05, 0.10, 0.25, 0.50)
    heads: int = 4
    head_dim: int = 64
    block_size: int = 128
    thread_count: int = 2
    once: float = 9e11
    too_long: float = 5e12

    def inputs(self, tokens: int) -> Inputs:
        """q, k, v and a gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, tokens, self.heads, self.head_dim)
        q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
        return q, k, v, dout

    def dense_flops(self, tokens: int, work: str) -> float:
        """FLOPs of dense attention."""
        return Case("dense", tokens, self.heads, self.head_dim, (tokens,), (1,)).flops(work != WORKS[0])


def dilated_case(tokens: int, density: float, heads: int, head_dim: int) -> Case:
    """LongNet's branches (w, 1), (2w, 2), (4w, 4) whose pairs are nearest to ``density`` of all, w in steps of N / 256.

    Example:
        >>> case = dilated_case(16384, 0.25, 4, 64)
        >>> case.segment_lengths, case.dilation_rates, round(case.pairs / (4 * 16384**2), 3)
        ((2496, 4992, 9984), (1, 2, 4), 0.251)
    """

    def case(w: int) -> Case:
        return Case("dilated", tokens, heads, head_dim, (w, 2 * w, 4 * w), (1, 2, 4))

    step = max(1, tokens // 256)
    wanted = density * heads * tokens**2
    return min((case(w) for w in range(step, tokens + 1, step)), key=lambda c: abs(c.pairs - wanted))


def adaptive_run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, selector: Selector, budget: float, fresh: int
) -> Callable[[], object]:
    """A call that chooses blocks and attends to them, for other queries each time: no table of tiles is kept for it.

    ``fresh`` calls see new queries, later ones those again. With ``dout`` the backward pass is run, too, for queries
    that no call without it sees.
    """
    generator = torch.Generator().manual_seed(1 if dout is None else 2)
    queries = itertools.cycle([torch.randn(q.shape, generator=generator) for _ in range(fresh)])

    def run() -> None:
        mine = next(queries)
        if dout is None:
            with torch.no_grad():
                attend(mine, k, v, selector(mine, k, budget))
            return
        leaves = tuple(x.detach().requires_grad_() for x in (mine, k, v))
        out = attend(leaves[0], leaves[1], leaves[2], selector(mine, k, budget))
        torch.autograd.grad(out, leaves, dout)

    return run


def winner_steps(rounds: int, sizes: WinnerSizes = WinnerSizes()) -> int:
    """How often `measure_winners` calls its progress function."""
    return len(sizes.tokens) * len(WORKS)


def measure_winners(
    rounds: int, progress: Callable[[], object] | None = None, sizes: WinnerSizes = WinnerSizes()
) -> dict[str, Any]:
    """Milliseconds of every way on every number of tokens and density; a dictionary that JSON can hold."""
    cells: list[dict[str, Any]] = []
    with threads(sizes.thread_count):
        for tokens in sizes.tokens:
            for work in WORKS:
                cells += _cells(sizes, tokens, work, rounds)
                if progress is not None:
                    progress()
    return {
        "shape": f"B 1, H {sizes.heads}, D {sizes.head_dim}, blocks of {sizes.block_size}",
        "threads": sizes.thread_count,
        "once above TFLOP": sizes.once / 1e12,
        "cells": cells,
    }


def _cells(sizes: WinnerSizes, tokens: int, work: str, rounds: int) -> list[dict[str, Any]]:
    """One cell for each density, all measured in the same rounds; one for all where dense attention is too long."""
    place = {"tokens": tokens, "work": work}
    flops = sizes.dense_flops(tokens, work)
    if flops > sizes.too_long:
        reason = {"left out": f"too long: {flops / 1e12:.3g} TFLOP"}
        return [place | {"density": None, "held": {}, "ways": {"dense": reason}}]
    calls = 1 if flops > sizes.once else rounds + 1
    inputs = sizes.inputs(tokens)
    runs: dict[str, Callable[[], object]] = {"dense": _kept(inputs, Full(), work)}
    cells: list[dict[str, Any]] = []
    for density in sizes.densities:
        cells.append(place | {"density": density, "held": {}})
        if density * flops <= sizes.once:
            cells[-1]["held"], of_density = _runs(sizes, inputs, density, work, calls)
            runs |= {f"{way} {density}": run for way, run in of_density.items()}
    measured = interleaved_seconds(runs, rounds) if calls > 1 else {n: [seconds_of(run)] for n, run in runs.items()}
    spreads = {name: Spread.of(seconds).times(1000).to_dict() for name, seconds in measured.items()}
    for cell in cells:
        work_left = cell["density"] * flops
        few = f"less than one of {-(-tokens // sizes.block_size)} blocks"
        reason = {"left out": few if work_left <= sizes.once else f"too long: {work_left / 1e12:.3g} TFLOP"}
        cell["ways"] = {"dense": spreads["dense"]}
        cell["ways"] |= {way: spreads.get(f"{way} {cell['density']}", reason) for way in WAYS[1:]}
    return cells


def _kept(inputs: Inputs, pattern: Pattern, work: str) -> Callable[[], object]:
    """A call of `attend`, or of it and its backward pass, whose plan was made before and is kept."""
    q, k, v, dout = inputs
    explain(q.detach().requires_grad_(work != WORKS[0]), k, v, pattern)
    return forward_run(q, k, v, pattern) if work == WORKS[0] else training_run(q, k, v, dout, pattern, "auto")


def _runs(
    sizes: WinnerSizes, inputs: Inputs, density: float, work: str, calls: int
) -> tuple[dict[str, float], dict[str, Callable[[], object]]]:
    """The density that each way really has, and a call of each; without those of blocks where it is below one."""
    q, k, v, dout = inputs
    tokens, everything = q.shape[1], sizes.heads * q.shape[1] ** 2
    case = dilated_case(tokens, density, sizes.heads, sizes.head_dim)
    held = {"dense": 1.0, "dilated": case.pairs / everything}
    runs = {"dilated": _kept(inputs, longnet(case.segment_lengths, case.dilation_rates), work)}
    if density * -(-tokens // sizes.block_size) >= 1:
        layout = random_blocks(tokens, block_size=sizes.block_size, density=density, num_heads=sizes.heads)
        selector = Selector(MeanPooled(), TopBlocks(), block_size=sizes.block_size)
        held["block-sparse"] = block_pairs(layout, tokens, sizes.heads) / everything
        held["adaptive"] = selector(q, k, density).density
        runs["block-sparse"] = _kept(inputs, layout, work)
        runs["adaptive"] = adaptive_run(q, k, v, None if work == WORKS[0] else dout, selector, density, calls)
    return {way: round(share, 4) for way, share in held.items()}, runs


def fastest(cell: dict[str, Any]) -> list[str]:
    """The ways of a cell that win: the fastest, and those within a tie of it."""
    medians = {way: figures["median"] for way, figures in cell["ways"].items() if "median" in figures}
    return [way for way in WAYS if way in medians and medians[way] <= TIE * min(medians.values())]


def times_faster_by_tokens(results: dict[str, Any], density: float) -> dict[str, dict[int, float]]:
    """By way, how many times faster than dense it is forward at one density, by tokens; left out where either is."""
    found: dict[str, dict[int, float]] = {}
    for cell in results["cells"]:
        if cell["work"] != WORKS[0] or cell["density"] != density:
            continue
        medians = {way: figures["median"] for way, figures in cell["ways"].items() if "median" in figures}
        for way in WAYS[1:]:
            if way in medians and "dense" in medians:
                found.setdefault(way, {})[cell["tokens"]] = round(medians["dense"] / medians[way], 2)
    return found


def time_text(milliseconds: float) -> str:
    """A time as a cell of a table, in three digits.

    Example:
        >>> time_text(12345.6), time_text(12.345)
        ('12.3 s', '12.3 ms')
    """
    return f"{milliseconds / 1000:.3g} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


WINNER_COLUMNS = ("tokens", "density", "work", *WAYS, "fastest", "adaptive against dense")


def winner_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `WINNER_COLUMNS`; "adaptive against dense" is how many times faster it is, its selection included."""
    for cell in results["cells"]:
        shown = [
            figures["left out"] if "left out" in figures else time_text(figures["median"]) if figures else ""
            for figures in (cell["ways"].get(way, {}) for way in WAYS)
        ]
        dense, adaptive = (cell["ways"].get(way, {}).get("median") for way in ("dense", "adaptive"))
        ratio = "" if dense is None or adaptive is None else f"{dense / adaptive:.2f}"
        density = "all" if cell["density"] is None else f"{100 * cell['density']:.0f} %"
        place = (f"{cell['tokens']}", density, cell["work"])
        yield *place, *shown, ", ".join(fastest(cell)), ratio


def winner_tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]:
    """(title, columns, rows, note) of the table to show."""
    held = sorted({round(100 * cell["held"]["dilated"] / cell["density"]) for cell in results["cells"] if cell["held"]})
    about = f" with {held[0]}-{held[-1]} % of the pairs that the density asks for" if held else ""
    note = (
        f"{results['shape']}, {results['threads']} threads, medians; none is causal. They compute different patterns.\n"
        f"dense: all pairs. dilated: branches (w, 1), (2w, 2), (4w, 4){about}.\n"
        "block-sparse: random blocks, other ones for each head, the plan kept as in training.\n"
        "adaptive: blocks chosen by mean-pooled scores, for new data each time, selection and its tables included.\n"
        f"Within {100 * (TIE - 1):.0f} % of the fastest is a tie. Where dense attention is above "
        f"{results['once above TFLOP']:g} TFLOP each ran once."
    )
    return [("Where each way wins", WINNER_COLUMNS, list(winner_rows(results)), note)]
