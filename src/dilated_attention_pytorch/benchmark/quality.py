"""What is lost by computing chosen blocks only: attention mass that they hold, and error of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.benchmark.heads import Heads
from dilated_attention_pytorch.patterns import Causal, Pattern, local_window
from dilated_attention_pytorch.patterns.base import dense_counts
from dilated_attention_pytorch.selection import (
    AdaptiveDilation,
    BlockScore,
    Mass,
    MeanPooled,
    Oracle,
    Rule,
    SelectedTiles,
    Selector,
    Threshold,
    TopBlocks,
)
from dilated_attention_pytorch.selection.coarse import attend_with_coarse
from dilated_attention_pytorch.selection.distillation import distil
from dilated_attention_pytorch.selection.gate import Gate

CALIBRATIONS, CALIBRATED_UP_TO = 10, 20.0
"""Halvings of the range in which a number is searched that makes a rule keep the share of pairs asked for."""

GATE_LEARNING_RATE = 1e-2

Layers = Sequence[Sequence[Heads]]
"""Heads by layer, and by sample."""
Choose = Callable[[int, Heads], Pattern]
"""From a layer's number and its heads to the pattern of what is computed."""


class Result(NamedTuple):
    """An output, and the log of the softmax denominator over exactly computed pairs, where recall is to be told."""

    out: Tensor  # (B, N, H, D)
    lse: Tensor | None  # (B, H, N)


@dataclass(frozen=True)
class Way:
    """One row: how blocks are judged and chosen, and how a choice is computed.

    ``prepare(layers, budget)`` gives the choice for a budget; whatever it learns or calibrates happens there.
    """

    score: str
    rule: str
    lookahead: bool
    prepare: Callable[[Layers, float], Choose]
    compute: Callable[[Heads, Pattern], Result]


def chosen_only(heads: Heads, chosen: Pattern) -> Result:
    """Attention to what is chosen, and nothing else."""
    with torch.no_grad():
        return Result(*attend(heads.q, heads.k, heads.v, chosen, return_lse=True))


def top_blocks(name: str, score: BlockScore, block_size: int, lookahead: bool) -> Way:
    """The blocks of the highest scores, causal."""
    selector = Selector(score, TopBlocks(), block_size=block_size, lookahead=lookahead)

    def prepare(layers: Layers, budget: float) -> Choose:
        return lambda layer, heads: selector(heads.q, heads.k, budget, Causal())

    return Way(name, "TopBlocks", lookahead, prepare, chosen_only)


def calibrated(name: str, rule: Callable[[float], Rule], block_size: int, lookahead: bool) -> Way:
    """Mean-pooled scores and a rule of a number from 0 to `CALIBRATED_UP_TO`, the greater the more blocks it keeps.

    The number is searched with which all layers and samples together keep the budget.
    """
    selector = Selector(MeanPooled(), TopBlocks(), block_size=block_size, lookahead=lookahead)

    def with_number(x: float) -> Choose:
        mine = replace(selector, rule=rule(x))
        return lambda layer, heads: mine(heads.q, heads.k, None, Causal())

    def prepare(layers: Layers, budget: float) -> Choose:
        low, high = 0.0, CALIBRATED_UP_TO
        for _ in range(CALIBRATIONS):
            middle = (low + high) / 2
            choose = with_number(middle)
            held = [held_share(choose(i, heads), heads, block_size) for i, of in enumerate(layers) for heads in of]
            low, high = (middle, high) if sum(held) / len(held) < budget else (low, middle)
        return with_number((low + high) / 2)

    return Way("MeanPooled", name, lookahead, prepare, chosen_only)


def with_coarse(way: Way) -> Way:
    """The same choice, and a pooled key for each block that was not chosen; its recall is not told."""

    def compute(heads: Heads, chosen: Pattern) -> Result:
        assert isinstance(chosen, SelectedTiles)
        with torch.no_grad():
            return Result(attend_with_coarse(heads.q, heads.k, heads.v, chosen), None)

    return replace(way, rule=f"{way.rule} + pooled blocks", compute=compute)


def adaptive_dilation(block_size: int) -> Way:
    """Dilation rates by how fast queries change; tau is twice the mean of that over each layer's blocks."""

    def prepare(layers: Layers, budget: float) -> Choose:
        plain = AdaptiveDilation(block_size)
        means = [torch.stack([plain.density(heads.q).mean() for heads in of]).mean() for of in layers]
        tuned = [replace(plain, tau=2 * float(mean)) for mean in means]
        return lambda layer, heads: tuned[layer](heads.q, heads.k, budget, Causal())

    return Way("change of queries", "AdaptiveDilation", False, prepare, chosen_only)


def distilled_gates(layers: Layers, block_size: int, epochs: int) -> list[Gate]:
    """A gate for each layer, trained by distillation on its heads, so often on each sample."""
    gates = []
    for of in layers:
        (_, _, heads, head_dim), kv_heads = of[0].q.shape, of[0].k.shape[2]
        gate = Gate(heads, head_dim, kv_heads=kv_heads)
        batches = [(sample.q, sample.k) for sample in of] * epochs
        distil(gate, batches, Causal(), block_size=block_size, learning_rate=GATE_LEARNING_RATE)
        gates.append(gate)
    return gates


def gated(gates: Sequence[Gate], block_size: int) -> Way:
    """The blocks that the gate of each layer rates highest, causal."""
    selectors = [Selector(gate, TopBlocks(), block_size=block_size) for gate in gates]

    def prepare(layers: Layers, budget: float) -> Choose:
        return lambda layer, heads: selectors[layer](heads.q, heads.k, budget, Causal())

    return Way("Gate", "TopBlocks", False, prepare, chosen_only)


