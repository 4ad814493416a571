"""One run of every measurement, as data to store and tables to read."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from typing import Any

import torch

from dilated_attention_pytorch.benchmark.attention import (
    SCALING,
    SCALING_LENGTHS,
    import_seconds,
    memory,
    scaling,
    speed,
)
from dilated_attention_pytorch.benchmark.cases import CASES, Case
from dilated_attention_pytorch.training.environment import device_name, versions

GOALS = {  # one thread; what falls short is shown, not hidden
    "forward / pieces": {"A": 0.93, "B": 0.85, "C": 0.95},
    "forward + backward / pieces": {"A": 0.93, "B": 0.83, "C": 0.93},
    "forward / gather-scatter": {"B": 1.5, "C": 1.5},
}
SPEED_RUNS = 7  # candidates in a round of `speed`


def total_runs(cases: tuple[Case, ...], thread_counts: tuple[int, ...], rounds: int) -> int:
    """How often `run_benchmarks` calls its progress function."""
    return rounds * (len(cases) * len(thread_counts) * SPEED_RUNS + len(SCALING_LENGTHS))


def run_benchmarks(
    cases: tuple[Case, ...] = CASES,
    thread_counts: tuple[int, ...] = (1, 2),
    rounds: int = 5,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Measure everything; a dictionary that JSON can hold, with device and versions beside the figures."""
    return {
        "device": device_name("cpu").partition(",")[0],
        "system": f"{platform.system()} {platform.machine()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "rounds": rounds,
        "speed": {case.name: [speed(case, count, rounds, progress) for count in thread_counts] for case in cases},
        "scaling": scaling(1, rounds, progress),
        "memory": memory(SCALING),
        "import": import_seconds(rounds),
    }


def device_folder(device: str) -> str:
    """A folder name for the results of a device.

    Example:
        >>> device_folder("AMD EPYC 9B14 (2 cores)")
        'amd-epyc-9b14-2-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


SPEED_COLUMNS = ("shape", "threads", "figure", "ratio", "goal")


def speed_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the speed table: shape, threads, which ratio, median (lowest-highest), goal on one thread."""
    rows: list[tuple[str, ...]] = []
    for name, measured in results["speed"].items():
        for figures in measured:
            place = (name, str(figures["threads"]))
            for ratio in (*GOALS, "hot pieces / pieces"):
                spread = figures[ratio]
                goal = GOALS.get(ratio, {}).get(name) if figures["threads"] == 1 else None
                cell = f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"
                rows.append((*place, ratio, cell, "" if goal is None else f"{goal:.2f}"))
            rates = figures["GFLOP/s"]
            words = f"{rates['forward']:.0f}, {rates['pieces']:.0f}, {rates['gemm']:.0f}"
            rows.append((*place, "GFLOP/s of forward, pieces, GEMM", words, ""))
    return rows


def other_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the second table: figure, value, goal."""
    peak = results["memory"].get("peak / output bytes", results["memory"].get("skipped"))
    return [
        ("slope of log time against log N, 16384 to 1048576", f"{results['scaling']['slope']:.3f}", "1.00 +- 0.05"),
        ("peak memory of a forward / bytes of its output", str(peak), "at most 2.5"),
        ("seconds that the import adds to torch's", f"{results['import']['seconds']['median']:.3f}", "under 0.3"),
    ]
