"""The figures of `make bench`: speed against two baselines, time against length, memory, and time to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.benchmark.baselines import gather_scatter, ready_made_pieces
from dilated_attention_pytorch.benchmark.cases import Case
from dilated_attention_pytorch.benchmark.measure import Spread, interleaved_seconds, times_faster
from dilated_attention_pytorch.patterns import Causal, Pattern, longnet

SCALING_LENGTHS = tuple(2**n for n in range(14, 21))
SCALING = Case("N", SCALING_LENGTHS[-1], 2, 16, (1024, 2048, 4096), (1, 2, 4))
GEMM_SIZE = 2048

SPEED_BACKENDS = ("sdpa", "native")
"""The backends whose speed is measured against the yardsticks."""
RATIOS = {
    "forward / pieces": ("{} forward", "pieces"),
    "forward + backward / pieces": ("{} both", "pieces, both"),
    "forward / gather-scatter": ("{} forward", "gather-scatter"),
    "causal forward / causal pieces": ("{} causal", "causal pieces"),
    "bfloat16 forward / float32 forward": ("{} bfloat16", "{} forward"),
    "forward on these threads / on one": ("{} forward", "{} one thread"),
}
"""How many times faster the first run is than the second; a name stands for {}."""

Progress = Callable[[], object]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it, PyTorch's kernels run on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def absent(name: str) -> str | None:
    """Why the backend of this name cannot be measured here, or None."""
    backend = next((b for b in BACKENDS if b.name == name), None)
    return f"there is no backend {name!r}" if backend is None else backend.import_error()


def speed_runs(case: Case, thread_count: int) -> dict[str, Callable[[], object]]:
    """What `speed` measures: the yardsticks, and for each backend that is here "<name> <what>"."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.tokens, case.heads, case.head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    pattern = longnet(case.segment_lengths, case.dilation_rates)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=generator)
    runs: dict[str, Callable[[], object]] = {
        "pieces": ready_made_pieces(case, False),
        "hot pieces": ready_made_pieces(case, False, one_head_at_a_time=True),
        "pieces, both": ready_made_pieces(case, True),
        "gather-scatter": lambda: gather_scatter(case, q, k, v),
        "gemm": lambda: square @ square,
    }
    here = [name for name in SPEED_BACKENDS if absent(name) is None]
    for name in here:
        runs[f"{name} forward"] = forward_run(q, k, v, pattern, name)
        runs[f"{name} both"] = training_run(q, k, v, dout, pattern, name)
        if thread_count > 1:
            runs[f"{name} one thread"] = _on_threads(1, runs[f"{name} forward"])
    if "native" in here:
        runs["causal pieces"] = ready_made_pieces(case, False, is_causal=True)
        runs["native causal"] = forward_run(q, k, v, pattern & Causal(), "native")
        runs["native bfloat16"] = forward_run(q.bfloat16(), k.bfloat16(), v.bfloat16(), pattern, "native")
    return runs


def speed(case: Case, thread_count: int, rounds: int, progress: Progress | None = None) -> dict[str, Any]:
    """Each backend's speed on a shape, as ratios to the ready-made pieces and to the gather-and-scatter dataflow."""
    with threads(thread_count):
        seconds = interleaved_seconds(speed_runs(case, thread_count), rounds, progress)
    rates = {
        name: round(float(case.flops("both" in name) / np.median(seconds[name]) / 1e9), 1)
        for name in seconds
        if name != "gemm" and "causal" not in name
    }
    rates["gemm"] = round(2 * GEMM_SIZE**3 / float(np.median(seconds["gemm"])) / 1e9, 1)
    return {
        "shape": case.describe(),
        "threads": thread_count,
        "dtype": "float32",
        "hot pieces / pieces": times_faster(seconds, "hot pieces", "pieces").to_dict(),
        "backends": {name: _ratios(seconds, name) for name in SPEED_BACKENDS},
        "GFLOP/s": rates,
    }


