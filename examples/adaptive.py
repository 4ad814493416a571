"""Adaptive attention in a trained language model: what selectors keep of its attention, and what the model loses.

Takes the run folder of `make run`, or trains a small model for some seconds.
Run: python examples/adaptive.py [runs/latest]
"""

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveSparseAttention, Causal, DilatedAttention, Full, LongNetLM, attend
from dilated_attention_pytorch.benchmark.heads import captured_heads, spread_windows
from dilated_attention_pytorch.nn.base import PatternAttention
from dilated_attention_pytorch.selection import (
    Antidiagonal,
    MeanPooled,
    MinMax,
    Oracle,
    Selector,
    TopBlocks,
    block_mass,
    mass_recall,
)
from dilated_attention_pytorch.training.loop import train
from dilated_attention_pytorch.training.model import DEFAULT_MODEL, build_model, finished_model
from dilated_attention_pytorch.training.run import Run
from dilated_attention_pytorch.training.settings import TrainingSettings

BUDGETS = (0.05, 0.1, 0.2)  # shares of the blocks that a block of queries may see
SCORES = {"mean": MeanPooled(), "min and max": MinMax(), "antidiagonal": Antidiagonal(8), "oracle": Oracle()}


def small_run(folder: Path, steps: int) -> Run:
    """A model of two layers, trained for so many steps on the standard library's sources."""
    config = replace(
        DEFAULT_MODEL, d_model=64, num_layers=2, dim_feedforward=128, segment_lengths=(1024,), dilation_rates=(1,)
    )
    settings = TrainingSettings(steps=steps, window=1024, short_window=1024, batch_size=4)
    run = Run.create(folder, settings, config.to_dict(), None)
    model = build_model(run)
    train(model, run)
    model.save_pretrained(run.path)
    return run


def selector(name: str, block_size: int) -> Selector:
    """Top blocks by a score. The oracle has to see the queries that it judges; the others stay causal."""
    return Selector(SCORES[name], TopBlocks(), block_size, lookahead=name == "oracle")


def kept(model: LongNetLM, tokens: Tensor, name: str, budget: float, block_size: int) -> tuple[float, float]:
    """Mean over layers: the share of attention mass in chosen blocks, and the output's relative error."""
    recalls, errors = [], []
    for q, k, v in (heads for layer in captured_heads(model, tokens) for heads in layer):
        chosen = selector(name, block_size)(q, k, budget, Causal())
        recalls.append(mass_recall(chosen, block_mass(q, k, Causal(), block_size)).mean().item())
        full = attend(q, k, v, Causal())
        errors.append(((attend(q, k, v, chosen) - full).norm() / full.norm()).item())
    return sum(recalls) / len(recalls), sum(errors) / len(errors)


def bits_per_byte(model: LongNetLM, tokens: Tensor, attentions: list[PatternAttention]) -> float:
    """The model's loss when its layers attend with these modules; it has its own back afterwards."""
    layers = [layer.self_attn for layer in model.decoder.layers]
    own = [layer.attention for layer in layers]
    for layer, attention in zip(layers, attentions, strict=True):
        layer.attention = attention
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    for layer, attention in zip(layers, own, strict=True):
        layer.attention = attention
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() / math.log(2)


def main(folder: Path | None = None, steps: int = 60, block_size: int = 32) -> dict[tuple[str, float], float]:
    """Print a line for each score and budget; return the model's bits per byte by (score, budget)."""
    with tempfile.TemporaryDirectory() as scratch:
        run = small_run(Path(scratch) / "run", steps) if folder is None else Run.open(folder)
        model = finished_model(run)
        tokens = spread_windows(run.corpus.held_out, min(run.settings.window, 4096) + 1, 2)
    count = len(model.decoder.layers)
    own = bits_per_byte(model, tokens, [layer.self_attn.attention for layer in model.decoder.layers])
    full = bits_per_byte(model, tokens, [DilatedAttention(pattern=Full())] * count)
    print(f"{tokens.shape[1] - 1} bytes of held-out text: {own:.3f} bits per byte as trained, {full:.3f} with full")
    print("attention. Blocks chosen by:\n\nscore          budget  mass kept  output error  bits per byte")
    lost = {}
    for name in SCORES:
        for budget in BUDGETS:
            recall, error = kept(model, tokens[:, :-1], name, budget, block_size)
            layers = [AdaptiveSparseAttention(selector(name, block_size), budget) for _ in range(count)]
            lost[name, budget] = bits_per_byte(model, tokens, layers)
            print(f"{name:14} {budget:6.0%} {recall:10.0%} {error:13.2f} {lost[name, budget]:14.3f}")
    return {**lost, ("full", 1.0): full}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
