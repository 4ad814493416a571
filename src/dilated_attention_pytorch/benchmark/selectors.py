"""Selectors: seconds of choosing over the seconds that it saves, and what is lost by computing chosen blocks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.benchmark.attention import forward_run, threads
from dilated_attention_pytorch.benchmark.heads import random_heads, trained_heads
from dilated_attention_pytorch.benchmark.measure import Spread, goal_text, seconds_of, spread_text
from dilated_attention_pytorch.benchmark.quality import (
    Layers,
    Way,
    distilled_gates,
    gated,
    judge,
    plain_ways,
    quality_columns,
    quality_rows,
)
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Causal, Full, Pattern
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import check_inputs, make_problem
from dilated_attention_pytorch.selection import (
    Antidiagonal,
    BlockScore,
    Gate,
    LastQueries,
    MeanPooled,
    MinMax,
    Selector,
    TopBlocks,
)

SHARE_GOAL = 0.15
"""Seconds of choosing, tables of tiles included, over the seconds of attention that it saves: at most."""
MOST_ROUNDS = 2
"""Rounds are long and alike: more would say little."""
SCORES: dict[str, BlockScore] = {
    "MeanPooled": MeanPooled(),
    "MinMax": MinMax(),
    "Antidiagonal": Antidiagonal(),
    "LastQueries": LastQueries(),
}
"""Scores that learn nothing; a gate is measured beside them."""
PATTERNS: dict[str, Pattern] = {"full": Full(), "causal": Causal()}


@dataclass(frozen=True)
class SelectorSizes:
    """What is timed (B 1, one budget), and what is judged: some samples of text in windows, at several budgets.

    Gates learn from ``gate_samples`` windows of half the length of the text that the model was trained on.
    """

    tokens: int = 32768
    heads: int = 8
    head_dim: int = 64
    block_size: int = 128
    budget: float = 0.10
    thread_counts: tuple[int, ...] = (1, 2)
    budgets: tuple[float, ...] = (0.05, 0.10, 0.20)
    window: int = 8192
    samples: int = 2
    gate_samples: int = 8
    gate_epochs: int = 2
    random_heads: int = 4
    random_head_dim: int = 32

    def describe(self) -> str:
        """The problem that is timed, in one line."""
        return (
            f"N {self.tokens}, H {self.heads}, D {self.head_dim}, blocks of {self.block_size}, "
            f"budget {100 * self.budget:.0f} %"
        )


def _timings(sizes: SelectorSizes) -> list[tuple[int, str]]:
    """Threads and pattern of each timing; causal on the last number of threads only."""
    return [(count, "full") for count in sizes.thread_counts] + [(sizes.thread_counts[-1], "causal")]


def selector_steps(rounds: int, sizes: SelectorSizes = SelectorSizes()) -> int:
    """How often `measure_selectors` calls its progress function, with a trained run."""
    timed = len(_timings(sizes)) * (1 + min(rounds, MOST_ROUNDS) * (len(SCORES) + 1))
    return timed + len(sizes.budgets) * (2 * len(plain_ways(SCORES, sizes.block_size)) + 1)


def measure_selectors(
    rounds: int,
    progress: Callable[[], object] | None,
    run: Path,
    sizes: SelectorSizes = SelectorSizes(),
) -> dict[str, Any]:
    """Times and qualities of every score; a dictionary that JSON can hold.

    Without a trained run its place says so.
    """
    timed: list[dict[str, Any]] = []
    for count, name in _timings(sizes):
        with threads(count):
            rows = _timed(sizes, PATTERNS[name], rounds, progress)
        timed += [{"threads": count, "pattern": name} | row for row in rows]
    return {
        "timed": sizes.describe(),
        "times": timed,
        "budgets": list(sizes.budgets),
        "judged": f"causal, blocks of {sizes.block_size}",
        "quality": _judged(sizes, run, progress),
    }


def _timed(
    sizes: SelectorSizes, pattern: Pattern, rounds: int, progress: Callable[[], object] | None
) -> list[dict[str, Any]]:
    """Seconds of choosing, of the tables, and of attention for every score, on new data each round; dense ran once."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes.tokens, sizes.heads, sizes.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    scores = SCORES | {"Gate": Gate(sizes.heads, sizes.head_dim)}  # a trained one takes as long
    selectors = {name: Selector(score, TopBlocks(), sizes.block_size) for name, score in scores.items()}
    few = q[:, : 8 * sizes.block_size]
    for selector in selectors.values():  # the first calls build and load what later ones use
        chosen_seconds(selector, few, few, few, 2, pattern)
        selector(q, k, sizes.budget, pattern)
    dense = seconds_of(forward_run(q, k, v, pattern))
    step = progress or (lambda: None)
    step()
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in selectors}
    for _ in range(min(rounds, MOST_ROUNDS)):
        for name, selector in selectors.items():
            q = torch.randn(shape, generator=generator)  # two scores may choose alike
            seconds[name].append(chosen_seconds(selector, q, k, v, sizes.budget, pattern))
            step()
    rows: list[dict[str, Any]] = []
    for name, rounds_of in seconds.items():
        parts = {
            part: Spread.of([1000 * s[i] for s in rounds_of]).to_dict()
            for i, part in enumerate(("choosing", "tables", "attention"))
        }
        rows.append(
            {
                "score": name,
                "dense, once": round(1000 * dense, 3),
                "milliseconds": parts,
                "share of what it saves": None
                if any(dense <= attention for _, _, attention in rounds_of)
                else Spread.of([(choosing + tables) / (dense - at) for choosing, tables, at in rounds_of]).to_dict(),
                "times faster than dense": Spread.of([dense / sum(s) for s in rounds_of]).to_dict(),
            }
        )
    return rows


