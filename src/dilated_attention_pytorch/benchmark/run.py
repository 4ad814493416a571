"""One run of every measurement, as data to store and tables to read."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.benchmark.attention import (
    SCALING,
    SCALING_LENGTHS,
    import_seconds,
    memory,
    scaling,
    speed,
    speed_runs,
)
from dilated_attention_pytorch.benchmark.cases import CASES, Case
from dilated_attention_pytorch.benchmark.grid import measure_grid
from dilated_attention_pytorch.benchmark.locality import measure_orders, order_steps, order_tables
from dilated_attention_pytorch.benchmark.measure import spread_text
from dilated_attention_pytorch.benchmark.parallel import measure_parallel, parallel_steps, parallel_tables
from dilated_attention_pytorch.benchmark.pools import measure_pools, pool_steps, pool_tables
from dilated_attention_pytorch.benchmark.selectors import measure_selectors, selector_steps, selector_tables
from dilated_attention_pytorch.benchmark.sparse import measure_sparse, sparse_steps, sparse_tables
from dilated_attention_pytorch.benchmark.winners import measure_winners, winner_steps, winner_tables
from dilated_attention_pytorch.training.environment import device_name, versions

GOALS: dict[str, dict[str, dict[str, float]]] = {  # what falls short is shown, not hidden
    "sdpa": {
        "forward / pieces": {"A": 0.93, "B": 0.85, "C": 0.95},
        "forward + backward / pieces": {"A": 0.93, "B": 0.83, "C": 0.93},
        "forward / gather-scatter": {"B": 1.5, "C": 1.5},
    },
    "native": {
        "forward / pieces": {"A": 1.15, "B": 1.30, "C": 1.12},
        "forward + backward / pieces": {"A": 1.12, "B": 1.25, "C": 1.12},
        "causal forward / causal pieces": {"B": 1.5},
        "bfloat16 forward / float32 forward": {"A": 0.9, "B": 0.9, "C": 0.9},
        "forward on these threads / on one": {"A": 1.9, "B": 1.9, "C": 1.9},
    },
}
"""By backend, ratio and shape; on one thread, but the ratio of threads on two."""
ON_THREADS = "forward on these threads / on one"


def goal(backend: str, ratio: str, shape: str, threads: int) -> float | None:
    """What a ratio shall reach, or None."""
    if threads != (2 if ratio == ON_THREADS else 1):
        return None
    return GOALS.get(backend, {}).get(ratio, {}).get(shape)


def total_runs(cases: tuple[Case, ...], thread_counts: tuple[int, ...], rounds: int) -> int:
    """How often `run_benchmarks` calls its progress function."""
    tiny = Case("tiny", 4, 1, 4, (4,), (1,))
    runs = sum(len(speed_runs(tiny, count)) for count in thread_counts)
    return rounds * (len(cases) * runs + len(SCALING_LENGTHS))


def about(rounds: int) -> dict[str, Any]:
    """What stands beside all figures: device, system, versions, rounds."""
    return {
        "device": device_name("cpu").partition(",")[0],
        "system": f"{platform.system()} {platform.machine()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "rounds": rounds,
    }


def run_benchmarks(
    cases: tuple[Case, ...] = CASES,
    thread_counts: tuple[int, ...] = (1, 2),
    rounds: int = 5,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Measure speed, scaling, memory and import; a dictionary that JSON can hold."""
    return about(rounds) | {
        "speed": {case.name: [speed(case, count, rounds, progress) for count in thread_counts] for case in cases},
        "scaling": scaling(1, rounds, progress),
        "memory": memory(SCALING),
        "import": import_seconds(rounds),
    }


def run_grid(rounds: int = 5, progress: Callable[[], object] | None = None) -> dict[str, Any]:
    """Measure auto against the best backend on the grid; a dictionary that JSON can hold."""
    return about(rounds) | measure_grid(rounds, progress)


Tables = list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]


@dataclass(frozen=True)
class Study:
    """A measurement of its own: what it is called, how often it reports progress, its results and their tables.

    ``tables`` gives (title, columns, rows, note) of each.
    """

    words: str
    steps: Callable[[int], int]
    measure: Callable[..., dict[str, Any]]
    tables: Callable[[dict[str, Any]], Tables]


STUDIES: dict[str, Study] = {
    "sparse": Study("measuring block-sparse attention", sparse_steps, measure_sparse, sparse_tables),
    "selectors": Study("measuring selectors", selector_steps, measure_selectors, selector_tables),
    "orders": Study("measuring orders of a grid", order_steps, measure_orders, order_tables),
    "winners": Study("measuring where each way wins", winner_steps, measure_winners, winner_tables),
    "parallel": Study("measuring context parallelism", parallel_steps, measure_parallel, parallel_tables),
    "pools": Study("measuring memory pools", pool_steps, measure_pools, pool_tables),
}
"""By the name of the file that their results are stored in."""


def run_study(name: str, rounds: int, progress: Callable[[], object] | None, trained: Path) -> dict[str, Any]:
    """The results of a study; a dictionary that JSON can hold. ``trained`` is the run whose model selectors judge."""
    given = {"run": trained} if name == "selectors" else {}
    return about(rounds) | STUDIES[name].measure(rounds, progress, **given)


def device_folder(device: str) -> str:
    """A folder name for the results of a device.

    Example:
        >>> device_folder("AMD EPYC 9B14 (2 cores)")
        'amd-epyc-9b14-2-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


SPEED_COLUMNS = ("shape", "threads", "backend", "figure", "ratio", "goal")


def speed_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the speed table: shape, threads, backend, which ratio, median (lowest-highest), goal."""
    rows: list[tuple[str, ...]] = []
    for name, measured in results["speed"].items():
        for figures in measured:
            place, rates = (name, str(figures["threads"])), figures["GFLOP/s"]
            for backend, ratios in figures["backends"].items():
                if "absent" in ratios:
                    rows.append((*place, backend, ratios["absent"], "", ""))
                    continue
                for ratio, spread in ratios.items():
                    wanted = goal(backend, ratio, name, figures["threads"])
                    rows.append(
                        (*place, backend, ratio, spread_text(spread), "" if wanted is None else f"{wanted:.2f}")
                    )
                rate = f"{rates[f'{backend} forward']:.0f}, {rates[f'{backend} both']:.0f}"
                rows.append((*place, backend, "GFLOP/s forward, forward + backward", rate, ""))
            rows.append((*place, "", "hot pieces / pieces", spread_text(figures["hot pieces / pieces"]), ""))
            rate = f"{rates['pieces']:.0f}, {rates['pieces, both']:.0f}, {rates['gemm']:.0f}"
            rows.append((*place, "", "GFLOP/s of pieces forward, both, GEMM", rate, ""))
    return rows


def other_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the second table: figure, value, goal."""
    peak = results["memory"].get("peak / output bytes", results["memory"].get("skipped"))
    return [
        ("slope of log time against log N, 16384 to 1048576", f"{results['scaling']['slope']:.3f}", "1.00 +- 0.05"),
        ("peak memory of a forward / bytes of its output", str(peak), "at most 2.5"),
        ("seconds that the import adds to torch's", f"{results['import']['seconds']['median']:.3f}", "under 0.3"),
    ]
