"""Adaptive attention in a trained language model: what selectors keep of its attention, and what the model loses.

Takes the run folder of `make run`, or trains a small model for some seconds.
Run: python examples/adaptive.py [runs/latest]
"""

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveSparseAttention, Causal, DilatedAttention, Full, LongNetLM, attend
from dilated_attention_pytorch.benchmark.heads import Heads, captured_heads, spread_windows
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
    settings = TrainingSettings(steps=steps, window=1024, short_window=1024, batch_size=2)
    run = Run.create(folder, settings, config.to_dict(), None)
    model = build_model(run)
    train(model, run)
    model.save_pretrained(run.path)
    return run


def selector(name: str, block_size: int) -> Selector:
    """Top blocks by a score. The oracle has to see the queries that it judges; the others stay causal."""
    return Selector(SCORES[name], TopBlocks(), block_size, lookahead=name == "oracle")


class Attended(NamedTuple):
    """What a layer's attention is given, the mass that goes to each block, and its output over everything."""

    heads: Heads
    mass: Tensor
    out: Tensor


def attended(heads: Heads, block_size: int) -> Attended:
    """Full causal attention of these heads."""
    return Attended(heads, block_mass(heads.q, heads.k, Causal(), block_size), attend(*heads, Causal()))


def kept(full: list[Attended], chooser: Selector, budget: float) -> tuple[float, float]:
    """The share of attention mass in chosen blocks, and the output's relative error; means over layers and samples."""
    recalls, errors = [], []
    for heads, mass, out in full:
        chosen = chooser(heads.q, heads.k, budget, Causal())
        recalls.append(mass_recall(chosen, mass).mean())
        errors.append((attend(*heads, chosen) - out).norm() / out.norm())
    return torch.stack(recalls).mean().item(), torch.stack(errors).mean().item()


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


def main(folder: Path | None = None, steps: int = 120) -> dict[tuple[str, float], float]:
    """Print a line for each score and budget; return the model's bits per byte by (score, budget)."""
    with tempfile.TemporaryDirectory() as scratch:
        run = small_run(Path(scratch) / "run", steps) if folder is None else Run.open(folder)
        model = finished_model(run)
        tokens = spread_windows(run.corpus.held_out, min(run.settings.window, 4096) + 1, 2)
    count, block_size = len(model.decoder.layers), max(32, tokens.shape[1] // 64)
    full = [attended(heads, block_size) for layer in captured_heads(model, tokens[:, :-1]) for heads in layer]
    everything = bits_per_byte(model, tokens, [DilatedAttention(pattern=Full())] * count)
    print(f"{tokens.shape[1] - 1} bytes of held-out text, {everything:.3f} bits per byte with full attention.")
    print(f"Blocks of {block_size} bytes, chosen by:\n\nscore          budget  mass kept  output error  bits per byte")
    lost = {("full", 1.0): everything}
    for name in SCORES:
        chooser = selector(name, block_size)
        for budget in BUDGETS:
            recall, error = kept(full, chooser, budget)
            line = f"{name:14} {budget:6.0%} {recall:10.0%} {error:13.2f}"
            if not chooser.lookahead:  # a choice that reads later tokens would tell the model about them
                layers = [AdaptiveSparseAttention(chooser, budget) for _ in range(count)]
                lost[name, budget] = bits_per_byte(model, tokens, layers)
                line += f" {lost[name, budget]:14.3f}"
            print(line)
    return lost


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
