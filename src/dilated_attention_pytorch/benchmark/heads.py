"""Queries, keys and values to judge selectors by: those of a trained model on held-out text, and random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.attention import MultiheadDilatedAttention
from dilated_attention_pytorch.training.data import Bytes
from dilated_attention_pytorch.training.model import finished_model
from dilated_attention_pytorch.training.run import Run


class Heads(NamedTuple):
    """What an attention is given: ``q (B, N, H, D)``, ``k`` and ``v (B, N, Hkv, D)``."""

    q: Tensor
    k: Tensor
    v: Tensor


def random_heads(tokens: int, heads: int, head_dim: int, samples: int = 1) -> list[list[Heads]]:
    """Standard normal heads as one layer of so many samples; in all of them no key matters much more than others."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    return [[Heads(*(torch.randn(shape, generator=generator) for _ in range(3))) for _ in range(samples)]]


def trained_heads(run: Path, tokens: int, samples: int, held_out: bool = True) -> list[list[Heads]]:
    """For each layer of the trained model, what its attention is given on so many windows of the run's text.

    Windows have ``tokens`` bytes, or the model's window if that is shorter, and lie evenly spread over the held-out
    text, or over that which was trained on. Positions are applied. Raises InvalidInput, naming the command to run,
    where there is no finished run.
    """
    try:
        opened = Run.open(run)
        model = finished_model(opened)
    except InvalidInput as error:
        raise InvalidInput(f"run `make run` first ({error})") from error
    corpus = opened.corpus
    windows = spread_windows(
        corpus.held_out if held_out else corpus.train, min(tokens, opened.settings.window), samples
    )
    return captured_heads(model, windows)


def spread_windows(text: Bytes, length: int, count: int) -> Tensor:
    """So many windows of ``length`` bytes, evenly spread over the text, as (count, length) int64.

    Example:
        >>> spread_windows(np.arange(10, dtype=np.uint8), 4, 3).tolist()
        [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    """
    if len(text) < length:
        raise InvalidInput(f"the text has {len(text)} bytes; windows of {length} need as many. Give more text.")
    starts = np.linspace(0, len(text) - length, count).astype(np.int64)
    return torch.from_numpy(np.stack([text[start : start + length] for start in starts])).long()


def captured_heads(model: nn.Module, windows: Tensor) -> list[list[Heads]]:
    """For each attention layer of the model, in the order in which they run, its heads on each window."""
    found: list[list[Heads]] = []

    def capture(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        q, k, v = (x.detach().clone(memory_format=torch.contiguous_format) for x in arguments[:3])
        found.append([Heads(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))])

    layers = [m.attention for m in model.modules() if isinstance(m, MultiheadDilatedAttention)]
    hooks = [layer.register_forward_pre_hook(capture) for layer in layers]
    try:
        with torch.no_grad():
            model(windows)
    finally:
        for hook in hooks:
            hook.remove()
    return found
