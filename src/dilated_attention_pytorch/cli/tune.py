"""`dilated-attention tune`: measure what auto shall take on this machine, or show what it goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import err, out
from dilated_attention_pytorch.cli.explain import device_of, integers
from dilated_attention_pytorch.errors import InvalidInput


def tune(
    dtypes: Annotated[str, typer.Option(help="Data types, with commas; those that the device is used with.")] = "",
    head_dims: Annotated[
        str, typer.Option(help="Head dims, with commas; one serves those within a factor of four.")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Numbers of keys, with commas, rounded up to powers of two.")] = "",
    patterns: Annotated[str, typer.Option(help="Classes of patterns, with commas: causal, dilated-long, ...")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds for each key; choices go by medians.")] = 5,
    quick: Annotated[bool, typer.Option(help="Fewer keys and rounds: a first table, to be refined later.")] = False,
    force: Annotated[bool, typer.Option(help="Measure again what the file holds.")] = False,
    show: Annotated[bool, typer.Option(help="Show the tables in force and where they come from; measure nothing.")] = (
        False
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu.")] = "cpu",
    file: Annotated[
        Path | None, typer.Option("--out", help="Write here instead of into the user's cache folder.")
    ] = None,
    any_device: Annotated[
        bool, typer.Option(help="The table holds for any device of this type, as the one in the package.")
    ] = False,
) -> None:
    """Measure which backend, plan and options are the fastest here; auto goes by it from then on.

    Takes minutes on an otherwise idle machine, and goes on where it was stopped: every finished key
    is in the file at once. Results stay the same within the limits that every backend keeps; only speed changes.
    Without a table of your own, the one that comes with the package serves.

    [bold]Examples[/bold]

    dilated-attention tune --quick

    dilated-attention tune --dtypes bfloat16 --head-dims 64 --patterns dilated-long,causal

    dilated-attention tune --show
    """
    from dilated_attention_pytorch.backends import BACKENDS
    from dilated_attention_pytorch.backends.tuning import PATTERN_CLASSES, tables_in_force, user_file
    from dilated_attention_pytorch.benchmark import tune as measuring
    from dilated_attention_pytorch.reports.progress import share_progress

    place = device_of(device)
    if show:
        for table in tables_in_force(place, BACKENDS):
            show_table(table)
        out.print(Text(f"{user_file(place)} is asked first; nothing there falls to the next, then to auto's order"))
        return
    usual = ("float32", "bfloat16") if place.type == "cpu" else ("bfloat16", "float32")
    every_length = measuring.LENGTHS if place.type == "cpu" else measuring.GPU_LENGTHS
    usual_lengths = (128, 1024, 4096) if quick else every_length
    keys = measuring.grid(
        words(dtypes) or (usual[:1] if quick else usual),
        integers("--head-dims", head_dims) if head_dims else ((64,) if quick else (64, 128)),
        integers("--lengths", lengths) if lengths else usual_lengths,
        words(patterns) or PATTERN_CLASSES,
    )
    target = file or user_file(place)
    if any_device and file is None:
        raise InvalidInput("--any-device needs --out: the user's own file is for one device")
    err.print(Text(f"{len(keys)} keys, into {target}"), style="dim", soft_wrap=True)
    with share_progress(err, "measuring") as on_progress:
        table = measuring.tune(
            keys,
            place,
            target,
            rounds=min(rounds, 3) if quick else rounds,
            force=force,
            any_device=any_device,
            progress=on_progress,
        )
    show_table(table)


def show_table(table: object) -> None:
    """Print a table of choices, with what it was measured with."""
    from dilated_attention_pytorch.backends import tuning
    from dilated_attention_pytorch.benchmark.tune import CHOICE_COLUMNS, choice_rows
    from dilated_attention_pytorch.reports.tables import Table

    assert isinstance(table, tuning.Table)
    threads = f", {table.threads} thread{'s' if table.threads > 1 else ''}" if table.threads else ""
    title = f"Choices of auto on {table.device}{threads}"
    note = f"{len(table.entries)} keys, torch {table.torch or 'unknown'}, library {table.library}, from {table.source}"
    out.print(Table(title, CHOICE_COLUMNS, choice_rows(table), note).to_rich())


def words(text: str) -> tuple[str, ...]:
    """The words of a text that stand between commas.

    >>> words("causal, full")
    ('causal', 'full')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())
