"""Block-sparse attention: useful FLOP/s over those of the dense kernel, and seconds against dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_attention_pytorch.benchmark.attention import forward_run, threads, training_run
from dilated_attention_pytorch.benchmark.baselines import ready_made_pieces
from dilated_attention_pytorch.benchmark.cases import Case
from dilated_attention_pytorch.benchmark.measure import (
    Spread,
    goal_text,
    interleaved_seconds,
    seconds_of,
    times_faster,
)
from dilated_attention_pytorch.explanation import Explanation, explain
from dilated_attention_pytorch.flops import backward_flops, forward_flops
from dilated_attention_pytorch.patterns import BlockSparse, random_blocks

RATE_GOALS = {"forward": 0.60, "forward + backward": 0.65}
"""Useful FLOP/s over the dense kernel's."""
FASTER_GOALS = {0.05: 10.0}
"""Times faster than dense attention on the same tokens, by density."""
BACKENDS = ("auto", "native", "sdpa")
TAKEN = "auto takes it"


@dataclass(frozen=True)
class SparseSizes:
    """What is measured: B 1, tokens, heads, head dim; the dense kernel runs on ``dense_tokens`` of the same heads."""

    tokens: int = 16384
    heads: int = 8
    head_dim: int = 64
    block_size: int = 128
    densities: tuple[float, ...] = (0.05, 0.10, 0.25)
    dense_tokens: int = 2048
    thread_counts: tuple[int, ...] = (1, 2)

    def describe(self) -> str:
        """The shape in one line."""
        return f"N {self.tokens}, H {self.heads}, D {self.head_dim}, blocks of {self.block_size}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and a gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.tokens, self.heads, self.head_dim)
        q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
        return q, k, v, dout

    def layout(self, density: float) -> BlockSparse:
        """Random blocks and the diagonal, other ones for each head."""
        return random_blocks(
            self.tokens, block_size=self.block_size, density=density, num_heads=self.heads, seed=round(1000 * density)
        )


def block_pairs(blocks: BlockSparse, tokens: int, heads: int) -> int:
    """Pairs that a table counts on so many tokens, over all heads; the last block may be cut short.

    Example:
        >>> block_pairs(BlockSparse(4, torch.eye(3, dtype=torch.bool)), tokens=10, heads=2)
        72
    """
    rows, columns = (
        (tokens - size * torch.arange(held)).clamp(0, size)
        for held, size in zip(blocks.layout.shape[-2:], blocks.block_size)
    )
    table = blocks.layout.long()
    repeats = heads if table.dim() == 2 or table.shape[-3] == 1 else 1
    return repeats * int((table * rows[:, None] * columns).sum())


def sparse_steps(rounds: int, sizes: SparseSizes = SparseSizes()) -> int:
    """How often `measure_sparse` calls its progress function."""
    return len(sizes.thread_counts) * (1 + len(sizes.densities))


def measure_sparse(
    rounds: int, progress: Callable[[], object] | None = None, sizes: SparseSizes = SparseSizes()
) -> dict[str, Any]:
    """Every density on every number of threads, and dense attention once on each; a dictionary that JSON can hold.

    Dense attention's backward pass runs on the last number of threads only.
    """
    inputs = sizes.inputs()
    layouts = {density: sizes.layout(density) for density in sizes.densities}
    dense: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for count in sizes.thread_counts:
        with threads(count):
            dense_runs = _dense_runs(*inputs)
            if count != sizes.thread_counts[-1]:
                del dense_runs["forward + backward"]  # it would take longer than all else
            seconds = {work: seconds_of(run) for work, run in dense_runs.items()}
            dense[str(count)] = {work: round(s, 4) for work, s in seconds.items()}
            _step(progress)
            for density, blocks in layouts.items():
                is_first = density == sizes.densities[0]  # and warms up for the others
                measured = _measured(sizes, blocks, inputs, seconds, rounds, is_first)
                runs.append({"threads": count, "density": density} | measured)
                _step(progress)
    return {
        "shape": sizes.describe(),
        "dense tokens": sizes.dense_tokens,
        "seconds of dense SDPA, once": dense,
        "runs": runs,
    }


def _step(progress: Callable[[], object] | None) -> None:
    if progress is not None:
        progress()


def _dense_runs(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Callable[[], object]]:
    """PyTorch's own attention on all pairs of the same tensors."""
    leaves = tuple(x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v))

    def forward() -> None:
        with torch.no_grad():
            scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])

    def both() -> None:
        out = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
        torch.autograd.grad(out, leaves, dout.transpose(1, 2))

    return {"forward": forward, "forward + backward": both}


