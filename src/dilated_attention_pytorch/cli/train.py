"""`dilated-attention train`: text in, a run folder out."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import err, name_rank, out
from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from dilated_attention_pytorch.models.config import LongNetLMConfig
    from dilated_attention_pytorch.models.longnet import LongNetLM
    from dilated_attention_pytorch.training.ranks import Ranks
    from dilated_attention_pytorch.training.run import Run
    from dilated_attention_pytorch.training.settings import TrainingSettings

RUNS = Path("runs")

Data = Annotated[
    Path | None,
    typer.Option(help="A text file, or a folder of text files. Without it: the Python standard library's sources."),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--run",
        "--folder",  # torchrun takes --run for a --run-path of its own
        help="The run folder to make. Without it: runs/TIME, linked as runs/latest. Under torchrun, write --folder.",
    ),
]
Resume = Annotated[Path | None, typer.Option(help="Continue this run, with its own settings, to the same result.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps. Without it: about 4 minutes on 2 cores.")]
Seed = Annotated[int | None, typer.Option(help="Fixes the first weights and the order of the windows. Without it: 0.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Without it: cpu.")]
Autocast = Annotated[str | None, typer.Option(help="none or bf16. Without it: none.")]
ContextParallel = Annotated[
    int | None,
    typer.Option(help="Processes that share one sequence; the batch is dealt over the others. Without it: 1."),
]
Layout = Annotated[
    str | None, typer.Option(help="How they share it: contiguous, zigzag or striped. Without it: contiguous.")
]
Parallel = Annotated[
    str | None,
    typer.Option(help="fsdp (parameters sharded over all processes) or ddp (each has all of them). Without it: fsdp."),
]
Compression = Annotated[
    str | None,
    typer.Option(help="What ddp sends of gradients: none, fp16, bf16 (GPUs only) or powersgd. Without it: none."),
]
Timeout = Annotated[
    float, typer.Option(min=1.0, help="Seconds that a process waits for another before it raises an error.")
]
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
    context_parallel: ContextParallel = None,
    layout: Layout = None,
    parallel: Parallel = None,
    gradient_compression: Compression = None,
    timeout: Timeout = 300.0,
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

    [bold]Several processes[/bold]

    torchrun --nproc-per-node 4 -m dilated_attention_pytorch.cli train --context-parallel 2

    trains on 4 CPUs or GPUs: 2 processes share each sequence, and each pair takes one of the batch, which has as many
    unless --set batch_size says more. The losses are those of one process with this batch_size.

    With --folder NAME, torchrun --max-restarts 3 goes on by itself after a failure. --resume continues a run with any
    number of processes; how they share the work may then be said anew.
    """
    from torch import OutOfMemoryError

    from dilated_attention_pytorch.cli.results import write_results
    from dilated_attention_pytorch.reports.figures import check_matplotlib
    from dilated_attention_pytorch.training.faults import RankLost, together
    from dilated_attention_pytorch.training.ranks import form_ranks, shared_anew, world_size
    from dilated_attention_pytorch.training.resume import check_restart

    check_matplotlib()  # before the training, not behind it
    if resume is None:
        check_restart(folder)
    sharing = _given(
        context_parallel=context_parallel, layout=layout, parallel=parallel, gradient_compression=gradient_compression
    )
    given, patience = _given(steps=steps, seed=seed, device=device, autocast=autocast), timedelta(seconds=timeout)
    begun: list[Run] = []
    if resume is None:
        chosen, model = _chosen(given | sharing, settings or [])
    else:
        _check_alone(given, settings, data, folder)
        begun.append(opened(resume))
        chosen = begun[0].settings

    def work() -> LongNetLM | None:
        """Done a second time, it goes on with the run that it began."""
        shared = chosen if resume is None else shared_anew(chosen, sharing, world_size())
        ranks = form_ranks(shared, patience)
        if not begun:
            begun.append(_new_run(data, folder, chosen, model, ranks))
        return _train(dataclasses.replace(begun[0], settings=shared), ranks)

    try:
        trained = together(chosen.device, patience, work)
    except (RankLost, OutOfMemoryError) as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from error
    if trained is not None:  # the others have left by now, and need not wait for the evaluation
        trained.eval()
        trained.save_pretrained(begun[0].path)
        write_results(begun[0], trained)