def _ratios(seconds: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    """Every ratio of a backend whose two sides were measured, or the reason why it is absent."""
    why = absent(name)
    if why is not None:
        return {"absent": why}
    sides = {ratio: (mine.format(name), base.format(name)) for ratio, (mine, base) in RATIOS.items()}
    return {
        ratio: times_faster(seconds, mine, base).to_dict()
        for ratio, (mine, base) in sides.items()
        if mine in seconds and base in seconds
    }


def _on_threads(count: int, run: Callable[[], object]) -> Callable[[], None]:
    def on_threads() -> None:
        with threads(count):
            run()

    return on_threads


def forward_run(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, backend: str = "auto") -> Callable[[], object]:
    """A call of `attend` without gradients."""

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v, pattern, backend=backend)

    return forward


def training_run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pattern: Pattern, backend: str) -> Callable[[], object]:
    """A call of `attend` and of its backward pass."""
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))

    def both() -> None:
        torch.autograd.grad(attend(leaves[0], leaves[1], leaves[2], pattern, backend=backend), leaves, dout)

    return both


def scaling(thread_count: int, rounds: int, progress: Progress | None = None) -> dict[str, Any]:
    """Seconds of a forward against N at fixed branches, and the slope of their logarithms (1 is linear)."""
    runs: dict[str, Callable[[], object]] = {}
    for n in SCALING_LENGTHS:
        q, k, v = (torch.randn(1, n, SCALING.heads, SCALING.head_dim) for _ in range(3))
        runs[str(n)] = forward_run(q, k, v, longnet(SCALING.segment_lengths, SCALING.dilation_rates))
    with threads(thread_count), torch.no_grad():
        seconds = interleaved_seconds(runs, rounds, progress)
    spreads = {n: Spread.of(seconds[str(n)]) for n in SCALING_LENGTHS}
    medians = [spreads[n].median for n in SCALING_LENGTHS]
    slope = np.polyfit(np.log(SCALING_LENGTHS), np.log(medians), 1)[0]
    return {
        "shape": f"H {SCALING.heads}, D {SCALING.head_dim}, w {SCALING.segment_lengths}, r {SCALING.dilation_rates}",
        "threads": thread_count,
        "seconds": {str(n): spread.to_dict() for n, spread in spreads.items()},
        "slope": round(float(slope), 4),
    }


_MEMORY_PROGRAM = """
import re, sys, torch
from dilated_attention_pytorch import longnet_attention
n, h, d = map(int, sys.argv[1:4])
w, r = ([int(x) for x in arg.split(",")] for arg in sys.argv[4:6])
torch.set_num_threads(1)
def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
with torch.no_grad():
    small = torch.randn(1, max(w), h, d)
    longnet_attention(small, small, small, w, r)
    q, k, v = (torch.randn(1, n, h, d) for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    out = longnet_attention(q, k, v, w, r)
    print((kib("VmHWM") - before) * 1024 / (out.numel() * out.element_size()))
"""


def memory(case: Case) -> dict[str, Any]:
    """Peak memory of a forward without gradients, its output included, over the bytes of the output; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return {"shape": case.describe(), "skipped": "needs /proc/self/clear_refs, which only Linux has"}
    sizes = (case.tokens, case.heads, case.head_dim)
    lists = (",".join(map(str, x)) for x in (case.segment_lengths, case.dilation_rates))
    answer = _python(_MEMORY_PROGRAM, *map(str, sizes), *lists)
    return {"shape": case.describe(), "peak / output bytes": round(float(answer), 3)}


_IMPORT_PROGRAM = """
import time
import torch
start = time.perf_counter()
import dilated_attention_pytorch
print(time.perf_counter() - start)
"""


def import_seconds(rounds: int) -> dict[str, Any]:
    """Seconds that `import dilated_attention_pytorch` adds to `import torch`, in fresh processes."""
    return {"seconds": Spread.of([float(_python(_IMPORT_PROGRAM)) for _ in range(rounds)]).to_dict()}


def _python(program: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
