"""`dilated-attention bench`: speed, auto against the best, sparse attention, many ranks, pools; printed and stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dilated_attention_pytorch.cli.console import err, out
from dilated_attention_pytorch.cli.evaluate import LATEST
from dilated_attention_pytorch.errors import InvalidInput

STUDIES = ("sparse", "selectors", "orders", "winners", "parallel", "pools")
PARTS = ("all", "speed", "grid", *STUDIES)


def bench(
    only: Annotated[
        str, typer.Option(help="all, or one part: speed, grid, sparse, selectors, orders, winners, parallel or pools.")
    ] = "all",
    shapes: Annotated[str, typer.Option(help="Which shapes the speed part measures: letters of A, B, C.")] = "ABC",
    threads: Annotated[str, typer.Option(help="Thread counts of the speed part, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; figures are medians over them.")] = 3,
    trained: Annotated[
        Path, typer.Option("--run", help="The run folder whose model the selectors part judges on held-out text.")
    ] = LATEST,
    page: Annotated[
        Path | None, typer.Option(help="Measure nothing: draw the marked tables of this page from stored results.")
    ] = None,
    gpu: Annotated[bool, typer.Option(help="Measure on the GPU instead: under 8 minutes.")] = False,
    folder: Annotated[
        Path,
        typer.Option("--out", help="Where results are stored: <device>/attention.json, grid.json, sparse.json ..."),
    ] = Path("benchmarks/results"),
) -> None:
    """Measure attention on this machine's CPU: about half an hour for all, best on an otherwise idle machine.

    Every figure is a ratio of two runs of the same round, so that a noisy machine disturbs both sides.
    "pieces" is PyTorch's fused kernel on ready-made contiguous problems of the lengths w / r, without
    any views or merging; "gather-scatter" is torchscale's dataflow on the same kernel. Above 1 is faster.

    The grid compares auto with every backend that can, and flags where it is more than 10 % behind the best:
    "dilated-attention tune" mends that.

    Sparse and adaptive attention have four parts, each stored in a file of its name:

    [bold]sparse[/bold]: useful FLOP/s of block-sparse attention over the dense kernel's, times faster than dense.

    [bold]selectors[/bold]: what choosing blocks costs of the time that it saves; attention mass held and error of the
    output, on heads of the model that "make run" trains and on random ones.

    [bold]orders[/bold]: how much of a neighbourhood shares a segment in Hilbert, Morton, snake and raster order.

    [bold]winners[/bold]: where dense, dilated, block-sparse and adaptive attention win, by tokens and density.

    [bold]parallel[/bold]: a ring of two processes against one process with two threads; bytes that each method of
    context parallelism brings to a rank; how even the layouts are.

    [bold]pools[/bold]: time and peak memory with a memory pool and without, for each use that it could have.

    [bold]Examples[/bold]

    dilated-attention bench --only speed --shapes B --threads 1

    dilated-attention bench --only grid

    dilated-attention bench --only selectors --run runs/latest

    dilated-attention bench --page docs/sparse_speed.md
    """
    if only not in PARTS:
        raise InvalidInput(f"--only: expected one of {', '.join(PARTS)}. Got {only!r}.")
    if page is not None:
        write_page(page, folder)
        return
    if gpu:
        bench_gpu(folder, rounds)
        return
    if only in ("all", "speed"):
        bench_speed(shapes, threads, rounds, folder)
    if only in ("all", "grid"):
        bench_grid(rounds, folder)
    for name in STUDIES:
        if only in ("all", name):
            bench_study(name, rounds, trained, folder)


def bench_speed(shapes: str, threads: str, rounds: int, folder: Path) -> None:
    """Print the speed of each backend on the shapes, and scaling, memory and import; store attention.json."""
    from dilated_attention_pytorch.benchmark import run
    from dilated_attention_pytorch.benchmark.cases import CASES
    from dilated_attention_pytorch.reports.figures import check_matplotlib
    from dilated_attention_pytorch.reports.tables import Table

    cases = tuple(case for case in CASES if case.name in shapes)
    unknown = sorted(set(shapes) - {case.name for case in CASES})
    if unknown or not cases:
        raise InvalidInput(f"--shapes: expected letters of A, B, C. Got {shapes!r}.")
    words = threads.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise InvalidInput(f"--threads: expected numbers of at least 1, as in 1,2. Got {threads!r}.")
    counts = tuple(int(word) for word in words)
    check_matplotlib()
    results = measured(
        "measuring speed",
        run.total_runs(cases, counts, rounds),
        lambda progress: run.run_benchmarks(cases, counts, rounds, progress),
    )
    note = "Ratios above 1 are faster: median (lowest-highest).\n" + "\n".join(
        f"{case.name}: {case.describe()}" for case in cases
    )
    title = f"Speed on {results['device']}, float32, torch {results['versions']['torch']}, {rounds} rounds"
    out.print(Table(title, run.SPEED_COLUMNS, run.speed_rows(results), note).to_rich())
    out.print(Table("Scaling, memory, import", ("figure", "measured", "goal"), run.other_rows(results)).to_rich())
    scaling_figure(results, stored(results, folder, "attention.json"))


def bench_grid(rounds: int, folder: Path) -> None:
    """Print auto against the best backend on each shape of the grid; store grid.json."""
    from dilated_attention_pytorch.benchmark.grid import GRID, GRID_COLUMNS, grid_rows
    from dilated_attention_pytorch.benchmark.run import run_grid
    from dilated_attention_pytorch.reports.tables import Table

    results = measured("measuring the grid", len(GRID), lambda progress: run_grid(rounds, progress))
    absent = "".join(f"\n{name} is absent: {why}" for name, why in results["absent"].items())
    behind = f"{len(results['behind'])} of {len(results['shapes'])} shapes are more than 10 % behind the best"
    title = f"auto against the best backend on {results['device']}, {results['threads']} threads, {rounds} rounds"
    table = Table(title, GRID_COLUMNS, grid_rows(results), behind + absent)
    out.print(table.to_rich())
    stored(results, folder, "grid.json")


def bench_study(name: str, rounds: int, trained: Path, folder: Path) -> None:
    """Print the tables of a study; store its results under its name. Selectors judge the model of a trained run."""
    from dilated_attention_pytorch.benchmark.run import STUDIES, run_study
    from dilated_attention_pytorch.reports.figures import check_matplotlib
    from dilated_attention_pytorch.reports.tables import Table

    if name == "winners":
        check_matplotlib()  # before the measurement, not behind it
    study = STUDIES[name]
    results = measured(study.words, study.steps(rounds), lambda progress: run_study(name, rounds, progress, trained))
    for title, columns, rows, note in study.tables(results):
        out.print(Table(f"{title}, {results['device']}, {rounds} rounds", columns, rows, note).to_rich())
    target = stored(results, folder, f"{name}.json")
    if name == "winners":
        winners_figure(results, target)


def winners_figure(results: dict[str, Any], target: Path) -> None:
    """``winners.png`` in the target folder shows how many times faster than dense each way is, at one density."""
    from dilated_attention_pytorch.benchmark.winners import FIGURE_DENSITY, times_faster_by_tokens
    from dilated_attention_pytorch.reports.figures import Curve, line_figure

    by_way = times_faster_by_tokens(results, FIGURE_DENSITY)
    line_figure(
        target / "winners.png",
        f"Forward, times faster than dense attention, with {100 * FIGURE_DENSITY:.0f} % of its pairs",
        f"tokens; {results['shape']}, {results['threads']} threads",
        "times faster than dense",
        [Curve(list(points), list(points.values()), way) for way, points in by_way.items()],
        ticks=sorted({tokens for points in by_way.values() for tokens in points}),
    )


def write_page(page: Path, folder: Path) -> None:
    """The page's marked tables are those of the results stored in the folder."""
    from dilated_attention_pytorch.reports.measured import filled_page
    from dilated_attention_pytorch.training.files import write_whole

    if not page.is_file():
        raise InvalidInput(f"--page: expected a Markdown file. {page} does not exist.")
    write_whole(page, filled_page(page.read_text(encoding="utf-8"), folder).encode())
    out.print(f"wrote {page}", soft_wrap=True)


