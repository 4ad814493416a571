"""Each use of the memory pool with the pool and without it: time, and the most memory that a process held."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.benchmark.attention import forward_run, threads, training_run
from dilated_attention_pytorch.benchmark.crew import crew
from dilated_attention_pytorch.benchmark.measure import Spread, interleaved_seconds, spread_text, times_faster
from dilated_attention_pytorch.memory import (
    USES,
    MemoryPoolConfig,
    UnifiedMemoryPool,
    pooled_uses,
    reset_global_memory_pool,
)
from dilated_attention_pytorch.memory.snapshot import MIB
from dilated_attention_pytorch.memory.trial import seconds_per_hit
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.parallel.layouts import Layout
from dilated_attention_pytorch.patterns import Pattern, local_window, longnet

FASTER = 1.03
"""A use is worth a pool from so many times as fast on ..."""
SMALLER = 0.9
"""... or from so much of the peak memory."""
THREADS = 2
RANKS = 2
PEAK_CALLS = 3
"""Calls whose peak is taken: the pool holds then what it will hold."""
HIT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class PoolCase:
    """A call in which a use of `USES` asks for large buffers; ``method`` is that of two ranks, "" is one process."""

    use: str
    name: str
    tokens: int
    heads: int
    head_dim: int
    pattern: Pattern
    backend: str = "auto"
    method: str = ""
    training: bool = False

    def describe(self) -> str:
        """The case in one line."""
        work = "forward + backward" if self.training else "forward"
        where = f", {self.method} of {RANKS} ranks" if self.method else ""
        return f"{self.name}, {work}, {self.backend}{where}, N {self.tokens}, H {self.heads}, D {self.head_dim}"


def pool_cases() -> tuple[PoolCase, ...]:
    """What is measured: every use where its buffers are large, under light and heavy patterns."""
    light, heavy = longnet([512, 2048, 8192], [1, 4, 16]), longnet([1024, 8192, 65536], [1, 4, 16])
    whole, window = longnet([2048, 1 << 18], [1, 128]), local_window(1 << 18, block_size=128, window=256)
    far = longnet([2048, 1 << 16], [1, 16])
    return (
        PoolCase("results", "w 512 2048 8192", 1 << 17, 8, 64, light),
        PoolCase("results", "w 512 2048 8192", 1 << 16, 8, 64, light, training=True),
        PoolCase("results", "w 1024 8192 65536", 1 << 16, 8, 64, heavy),
        PoolCase("results", "w 1024 8192 65536", 1 << 16, 8, 64, heavy, training=True),
        PoolCase("work", "w 2048 262144", 1 << 18, 1, 64, whole, "sdpa"),
        PoolCase("tiles", "window of 256", 1 << 18, 1, 64, window, "sdpa"),
        PoolCase("ring", "w 2048 65536", 1 << 16, 8, 64, far, method="ring"),
        PoolCase("ring", "w 2048 65536", 1 << 16, 8, 64, far, method="ring", training=True),
        PoolCase("exchange", "w 2048 65536", 1 << 16, 8, 64, far, method="all_to_all"),
        PoolCase("exchange", "w 2048 65536", 1 << 16, 8, 64, far, method="gather", training=True),
    )


def pool_steps(rounds: int, cases: tuple[PoolCase, ...] | None = None) -> int:
    """How often `measure_pools` calls its progress function."""
    return len(pool_cases() if cases is None else cases) * 2 * rounds


def measure_pools(
    rounds: int, progress: Callable[[], object] | None = None, cases: tuple[PoolCase, ...] | None = None
) -> dict[str, Any]:
    """Every case with the pool for its use alone, and with none; the time of a hit; a dictionary that JSON can hold."""
    measured = []
    for case in pool_cases() if cases is None else cases:
        seconds = _seconds_of_ranks(case, rounds, progress) if case.method else _seconds(case, rounds, progress)
        peaks: dict[str, int] | None = None
        if Path("/proc/self/clear_refs").exists():
            peaks = {name: _peak(case, name) for name in ("with", "without")}
        measured.append(
            {
                "use": case.use,
                "case": case.describe(),
                "times as fast with the pool": times_faster(seconds, "with", "without").to_dict(),
                "seconds without": Spread.of(seconds["without"]).to_dict(),
                "peak bytes": peaks,
            }
        )
    reset_global_memory_pool()
    pool = UnifiedMemoryPool(MemoryPoolConfig())
    hits = {
        str(dtype).removeprefix("torch."): round(1e6 * seconds_per_hit(pool, dtype=dtype), 3) for dtype in HIT_DTYPES
    }
    return {"threads": THREADS, "cases": measured, "microseconds per hit": hits}


def verdict(of: Mapping[str, Any]) -> str:
    """What a pool does to a measured case: "loses" in time or in peak memory, else "gains" in one of them, or "even".

    Example:
        >>> verdict({"times as fast with the pool": {"median": 1.02}, "peak bytes": {"with": 10, "without": 10}})
        'even'
    """
    faster, peaks = of["times as fast with the pool"]["median"], of["peak bytes"]
    larger = 1.0 if peaks is None else peaks["with"] / peaks["without"]
    if faster <= 1 / FASTER or larger >= 1 / SMALLER:
        return "loses"
    return "gains" if faster >= FASTER or larger <= SMALLER else "even"


def _chosen(case: PoolCase, name: str) -> tuple[str, ...]:
    return (case.use,) if name == "with" else ()


def _seconds(case: PoolCase, rounds: int, progress: Callable[[], object] | None) -> dict[str, list[float]]:
    run = _local_run(case)

    def pooled(name: str) -> Callable[[], object]:
        def call() -> None:
            with pooled_uses(_chosen(case, name)):
                run()

        return call

    with threads(THREADS):
        return interleaved_seconds({name: pooled(name) for name in ("without", "with")}, rounds, progress)


def _seconds_of_ranks(case: PoolCase, rounds: int, progress: Callable[[], object] | None) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with crew(RANKS, lambda: _jobs(case)) as run:
        for number in range(rounds + 1):
            for name, taken in seconds.items():
                once = run(name).seconds
                if number > 0:  # the first round warms up
                    taken.append(once)
                    if progress is not None:
                        progress()
    return seconds


def _peak(case: PoolCase, name: str) -> int:
    """The most bytes that a process (of several, the largest) held above what it held before its first call."""
    with crew(RANKS if case.method else 1, lambda: _jobs(case)) as run:
        return int(max(run(f"peak {name}").results))


def _jobs(case: PoolCase) -> dict[str, Callable[[], object]]:
    reset_global_memory_pool()  # a forked process has that of its parent
    call = _rank_run(case) if case.method else _local_run(case)

    def job(name: str, peak: bool) -> Callable[[], object]:
        def run() -> object:
            with pooled_uses(_chosen(case, name)):
                return _peak_of(call) if peak else call()

        return run

    names = ("with", "without")
    return {name: job(name, False) for name in names} | {f"peak {name}": job(name, True) for name in names}


def _peak_of(call: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = _resident("VmRSS")
    for _ in range(PEAK_CALLS):
        call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _local_run(case: PoolCase) -> Callable[[], object]:
    q, k, v, dout = _inputs(case, case.tokens)
    if case.training:
        return training_run(q, k, v, dout, case.pattern, case.backend)
    return forward_run(q, k, v, case.pattern, case.backend)


def _rank_run(case: PoolCase) -> Callable[[], object]:
    q, k, v, dout = _inputs(case, Layout("contiguous", case.tokens, RANKS).count(dist.get_rank()))
    context = ContextParallel(method=case.method)
    leaves = [x.requires_grad_(case.training) for x in (q, k, v)]

    def run() -> None:
        out = context.attend(leaves[0], leaves[1], leaves[2], case.pattern, backend=case.backend)
        if case.training:
            torch.autograd.grad(out, leaves, dout)

    return run


def _inputs(case: PoolCase, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, tokens, case.heads, case.head_dim, generator=generator) for _ in range(4))


POOL_COLUMNS = ("use", "case", "times as fast with the pool", "peak memory with the pool, MiB", "verdict", "switched")


def pool_tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]:
    """(title, columns, rows, note) of the table to show."""
    rows: list[tuple[str, ...]] = [
        (
            of["use"],
            of["case"],
            spread_text(of["times as fast with the pool"]),
            _peak_text(of["peak bytes"]),
            verdict(of),
            "on" if USES[of["use"]].pooled else "off",
        )
        for of in results["cases"]
    ]
    hits = ", ".join(f"{name} {time:.2f}" for name, time in results["microseconds per hit"].items())
    note = (
        f"float32; one process of {results['threads']} threads, or {RANKS} processes of one thread. The pool serves "
        "the use of the row and no other, against none at all.\n"
        f"Gains: at least {FASTER:.2f} times as fast, or at most {SMALLER:.2f} of the peak memory; loses: as much the "
        "other way, in either. A use is on where a case gains and none loses.\n"
        f"Peak memory: what {PEAK_CALLS} calls in a fresh process held at most above its inputs, with the pool and "
        "without.\n"
        f"A hit takes, in microseconds: {hits}; goal under 2."
    )
    uses = "\n".join(f"{name}: {use.what}" for name, use in USES.items())
    return [("Memory with the pool and without", POOL_COLUMNS, rows, f"{note}\n{uses}")]


def _peak_text(peaks: Mapping[str, int] | None) -> str:
    if peaks is None:
        return "needs /proc/self/clear_refs"
    return f"{peaks['with'] / MIB:.0f}, without {peaks['without'] / MIB:.0f}"