def _measured(
    sizes: SparseSizes,
    blocks: BlockSparse,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dense_seconds: dict[str, float],
    rounds: int,
    warm_up: bool,
) -> dict[str, Any]:
    """Ratios of each backend on one density; plans are made before, as a layer that keeps its pattern has them."""
    q, k, v, dout = inputs
    case = Case("dense", sizes.dense_tokens, sizes.heads, sizes.head_dim, (sizes.dense_tokens,), (1,))
    explained = explain(q, k, v, blocks)
    trained = explain(q.clone().requires_grad_(), k, v, blocks)
    names = [n for n in BACKENDS if _why_not(n, explained, trained) is None]
    runs: dict[str, Callable[[], object]] = {
        "dense forward": ready_made_pieces(case, False),
        "dense forward + backward": ready_made_pieces(case, True),
    }
    for name in names:
        runs[f"{name} forward"] = forward_run(q, k, v, blocks, name)
        runs[f"{name} forward + backward"] = training_run(q, k, v, dout, blocks, name)
    seconds = interleaved_seconds(runs, rounds, warm_up=warm_up)
    pairs = block_pairs(blocks, sizes.tokens, sizes.heads)
    forward = forward_flops(pairs, sizes.head_dim, sizes.head_dim)
    flops = {"forward": forward, "forward + backward": forward + backward_flops(pairs, sizes.head_dim, sizes.head_dim)}
    backends: dict[str, Any] = {}
    for name in BACKENDS:
        if name not in names:
            backends[name] = {"absent": _why_not(name, explained, trained)}
            continue
        backends[name] = {
            work: {
                "rate / dense kernel": times_faster(seconds, f"{name} {work}", f"dense {work}")
                .times(flops[work] / case.flops("backward" in work))
                .to_dict(),
                "times faster than dense": None
                if work not in dense_seconds
                else Spread.of([dense_seconds[work] / s for s in seconds[f"{name} {work}"]]).to_dict(),
                "GFLOP/s": round(flops[work] / Spread.of(seconds[f"{name} {work}"]).median / 1e9, 1),
            }
            for work in flops
        }
    return {
        "pairs": pairs,
        "density held": round(pairs / (sizes.heads * sizes.tokens**2), 5),
        "auto takes": {"forward": explained.chosen, "forward + backward": trained.chosen},
        "backends": backends,
    }


def _why_not(name: str, forward: Explanation, training: Explanation) -> str | None:
    """Why a backend is not measured on its own: its reasons, or that auto takes it; None when it is."""
    if name == "auto":
        return None
    if forward.chosen == training.chosen == name:
        return TAKEN
    against = [f.backends.get(name, (f"there is no backend {name!r}",)) for f in (forward, training)]
    return "; ".join(dict.fromkeys(reason for reasons in against for reason in reasons)) or None


SPARSE_COLUMNS = (
    "density",
    "threads",
    "backend",
    *(f"{work} / dense kernel" for work in RATE_GOALS),
    *(f"{work}, times faster than dense SDPA" for work in RATE_GOALS),
    "GFLOP/s forward, both",
)


def sparse_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `SPARSE_COLUMNS`; a goal that is not reached says so."""
    for run in results["runs"]:
        place = (f"{100 * run['density']:.0f} %", str(run["threads"]))
        for name, figures in run["backends"].items():
            takes = sorted(set(run["auto takes"].values()))
            backend = f"auto ({', '.join(takes)})" if name == "auto" else name
            if figures.get("absent") == TAKEN:
                continue
            if "absent" in figures:
                yield *place, backend, figures["absent"], "", "", "", ""
                continue
            rates = [goal_text(of["rate / dense kernel"], RATE_GOALS[work]) for work, of in figures.items()]
            goal = FASTER_GOALS.get(run["density"])
            times = [of["times faster than dense"] for of in figures.values()]
            faster = ["" if x is None else goal_text(x, goal) for x in times]
            yield *place, backend, *rates, *faster, ", ".join(f"{of['GFLOP/s']:.0f}" for of in figures.values())


def sparse_tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]:
    """(title, columns, rows, note) of the table to show."""
    seconds = "; ".join(
        f"{count} thread{'' if count == '1' else 's'}: " + ", ".join(f"{work} {s:.1f} s" for work, s in of_work.items())
        for count, of_work in results["seconds of dense SDPA, once"].items()
    )
    note = (
        f"{results['shape']}. Useful FLOP/s over those of PyTorch's CPU flash kernel on {results['dense tokens']} "
        "tokens, within a round: median (lowest-highest).\n"
        "Random blocks and the diagonal, other ones for each head; the plan is kept, as in training.\n"
        f"Dense SDPA on all pairs ran once: {seconds}."
    )
    return [("Block-sparse attention", SPARSE_COLUMNS, list(sparse_rows(results)), note)]
