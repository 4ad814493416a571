"""What follows training, and what `evaluate` makes again: evaluation, continuation, figures and page."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dilated_attention_pytorch.cli.console import out

if TYPE_CHECKING:
    import torch

    from dilated_attention_pytorch.models.longnet import LongNetLM
    from dilated_attention_pytorch.training.run import Run

PROMPT_BYTES, NEW_BYTES = 2048, 400
TARGETS = 128  # places of held-out text; with contexts up to 8192 about a minute on two cores


def write_results(run: Run, model: LongNetLM, targets: int = TARGETS) -> None:
    """The run folder holds evaluation.json, continuation.txt, both figures and report.html; the table is shown.

    `targets` places of held-out text are predicted. Raises InvalidInput when matplotlib is not installed.
    """
    from dilated_attention_pytorch.reports.progress import share_progress
    from dilated_attention_pytorch.reports.training import context_figure, context_table, loss_figure, training_page
    from dilated_attention_pytorch.training.evaluate import evaluate
    from dilated_attention_pytorch.training.files import write_json, write_whole
    from dilated_attention_pytorch.training.model import evaluation_contexts

    contexts = evaluation_contexts(run.settings.window)
    began = time.perf_counter()
    with share_progress(out, "evaluating") as on_progress:
        evaluation = evaluate(
            model,
            run.corpus.held_out,
            contexts,
            targets=targets,
            bytes_per_target=min(128, contexts[0] // 2),
            on_progress=on_progress,
        )
    write_json(run.path / "evaluation.json", _finite(dataclasses.asdict(evaluation)))
    out.print(context_table(evaluation).to_rich())
    out.print(Text(f"evaluated in {time.perf_counter() - began:.0f} s", style="dim"))
    given, written = continuation(run, model)
    write_whole(run.path / "continuation.txt", (given + written).encode())
    metrics = run.read_metrics()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    loss_figure(run.path / "loss.png", metrics)
    context_figure(run.path / "context.png", evaluation)
    html = training_page(run.path, run.record, parameters, metrics, evaluation, (given[-600:], written))
    write_whole(run.path / "report.html", html.encode())
    out.print(Text.assemble("report  ", (str(run.path / "report.html"), "bold")))


def _finite(value: Any) -> Any:
    """JSON knows no infinity, which a standard error is where all targets are of one document: null stands for it."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def continuation(run: Run, model: LongNetLM) -> tuple[str, str]:
    """The start of the held-out text, and what the model writes after it (temperature 0.8, seed of the run)."""
    from dilated_attention_pytorch.cli.text import to_text, to_tokens

    given = bytes(run.corpus.held_out[: min(PROMPT_BYTES, run.settings.window)])
    device: torch.device = next(model.parameters()).device
    tokens = model.generate(to_tokens(given, device), max_new_tokens=NEW_BYTES, temperature=0.8, seed=run.settings.seed)
    return to_text(given), to_text(bytes(tokens[0, len(given) :].tolist()))