def chosen_seconds(
    selector: Selector, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: float | int, pattern: Pattern
) -> tuple[float, float, float]:
    """Seconds of choosing blocks, of making their tables of tiles, and of attention to them.

    Tables that were made before for the same choice cost nothing: give new tensors.
    """
    found: list[Pattern] = []
    choosing = seconds_of(lambda: found.append(selector(q, k, budget, pattern)))
    scale, start = check_inputs(q, k, v)
    problem = make_problem(q, k, v, scale=scale, query_start=start)
    tables = seconds_of(lambda: candidate_plans(found[0], problem))
    with torch.no_grad():
        attention = seconds_of(lambda: attend(q, k, v, found[0]))
    return choosing, tables, attention


def _judged(sizes: SelectorSizes, run: Path, progress: Callable[[], object] | None) -> dict[str, Any]:
    """Qualities on the heads of the trained model and on random ones, or the reason why there are none."""
    quality: dict[str, Any] = {}
    try:
        layers = trained_heads(run, sizes.window, sizes.samples)
    except InvalidInput as error:
        quality["the trained model"] = {"absent": str(error)}
    else:
        learnt = trained_heads(run, layers[0][0].q.shape[1] // 2, sizes.gate_samples, held_out=False)
        gates = distilled_gates(learnt, sizes.block_size, sizes.gate_epochs)
        quality["the trained model"] = _rows_of(sizes, layers, progress, gated(gates, sizes.block_size))
    layers = random_heads(sizes.window, sizes.random_heads, sizes.random_head_dim)
    quality["random numbers"] = _rows_of(sizes, layers, progress)
    return quality


def _rows_of(sizes: SelectorSizes, layers: Layers, progress: Callable[[], object] | None, *more: Way) -> dict[str, Any]:
    _, tokens, heads, head_dim = layers[0][0].q.shape
    ways = [*plain_ways(SCORES, sizes.block_size), *more]
    return {
        "heads": f"{len(layers)} layers, {len(layers[0])} samples of {tokens} tokens, H {heads}, D {head_dim}",
        "rows": judge(layers, ways, sizes.budgets, sizes.block_size, progress),
    }


TIME_COLUMNS = (
    "pattern",
    "threads",
    "score",
    "choosing and tables / attention saved",
    "times faster than dense, everything included",
    "ms of choosing",
    "of tables",
    "of attention",
    "of dense",
)


def time_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `TIME_COLUMNS`; a goal that is not reached says so."""
    for row in results["times"]:
        share = row["share of what it saves"]  # None where attention to all pairs was as fast
        shown = (
            f"it saves nothing, goal at most {SHARE_GOAL} missed"
            if share is None
            else goal_text(share, SHARE_GOAL, at_most=True)
        )
        parts = [f"{row['milliseconds'][part]['median']:.0f}" for part in ("choosing", "tables", "attention")]
        faster = spread_text(row["times faster than dense"])
        yield row["pattern"], str(row["threads"]), row["score"], shown, faster, *parts, f"{row['dense, once']:.0f}"


def selector_tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]:
    """(title, columns, rows, note) of each table to show."""
    note = (
        f"{results['timed']}, random tensors, new ones for each call, so that no table of tiles is kept; at most "
        f"{MOST_ROUNDS} rounds: median (lowest-highest).\nDense is attend on all pairs, and ran once."
    )
    columns = quality_columns(results["budgets"])
    rows: list[tuple[str, ...]] = []
    about = []
    for name, quality in results["quality"].items():
        if "absent" in quality:
            rows.append((name, quality["absent"].partition(" (")[0], *[""] * (len(columns) - 2)))
            about.append(f"{name}: {quality['absent']}")
            continue
        rows += quality_rows(name, quality["rows"], results["budgets"])
        about.append(f"{name}: {quality['heads']}")
    return [
        ("What choosing costs", TIME_COLUMNS, list(time_rows(results)), note),
        ("What is lost, against full attention", columns, rows, _quality_note(results["judged"], about)),
    ]


def _quality_note(judged: str, about: Sequence[str]) -> str:
    return (
        f"{judged}; means over layers, samples and heads (lowest-highest). {'; '.join(about)}.\n"
        "mass recall: share of the attention mass that is computed. output error: relative L2 against full attention. "
        "Oracle: the blocks of the greatest mass, the limit of any choice.\n"
        "Gate: one for each layer, distilled for this from other text. Pooled blocks: one mean key for each block not "
        "chosen.\nMass and Threshold: their number is set so that all layers together keep the budget."
    )