def bench_gpu(folder: Path, rounds: int) -> None:
    """Print what `benchmark.gpu` measures on the GPU; store gpu.json."""
    from dilated_attention_pytorch.benchmark import gpu
    from dilated_attention_pytorch.reports.progress import share_progress
    from dilated_attention_pytorch.reports.tables import Table

    device = gpu.find_device()
    with share_progress(err, "measuring on the GPU") as show:
        results = gpu.run_gpu(device, rounds, show)
    for title, columns, rows in gpu.gpu_tables(results):
        out.print(Table(title, columns, rows).to_rich())
    stored(results, folder, "gpu.json")


def measured(words: str, total: int, work: Callable[[Callable[[], None]], dict[str, Any]]) -> dict[str, Any]:
    """The results of the work, which calls its progress function so many times."""
    from dilated_attention_pytorch.reports.progress import share_progress

    done = 0
    with share_progress(err, words) as show:

        def progress() -> None:
            nonlocal done
            done += 1
            show(done / total)

        return work(progress)


def stored(results: dict[str, Any], folder: Path, name: str) -> Path:
    """The folder of the device, with the results written in it under this name."""
    from dilated_attention_pytorch.benchmark.run import device_folder
    from dilated_attention_pytorch.training.files import write_json

    target = folder / device_folder(results["device"])
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / name, results)
    out.print(f"stored {target / name}", soft_wrap=True)
    return target


def scaling_figure(results: dict[str, Any], target: Path) -> None:
    """``scaling.png`` in the target folder shows the cost of one token against length."""
    from dilated_attention_pytorch.reports.figures import Curve, line_figure

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
