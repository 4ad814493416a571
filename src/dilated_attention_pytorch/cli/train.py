"""`dilated-attention train`: text in, a run folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import out
from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    from dilated_attention_pytorch.training.run import Run

RUNS = Path("runs")

Data = Annotated[
    Path | None,
    typer.Option(help="A text file, or a folder of text files. Without it: the Python standard library's sources."),
]
Folder = Annotated[
    Path | None, typer.Option("--run", help="The run folder to make. Without it: runs/TIME, linked as runs/latest.")
]
Resume = Annotated[Path | None, typer.Option(help="Continue this run, with its own settings, to the same result.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps. Without it: about 4 minutes on 2 cores.")]
Seed = Annotated[int | None, typer.Option(help="Fixes the first weights and the order of the windows. Without it: 0.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Without it: cpu.")]
Autocast = Annotated[str | None, typer.Option(help="none or bf16. Without it: none.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting of run or model; an unknown name lists them all."
    ),
]


def train(
    data: Data = None,
    folder: Folder = None,
    resume: Resume = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    autocast: Autocast = None,
    settings: Set = None,
) -> None:
    """Train a byte-level LongNet language model, evaluate it by context length, and write a run folder.

    [bold]Examples[/bold]

    dilated-attention train

    dilated-attention train --data ~/books --steps 1000 --run runs/books

    dilated-attention train --set d_model=256 --set segment_lengths=512,4096 --set dilation_rates=1,4

    dilated-attention train --resume runs/latest

    Ctrl-C leaves a checkpoint; --resume goes on to the same model as if the run had never stopped.
    The folder holds report.html, model.safetensors, config.json, metrics.jsonl, loss.png and context.png.
    """
    from dilated_attention_pytorch.reports.figures import check_matplotlib

    check_matplotlib()  # before the training, not behind it
    named = {"steps": steps, "seed": seed, "device": device, "autocast": autocast}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if resume is None:
        run = _new_run(data, folder, given, settings or [])
    else:
        others = [f"--{name}" for name in given] + ["--data"] * (data is not None) + ["--run"] * (folder is not None)
        if others or settings:
            others += ["--set"] * bool(settings)
            raise InvalidInput(f"--resume continues a run with its own settings; leave out {', '.join(others)}")
        run = opened(resume)
    _train(run)


def _new_run(data: Path | None, folder: Path | None, given: dict[str, Any], pairs: list[str]) -> Run:
    import torch

    from dilated_attention_pytorch.cli.overrides import fields, overrides
    from dilated_attention_pytorch.training.loop import check_device
    from dilated_attention_pytorch.training.model import DEFAULT_MODEL
    from dilated_attention_pytorch.training.run import Run, new_run_folder, point_latest
    from dilated_attention_pytorch.training.settings import TrainingSettings

    defaults = dataclasses.replace(TrainingSettings(), threads=torch.get_num_threads())
    for_run, for_model = overrides(pairs, fields(defaults), fields(DEFAULT_MODEL))
    twice = sorted(given.keys() & for_run.keys())
    if twice:
        raise InvalidInput(f"{', '.join(twice)}: given both as an option and by --set; give it once")
    settings = dataclasses.replace(defaults, **for_run, **given)
    model = dataclasses.replace(DEFAULT_MODEL, **for_model)
    check_device(settings)
    torch.set_num_threads(settings.threads)
    path = new_run_folder(RUNS) if folder is None else folder
    with out.status("Reading text"):
        run = Run.create(path, settings, model.to_dict(), data)
    if folder is None:
        point_latest(path)
    return run


def opened(path: Path) -> Run:
    """The run in `path`; this process uses the run's number of CPU threads, on which the last bits depend."""
    import torch

    from dilated_attention_pytorch.training.run import Run

    run = Run.open(path)
    torch.set_num_threads(run.settings.threads)
    return run


def _train(run: Run) -> None:
    from dilated_attention_pytorch.cli.results import write_results
    from dilated_attention_pytorch.reports.progress import training_progress
    from dilated_attention_pytorch.training.interrupt import StopRequest
    from dilated_attention_pytorch.training.loop import train as train_model
    from dilated_attention_pytorch.training.model import build_model

    model = build_model(run)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = run.record["text"]
    out.print(Text.assemble(("run   ", "dim"), str(run.path)))
    out.print(Text.assemble(("text  ", "dim"), f"{text['train_bytes']:,} bytes of {text['origin']}"))
    out.print(Text.assemble(("      ", "dim"), f"{text['held_out_bytes']:,} bytes held out"))
    out.print(Text.assemble(("model ", "dim"), f"{parameters:,} parameters, on {run.record['device']}"))
    done = len(run.read_metrics())
    with StopRequest() as request, training_progress(out, run.settings, done) as on_step:
        steps = train_model(model, run, on_step, lambda: request.signal != 0)
    if steps < run.settings.steps:
        again = f"dilated-attention train --resume {run.path}"
        out.print(Text.assemble(f"stopped after step {steps}; continue with  ", (again, "bold")))
        raise typer.Exit(128 + request.signal)
    model.eval()
    model.save_pretrained(run.path)
    write_results(run, model)
