"""What a training run shows: the table of contexts, its two figures, and its page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.reports.figures import Curve, line_figure
from dilated_attention_pytorch.reports.page import Facts, Heading, Listing, Paragraph, Part, Picture, page
from dilated_attention_pytorch.reports.tables import Table
from dilated_attention_pytorch.training.evaluate import Evaluation
from dilated_attention_pytorch.training.settings import TrainingSettings


def context_table(evaluation: Evaluation) -> Table:
    """Bits per byte by context, with standard errors, beside `xz -9`."""
    rows = []
    for row in evaluation.rows:
        gain = "" if row is evaluation.rows[0] else f"{row.gain:.3f} ± {row.gain_error:.3f}"
        rows.append((f"{row.context:,}", f"{row.bits_per_byte:.3f} ± {row.standard_error:.3f}", gain, f"{row.xz:.3f}"))
    note = (
        f"The same {evaluation.target_bytes:,} bytes at every context, in {evaluation.targets} places of "
        f"{evaluation.clusters} documents or stretches; ± is one standard error, clustered by these. xz -9 in the "
        f"table compresses the same bytes behind the same context; given these bytes alone it needs "
        f"{evaluation.xz_targets:.3f}, and as one file the whole held-out text {evaluation.xz_held_out:.3f}. The model "
        "has read other text before, xz has not."
    )
    columns = ("context (bytes)", "model", f"less than at {evaluation.rows[0].context:,}", "xz -9")
    best = evaluation.rows.index(evaluation.best)
    return Table("Bits per byte of held-out text", columns, rows, note, frozenset({best}))


def loss_figure(path: Path, metrics: Sequence[dict[str, float]]) -> None:
    """`path` shows the training loss of every step and a running mean over a twentieth of them."""
    steps = [line["step"] for line in metrics]
    bits = [line["bits_per_byte"] for line in metrics]
    width = max(1, len(bits) // 20)
    mean = [sum(bits[max(0, n + 1 - width) : n + 1]) / min(width, n + 1) for n in range(len(bits))]
    curves = [
        Curve(steps, bits, "single steps", style="faint"),
        Curve(steps, mean, f"mean of the last {width}" if width > 1 else "loss"),
    ]
    line_figure(path, "Training loss", "step", "bits per byte", curves)


def context_figure(path: Path, evaluation: Evaluation) -> None:
    """`path` shows bits per byte by context: the model with two standard errors of the paired gain, and `xz -9`."""
    contexts = [row.context for row in evaluation.rows]
    model = [row.bits_per_byte for row in evaluation.rows]
    errors = [2 * row.gain_error for row in evaluation.rows]
    curves = [
        Curve(contexts, model, "LongNet (bars: two standard errors of the change)", errors),
        Curve(
            contexts, [row.xz for row in evaluation.rows], "xz -9, same bytes behind the same context", style="dashed"
        ),
    ]
    title = "The same held-out bytes, predicted after more and more context"
    line_figure(path, title, "context (bytes)", "bits per byte", curves, ticks=contexts)


def training_page(
    folder: Path,
    record: dict[str, Any],
    parameters: int,
    metrics: Sequence[dict[str, float]],
    evaluation: Evaluation,
    continuation: tuple[str, str],
) -> str:
    """The page of a run: `folder` holds its figures; `continuation` is the given text and what the model wrote."""
    first, last = evaluation.rows[0], evaluation.rows[-1]
    settings, text = TrainingSettings.from_dict(record["settings"]), record["text"]
    given, written = continuation
    seconds = metrics[-1]["seconds"]
    facts = Facts(
        [
            (f"{last.bits_per_byte:.3f}", f"bits per byte after {last.context:,} bytes of context"),
            (f"{first.bits_per_byte:.3f}", f"bits per byte after {first.context:,}"),
            (f"{parameters:,}", "parameters"),
            (f"{seconds / 60:.1f} min", f"training, {settings.steps:,} steps"),
            (f"{settings.tokens_until(settings.steps) / seconds:,.0f}", "bytes per second"),
        ]
    )
    parts: list[Part] = [
        facts,
        Heading("Does more context help?"),
        Picture(folder / "context.png", "Bits per byte of held-out text against context length"),
        context_table(evaluation),
        Heading("Training"),
        Picture(folder / "loss.png", "Training loss in bits per byte against steps"),
        Paragraph(
            f"Trained on {text['train_bytes']:,} bytes of {text['origin']}; {text['held_out_bytes']:,} bytes were held "
            "out and never trained on. A folder's text is held out by whole packages, chosen by a hash of their names."
        ),
        Heading("A continuation"),
        Paragraph("Held-out text in grey, then what the model wrote, byte by byte."),
        Listing(written, given),
        Heading("How this was made"),
        _dictionary("Settings", record["settings"]),
        _dictionary("Model", record["model"]),
        _dictionary(
            "Machine and versions", {"device": record["device"], "started": record["started"], **record["versions"]}
        ),
    ]
    lead = "A byte-level LongNet language model, trained and evaluated by dilated-attention train."
    return page(f"Training run {folder.name}", lead, parts)


def _dictionary(title: str, values: dict[str, Any]) -> Table:
    return Table(title, ("", "value"), [(name, str(value)) for name, value in values.items()])
