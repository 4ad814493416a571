"""A grid of problems on which auto is compared with every backend that can: how far it is behind the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.benchmark.measure import (
    Spread,
    interleaved_seconds,
    seconds_of,
    spread_text,
    times_faster,
)
from dilated_attention_pytorch.explanation import explain
from dilated_attention_pytorch.patterns import Causal, Documents, Full, Pattern, Window, longnet

BEHIND = 0.90
"""Auto is flagged where it reaches less than this share of the best backend's speed."""
FAR = 4.0
"""A backend that takes so many times the seconds of the fastest so far is timed once and not run again."""
FAR_WORK = 3
FAR_PAIRS = 1 << 23
"""`dense` is not run on more pairs than this when they are FAR_WORK times those of the pattern."""
ROUND_SECONDS = 5e-3


@dataclass(frozen=True)
class Shape:
    """One problem of the grid: B, queries, keys, H, kv heads, D, a pattern, and whether gradients are asked for."""

    name: str
    pattern: Pattern
    keys: int
    heads: int
    head_dim: int
    batch: int = 1
    queries: int | None = None
    kv_heads: int | None = None
    dtype: torch.dtype = torch.float32
    training: bool = False
    visible: tuple[float, ...] = field(default=())
    """Share of the keys that is no padding, for each sample."""

    def describe(self) -> str:
        """The shape in one line."""
        words = [
            f"B {self.batch}" if self.batch > 1 else "",
            f"Nq {self.queries}" if self.queries else "",
            f"N {self.keys}, H {self.heads}",
            f"Hkv {self.kv_heads}" if self.kv_heads else "",
            f"D {self.head_dim}",
            str(self.dtype).removeprefix("torch."),
            "training" if self.training else "forward",
        ]
        return ", ".join(word for word in words if word)

    def inputs(self) -> tuple[list[Tensor], Tensor | None]:
        """q, k, v, which ask for gradients when training, and the padding mask."""
        generator = torch.Generator().manual_seed(0)
        kv_heads, queries = self.kv_heads or self.heads, self.queries or self.keys
        sizes = ((queries, self.heads), (self.keys, kv_heads), (self.keys, kv_heads))
        tensors = [torch.randn(self.batch, n, h, self.head_dim, generator=generator).to(self.dtype) for n, h in sizes]
        if self.training:
            tensors = [x.requires_grad_() for x in tensors]
        mask = None
        if self.visible:
            lengths = torch.tensor([math.ceil(share * self.keys) for share in self.visible])
            mask = torch.arange(self.keys) >= lengths[:, None]
        return tensors, mask


_SHORT, _LONG = longnet([256, 512, 1024], [1, 2, 4]), longnet([2048, 4096, 8192], [1, 2, 4])
_BYTES = longnet([128, 512, 2048], [1, 4, 16]) & Causal()  # the branches of a small language model
_PARTS = Documents([900, 3000, 196, 2500, 1596])

GRID: tuple[Shape, ...] = (
    Shape("decode, causal", Causal(), 2048, 8, 64, queries=1),
    Shape("decode, longnet", _LONG & Causal(), 16384, 8, 64, queries=1),
    Shape("very short, causal", Causal(), 64, 4, 32),
    Shape("very short, longnet", longnet([16, 64], [1, 4]), 100, 8, 64, batch=4),
    Shape("very short, training", longnet([32, 128], [1, 2]) & Causal(), 128, 4, 32, batch=4, training=True),
    Shape("short, full", Full(), 512, 8, 64),
    Shape("short, longnet", longnet([128, 512], [1, 4]) & Causal(), 512, 8, 64, training=True),
    Shape("medium, causal", Causal(), 2048, 8, 64),
    Shape("medium, causal, training", Causal(), 2048, 4, 128, training=True),
    Shape("medium, window", Window(128) & Causal(), 4096, 8, 64),
    Shape("medium, bytes", _BYTES, 4096, 4, 32, training=True),
    Shape("documents", _PARTS.of(Causal()), 8192, 4, 64),
    Shape("documents, longnet", _PARTS.of(_SHORT & Causal()), 8192, 4, 64, training=True),
    Shape("padded", _SHORT, 4096, 4, 64, batch=3, visible=(1.0, 0.7, 0.25)),
    Shape("grouped heads", _SHORT & Causal(), 8192, 8, 64, kv_heads=2),
    Shape("long, short segments", _SHORT, 32768, 4, 32),
    Shape("long, short segments, training", _SHORT, 16384, 4, 48, training=True),
    Shape("long, long segments", _LONG, 16384, 6, 64),
    Shape("long, long segments, bfloat16", _LONG & Causal(), 16384, 4, 128, dtype=torch.bfloat16),
    Shape("long, head dim 128, training", _LONG & Causal(), 8192, 2, 128, training=True),
)


