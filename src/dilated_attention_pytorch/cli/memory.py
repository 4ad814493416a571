"""`dilated-attention memory`: what a pool holds, and how the pool does on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import out
from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    from dilated_attention_pytorch.memory import PoolSnapshot
    from dilated_attention_pytorch.reports.tables import Table

MOST_ROWS = 24  # allocations in a table or figure


def memory(
    snapshot: Annotated[
        Path | None, typer.Argument(help="A file of get_global_memory_pool().snapshot().save(path).", metavar="[FILE]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the allocations as this PNG file.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the trial; without FILE.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests of each thread; without FILE.")] = 1000,
) -> None:
    """Show what a memory pool held: hits, bytes, and each allocation with its live and free parts.

    With FILE: the pool of the program that wrote it. Without: a pool is tried on this machine, by threads that stamp
    random buffers and look whether the stamps stay, and the memory limits in force and the NUMA nodes are shown.

    [bold]Examples[/bold]

    dilated-attention memory

    dilated-attention memory pool.json --plot pool.png
    """
    from dilated_attention_pytorch.memory import PoolSnapshot
    from dilated_attention_pytorch.reports.figures import check_matplotlib

    if plot is not None:
        check_matplotlib()
    found = PoolSnapshot.load(snapshot) if snapshot is not None else tried(threads, requests)
    for table in tables(found):
        out.print(table.to_rich())
    if plot is not None:
        draw(found, plot)
        out.print(Text(f"drawn: {plot}"), soft_wrap=True)  # paths stay whole


def tried(threads: int, requests: int) -> PoolSnapshot:
    """What a new pool holds in the middle of use, after a trial of which the outcome is printed."""
    from dilated_attention_pytorch.memory import UnifiedMemoryPool
    from dilated_attention_pytorch.memory.placement import machine_topology
    from dilated_attention_pytorch.memory.pressure import memory_room
    from dilated_attention_pytorch.memory.snapshot import MIB
    from dilated_attention_pytorch.memory.trial import describe_trial, seconds_per_hit, try_threads

    if threads < 1 or requests < 1:
        raise InvalidInput(f"--threads and --requests must be at least 1. Got {threads} and {requests}")
    room, nodes = memory_room(), machine_topology().nodes
    limits = "unknown here" if room is None else f"{room.free / MIB:,.0f} of {room.limit / MIB:,.0f} MiB free"
    placement = "placement does nothing" if len(nodes) < 2 else "a shelf of buffers for each"
    out.print(Text(f"Memory: {limits}. NUMA nodes: {len(nodes)}, {placement}."))
    pool = UnifiedMemoryPool()
    out.print(Text(f"A hit takes {1e6 * seconds_per_hit(pool):.2f} µs of processor time."))
    trial = try_threads(pool, threads=threads, requests=requests)
    out.print(Text(f"{describe_trial(trial)}."))
    kept = [pool.get_buffer((n, 64), pool_type=kind) for n in (16, 100, 300) for kind in ("default", "ring")]
    found = pool.snapshot()
    del kept
    return found


def tables(snapshot: PoolSnapshot) -> list[Table]:
    """What `memory` prints: the statistics, and the largest allocations."""
    from dilated_attention_pytorch.memory.snapshot import MIB
    from dilated_attention_pytorch.reports.tables import Table

    s = snapshot.statistics
    rate = "" if s.hit_rate is None else f"{s.hit_rate:.1%} of requests"
    counts = (
        ("hits", "not counted" if s.hits is None else f"{s.hits:,}", rate),
        ("misses", "not counted" if s.misses is None else f"{s.misses:,}", f"{s.unpooled:,} did not fit into the pool"),
        ("delegated", f"{s.delegated:,}", "pinned or on an accelerator"),
        ("live", f"{s.bytes_live / MIB:,.3f} MiB", f"{s.live_buffers:,} buffers"),
        ("free", f"{s.bytes_free / MIB:,.3f} MiB", f"{s.free_buffers:,} parts"),
        ("held", f"{s.bytes_held / MIB:,.3f} MiB", f"{len(snapshot.allocations):,} allocations"),
        ("fragmentation", f"{s.fragmentation:.1%}", "of the bytes held"),
    )
    rows = [
        (
            f"{a.size / MIB:,.3f}",
            a.pool_type,
            f"{a.node}",
            f"{sum(span.requested for span in a.spans) / MIB:,.3f}",
            f"{len(a.spans)}",
            f"{a.idle_seconds:,.1f}",
        )
        for a in snapshot.allocations[:MOST_ROWS]
    ]
    more = len(snapshot.allocations) - len(rows)
    columns = ("MiB", "pool", "node", "MiB live", "parts", "s since a return")
    note = f"{more:,} smaller ones are not shown." if more else ""
    return [
        Table("The pool", ("what", "amount", ""), counts),
        Table("Its allocations", columns, rows, note=note),
    ]


def draw(snapshot: PoolSnapshot, path: Path) -> None:
    """A PNG in ``path``: one bar per allocation, largest on top, with live, rounded-up and free bytes."""
    from dilated_attention_pytorch.memory.snapshot import MIB
    from dilated_attention_pytorch.reports.figures import span_figure

    rows = []
    for allocation in snapshot.allocations[:MOST_ROWS]:
        spans: list[tuple[float, float, str]] = []
        for span in allocation.spans:
            lost = span.size - span.requested
            if span.requested:
                spans.append((span.start / MIB, span.requested / MIB, "live"))
                if lost:
                    spans.append(((span.start + span.requested) / MIB, lost / MIB, "rounded up"))
            else:
                spans.append((span.start / MIB, span.size / MIB, "free"))
        rows.append((allocation.pool_type, spans))
    span_figure(path, "What the memory pool holds", "MiB of the allocation", rows)
