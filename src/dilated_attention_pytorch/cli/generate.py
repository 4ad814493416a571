"""`dilated-attention generate`: the model of a run continues a text."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Annotated

import typer

from dilated_attention_pytorch.errors import InvalidInput

LATEST = Path("runs/latest")


def generate(
    run: Annotated[Path, typer.Argument(help="A run folder.")] = LATEST,
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from standard input.")] = "import ",
    max_new_tokens: Annotated[int, typer.Option(help="Bytes to write.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest bytes only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest bytes that reach this probability.")
    ] = None,
    stop: Annotated[str | None, typer.Option(help="End behind this one character.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
) -> None:
    """Write the prompt and its continuation by the model of a run, byte by byte.

    [bold]Examples[/bold]

    dilated-attention generate runs/latest --prompt "def main(" --seed 1

    dilated-attention generate --temperature 0 --max-new-tokens 2000 --prompt - < module.py
    """
    import torch

    from dilated_attention_pytorch.cli.text import to_text, to_tokens
    from dilated_attention_pytorch.cli.train import opened
    from dilated_attention_pytorch.training.model import finished_model

    given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode()
    if not given:
        raise InvalidInput("--prompt is empty; give at least one character to continue")
    ends = None if stop is None else stop.encode()
    if ends is not None and len(ends) != 1:
        raise InvalidInput(f"--stop must be one ASCII character, got {stop!r}")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    model = finished_model(opened(run))

    def show(text: str) -> None:
        sys.stdout.write(to_text(text.encode()))
        sys.stdout.flush()

    show(decoder.decode(given))
    model.generate(
        to_tokens(given, torch.device("cpu")),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=None if ends is None else ends[0],
        seed=seed,
        stream=lambda tokens: show(decoder.decode(bytes(tokens.tolist()))),
    )
    show(decoder.decode(b"", final=True) + "\n")