def _check_alone(given: dict[str, Any], settings: list[str] | None, data: Path | None, folder: Path | None) -> None:
    """Raise InvalidInput for options of a new run beside --resume."""
    others = [f"--{name}" for name in given] + ["--data"] * (data is not None) + ["--run"] * (folder is not None)
    if others or settings:
        others += ["--set"] * bool(settings)
        raise InvalidInput(f"--resume continues a run with its own settings; leave out {', '.join(others)}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _chosen(given: dict[str, Any], pairs: list[str]) -> tuple[TrainingSettings, LongNetLMConfig]:
    """The settings and the model of a new run, from options and `--set`; this process uses their number of threads."""
    import torch

    from dilated_attention_pytorch.cli.overrides import fields, overrides
    from dilated_attention_pytorch.training.loop import check_device
    from dilated_attention_pytorch.training.model import DEFAULT_MODEL
    from dilated_attention_pytorch.training.ranks import launched_size
    from dilated_attention_pytorch.training.settings import TrainingSettings

    defaults = dataclasses.replace(TrainingSettings(), threads=torch.get_num_threads())
    for_run, for_model = overrides(pairs, fields(defaults), fields(DEFAULT_MODEL))
    twice = sorted(given.keys() & for_run.keys())
    if twice:
        raise InvalidInput(f"{', '.join(twice)}: given both as an option and by --set; give it once")
    settings = dataclasses.replace(defaults, **for_run, **given)
    if "batch_size" not in for_run:
        of_data = launched_size() // settings.context_parallel
        settings = dataclasses.replace(settings, batch_size=defaults.batch_size * max(1, of_data))
    model = dataclasses.replace(DEFAULT_MODEL, **for_model)
    check_device(settings)
    torch.set_num_threads(settings.threads)
    return settings, model


def _new_run(
    data: Path | None, folder: Path | None, settings: TrainingSettings, model: LongNetLMConfig, ranks: Ranks
) -> Run:
    from dilated_attention_pytorch.training.resume import run_before_restart
    from dilated_attention_pytorch.training.run import Run, new_run_folder, point_latest

    made: list[Run] = []

    def make() -> Path:
        path = new_run_folder(RUNS) if folder is None else folder
        before = run_before_restart(path, settings, model.to_dict())
        if before is not None:
            made.append(before)
            return path
        with out.status("Reading text"):
            made.append(Run.create(path, settings, model.to_dict(), data))
        if folder is None:
            point_latest(path)
        return path

    path = ranks.on_first(make)
    return made[0] if made else Run.open(path)


def opened(path: Path) -> Run:
    """The run in `path`; this process uses the run's number of CPU threads, on which the last bits depend."""
    import torch

    from dilated_attention_pytorch.training.run import Run

    run = Run.open(path)
    torch.set_num_threads(run.settings.threads)
    return run


def _train(run: Run, ranks: Ranks) -> LongNetLM | None:
    """The trained model, on the first rank."""
    from rich.console import Console

    from dilated_attention_pytorch.reports.progress import training_progress
    from dilated_attention_pytorch.training.interrupt import StopRequest
    from dilated_attention_pytorch.training.loop import train as train_model
    from dilated_attention_pytorch.training.model import build_model, gathered_model

    console = out if ranks.is_first else Console(quiet=True)
    if ranks.size > 1:
        name_rank(ranks.rank)
    model = build_model(run)
    _introduce(console, run, ranks, sum(parameter.numel() for parameter in model.parameters()))
    done = len(run.read_metrics())
    with StopRequest() as request, training_progress(console, run.settings, done) as on_step:
        steps = train_model(model, run, on_step, lambda: request.signal != 0, ranks)
    if steps < run.settings.steps:
        again = f"dilated-attention train --resume {run.path}"
        console.print(Text.assemble(f"stopped after step {steps}; continue with  ", (again, "bold")))
        raise typer.Exit(128 + request.signal)  # 128 where the signal came to another rank
    return gathered_model(model, ranks)


def _introduce(console: Console, run: Run, ranks: Ranks, parameters: int) -> None:
    text, settings = run.record["text"], run.settings
    console.print(Text.assemble(("run   ", "dim"), str(run.path)))
    console.print(Text.assemble(("text  ", "dim"), f"{text['train_bytes']:,} bytes of {text['origin']}"))
    console.print(Text.assemble(("      ", "dim"), f"{text['held_out_bytes']:,} bytes held out"))
    console.print(Text.assemble(("model ", "dim"), f"{parameters:,} parameters, on {run.record['device']}"))
    if ranks.size > 1:
        words = f"{ranks.size} with {settings.parallel}, {settings.context_parallel} to a sequence ({settings.layout})"
        console.print(Text.assemble(("ranks ", "dim"), words))
