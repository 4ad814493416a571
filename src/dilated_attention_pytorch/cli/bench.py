"""`dilated-attention bench`: speed, scaling, memory and import time, printed and stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dilated_attention_pytorch.cli.console import err, out
from dilated_attention_pytorch.errors import InvalidInput


def bench(
    shapes: Annotated[str, typer.Option(help="Which shapes to measure: letters of A, B, C.")] = "ABC",
    threads: Annotated[str, typer.Option(help="Thread counts, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; figures are medians over them.")] = 5,
    folder: Annotated[
        Path, typer.Option("--out", help="Where to store <device>/attention.json and scaling.png.")
    ] = Path("benchmarks/results"),
) -> None:
    """Measure dilated attention on this machine's CPU: some minutes, best on an otherwise idle machine.

    Every figure is a ratio of two runs of the same round, so that a noisy machine disturbs both sides.
    "pieces" is the same fused kernel on ready-made contiguous problems of the lengths w / r, without
    any views or merging; "gather-scatter" is torchscale's dataflow on the same kernel. Above 1 is faster.

    Example: [bold]dilated-attention bench --shapes B --threads 1 --rounds 3[/bold]
    """
    from dilated_attention_pytorch.benchmark.cases import CASES
    from dilated_attention_pytorch.benchmark.run import (
        SPEED_COLUMNS,
        device_folder,
        other_rows,
        run_benchmarks,
        speed_rows,
        total_runs,
    )
    from dilated_attention_pytorch.reports.figures import Curve, check_matplotlib, line_figure
    from dilated_attention_pytorch.reports.progress import share_progress
    from dilated_attention_pytorch.reports.tables import Table
    from dilated_attention_pytorch.training.files import write_json

    cases = tuple(case for case in CASES if case.name in shapes)
    unknown = sorted(set(shapes) - {case.name for case in CASES})
    if unknown or not cases:
        raise InvalidInput(f"--shapes: expected letters of A, B, C. Got {shapes!r}.")
    words = threads.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise InvalidInput(f"--threads: expected numbers of at least 1, as in 1,2. Got {threads!r}.")
    counts = tuple(int(word) for word in words)
    check_matplotlib()

    done, total = 0, total_runs(cases, counts, rounds)
    with share_progress(err, "measuring") as show:

        def progress() -> None:
            nonlocal done
            done += 1
            show(done / total)

        results = run_benchmarks(cases, counts, rounds, progress)
    note = "Ratios above 1 are faster: median (lowest-highest).\n" + "\n".join(
        f"{case.name}: {case.describe()}" for case in cases
    )
    title = f"Speed on {results['device']}, float32, torch {results['versions']['torch']}, {rounds} rounds"
    out.print(Table(title, SPEED_COLUMNS, speed_rows(results), note).to_rich())
    out.print(Table("Scaling, memory, import", ("figure", "measured", "goal"), other_rows(results)).to_rich())
    target = folder / device_folder(results["device"])
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "attention.json", results)
    seconds = results["scaling"]["seconds"]
    lengths = [int(n) for n in seconds]
    rates = [1e6 * seconds[str(n)]["median"] / n for n in lengths]
    line_figure(
        target / "scaling.png",
        f"Cost of one token against length (slope of log time {results['scaling']['slope']:.2f})",
        f"tokens; {results['scaling']['shape']}, one thread",
        "microseconds per token, forward",
        [Curve(lengths, rates, "forward")],
        ticks=lengths,
    )
    out.print(f"stored in {target}")