def runs_of(shape: Shape) -> tuple[dict[str, Callable[[], object]], str]:
    """A call of `attend` for auto and for each backend that can and is not far off, by name; and what auto takes."""
    (q, k, v), mask = shape.inputs()
    dout = torch.randn(shape.batch, shape.queries or shape.keys, shape.heads, shape.head_dim).to(shape.dtype)

    def run(name: str) -> Callable[[], object]:
        def once() -> None:
            with torch.set_grad_enabled(shape.training):
                out = attend(q, k, v, shape.pattern, key_padding_mask=mask, backend=name)
            if shape.training:
                torch.autograd.grad(out, (q, k, v), dout)

        return once

    auto = explain(q, k, v, shape.pattern, key_padding_mask=mask)
    pairs = shape.batch * shape.heads * (shape.queries or shape.keys) * shape.keys
    dense_is_far = pairs > FAR_PAIRS and pairs > FAR_WORK * auto.pairs
    names = [name for name, against in auto.backends.items() if not against and not (name == "dense" and dense_is_far)]
    runs = {name: run(name) for name in ("auto", *names)}
    return runs, f"{auto.chosen}, {auto.chosen_plan}"


def one_call(run: Callable[[], object]) -> float:
    """Seconds of a call, the better of two after one that warms up."""
    run()
    return min(seconds_of(run) for _ in range(2))


def _repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def measure_shape(shape: Shape, rounds: int) -> dict[str, Any]:
    """Auto against every backend on one shape; ``auto / best`` is taken round by round, 1 is as fast as the best."""
    runs, chosen = runs_of(shape)
    once = {name: one_call(run) for name, run in runs.items()}
    fastest = min(once.values())
    repeats = max(1, round(ROUND_SECONDS / fastest))
    always = ("auto", chosen.partition(",")[0])
    near = {name: run for name, run in runs.items() if name in always or once[name] <= FAR * fastest}
    measured = interleaved_seconds({name: _repeated(run, repeats) for name, run in near.items()}, rounds)
    spreads = {name: Spread.of([1e3 * s / repeats for s in figures]) for name, figures in measured.items()}
    best = min((name for name in spreads if name != "auto"), key=lambda name: spreads[name].median)
    ratio = times_faster(measured, "auto", best)
    return {
        "shape": shape.describe(),
        "pattern": shape.pattern.text(),
        "auto takes": chosen,
        "best": best,
        "auto / best": ratio.to_dict(),
        "behind": best not in always and ratio.median < BEHIND,  # by its own backend's name the same call is made
        "milliseconds": {name: spread.to_dict() for name, spread in spreads.items()},
        "far behind, one call": {name: round(1e3 * s, 3) for name, s in once.items() if name not in near},
    }


def measure_grid(
    rounds: int, progress: Callable[[], object] | None = None, shapes: Sequence[Shape] = GRID
) -> dict[str, Any]:
    """Every shape of the grid, by name; ``progress`` is called after each."""
    results: dict[str, Any] = {}
    for shape in shapes:
        results[shape.name] = measure_shape(shape, rounds)
        if progress is not None:
            progress()
    return {
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "shapes": results,
        "behind": [name for name, figures in results.items() if figures["behind"]],
        "absent": {b.name: b.import_error() for b in BACKENDS if b.import_error() is not None},
    }


GRID_COLUMNS = ("problem", "auto takes", "auto / best", "best", "milliseconds of each", "")


def grid_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each shape; the last cell flags where auto is more than 10 % behind the best."""
    rows: list[tuple[str, ...]] = []
    for name, figures in results["shapes"].items():
        ratio = figures["auto / best"]
        times = [f"{n} {s['median']:.3g}" for n, s in figures["milliseconds"].items()]
        times += [f"{n} {s:.3g} (once)" for n, s in figures["far behind, one call"].items()]
        rows.append(
            (
                f"{name}: {figures['shape']}",
                figures["auto takes"],
                spread_text(ratio),
                figures["best"],
                ", ".join(times),
                "BEHIND" if figures["behind"] else "",
            )
        )
    return rows