def window_only(block_size: int) -> Way:
    """The last blocks before each, whatever the heads hold: what a choice has to beat."""

    def prepare(layers: Layers, budget: float) -> Choose:
        def choose(layer: int, heads: Heads) -> Pattern:
            n = heads.q.shape[1]
            return local_window(n, block_size=block_size, window=max(1, round(budget * n / 2))) & Causal()

        return choose

    return Way("none", "local window", False, prepare, chosen_only)


def plain_ways(scores: dict[str, BlockScore], block_size: int) -> list[Way]:
    """A row for each score, causal and with lookahead, for each rule, for coarse levels, and the oracle."""
    ways = [window_only(block_size), adaptive_dilation(block_size)]
    ways += [
        top_blocks(name, score, block_size, lookahead) for lookahead in (False, True) for name, score in scores.items()
    ]
    ways.append(with_coarse(top_blocks("MeanPooled", MeanPooled(), block_size, lookahead=False)))
    ways.append(calibrated("Mass", lambda x: Mass(1 - 2**-x), block_size, lookahead=False))
    ways.append(calibrated("Threshold", lambda x: Threshold(2**-x), block_size, lookahead=False))
    ways.append(top_blocks("Oracle", Oracle(), block_size, lookahead=True))
    return ways


def held_share(chosen: Pattern, heads: Heads, block_size: int) -> float:
    """Share of the pairs visible under causality that are chosen, told by the middle row of every block of queries.

    Example:
        >>> held_share(Causal(), Heads(*[torch.zeros(1, 64, 2, 4)] * 3), 16)
        1.0
    """
    (_, n, num_heads, _), head = heads.q.shape, torch.arange(heads.q.shape[2]).view(-1, 1, 1)
    rows = torch.arange((block_size - 1) // 2, n, block_size).view(-1, 1)
    counts = dense_counts(chosen, head, num_heads, rows, torch.arange(n))
    return float((counts > 0).sum()) / (counts.numel() // (len(rows) * n) * int((rows + 1).sum()))


def judge(
    layers: Layers,
    ways: Sequence[Way],
    budgets: Sequence[float],
    block_size: int,
    progress: Callable[[], object] | None = None,
) -> list[dict[str, Any]]:
    """For every way and budget: share of pairs held, mass recall and output error, over layers, samples and heads.

    A budget below one block has none of them.

    The recall of a head is the mean over its rows of ``exp(lse of what was computed - lse of all)``, its error the
    norm of the difference of outputs over the norm of full causal attention's.
    """
    full = [[chosen_only(heads, Causal()) for heads in of] for of in layers]
    rows: list[dict[str, Any]] = []
    step = progress or (lambda: None)
    for way in ways:
        for budget in budgets:
            row = {"score": way.score, "rule": way.rule, "lookahead": way.lookahead, "budget": budget}
            if budget * -(-layers[0][0].q.shape[1] // block_size) < 1:
                rows.append(row | {"held": None, "recall": None, "error": None})
                step()
                continue
            choose = way.prepare(layers, budget)
            held, recall, error = [], [], []
            for i, of in enumerate(layers):
                for heads, whole in zip(of, full[i]):
                    chosen = choose(i, heads)
                    held.append(held_share(chosen, heads, block_size))
                    result = way.compute(heads, chosen)
                    error += output_error(result.out, whole.out)
                    if result.lse is not None and whole.lse is not None:
                        recall += mass_recall(result.lse, whole.lse)
            rows.append(row | {"held": _of(held), "recall": _of(recall) if recall else None, "error": _of(error)})
            step()
    return rows


def mass_recall(lse: Tensor, whole: Tensor) -> list[float]:
    """The mean over rows of the attention mass that was computed, for each head of each sample."""
    return [float(x) for x in (lse - whole).exp().mean(-1).flatten()]


def output_error(out: Tensor, whole: Tensor) -> list[float]:
    """The relative L2 error of each head of each sample."""
    size = whole.double().pow(2).sum((1, 3)).sqrt().clamp(min=1e-30)
    return [float(x) for x in ((out - whole).double().pow(2).sum((1, 3)).sqrt() / size).flatten()]


def _of(figures: Sequence[float]) -> dict[str, float]:
    """The mean of some figures, and how far they reach."""
    named = {"mean": sum(figures) / len(figures), "low": min(figures), "high": max(figures)}
    return {name: round(x, 4) for name, x in named.items()}


def quality_columns(budgets: Sequence[float]) -> tuple[str, ...]:
    """The columns of `quality_rows`."""
    shares = [f"{100 * budget:.0f} %" for budget in budgets]
    figures = [f"{figure}, {share}" for figure in ("mass recall", "output error") for share in shares]
    return ("heads of", "score", "rule", "reads own block", *figures, f"pairs held at {', '.join(shares)}")


def quality_rows(name: str, judged: Sequence[dict[str, Any]], budgets: Sequence[float]) -> Iterator[tuple[str, ...]]:
    """A row for each way, its budgets side by side: means over layers, samples and heads (lowest-highest)."""
    by_way: dict[tuple[str, str, bool], dict[float, dict[str, Any]]] = {}
    for row in judged:
        by_way.setdefault((row["score"], row["rule"], row["lookahead"]), {})[row["budget"]] = row
    for (score, rule, lookahead), of in by_way.items():
        cells = [_cell(of[budget][figure]) for figure in ("recall", "error") for budget in budgets]
        held = ", ".join("-" if (x := of[b]["held"]) is None else f"{100 * x['mean']:.1f} %" for b in budgets)
        yield name, score, rule, "yes" if lookahead else "", *cells, held


def _cell(of: dict[str, float] | None) -> str:
    return "-" if of is None else f"{of['mean']:.3f} ({of['low']:.2f}-{of['high']:.2f})"
