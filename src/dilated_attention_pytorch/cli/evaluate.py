"""`dilated-attention evaluate`: a trained run, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dilated_attention_pytorch.errors import InvalidInput

LATEST = Path("runs/latest")


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")] = LATEST,
    targets: Annotated[
        int | None, typer.Option(help="Places of held-out text to predict. Without it: as train.")
    ] = None,
) -> None:
    """Predict the same held-out bytes after contexts of growing length; show the table, write figures and report anew.

    More targets give smaller standard errors and take longer.

    [bold]Example[/bold]

    dilated-attention evaluate runs/latest --targets 512
    """
    from dilated_attention_pytorch.cli.results import TARGETS, write_results
    from dilated_attention_pytorch.cli.train import opened
    from dilated_attention_pytorch.training.model import finished_model

    if targets is not None and targets < 2:
        raise InvalidInput(f"--targets must be at least 2, got {targets}")
    opened_run = opened(run)
    write_results(opened_run, finished_model(opened_run), TARGETS if targets is None else targets)
