"""`bench --gpu`: the contract on the device first, then speed against dense kernels and the gather-scatter dataflow.

A backend that breaks the contract gets no figure. What does not fit the time or the memory is named as skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends import BACKENDS, Backend, needs_tiles, reasons
from dilated_attention_pytorch.backends.tuning import device_name
from dilated_attention_pytorch.benchmark import parts
from dilated_attention_pytorch.benchmark.cases import GIGAPATH, PAPER, Case
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import longnet
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.training.environment import versions

Tables = list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: lengths in tokens, seconds for the contract of each backend and for everything."""

    cases: tuple[Case, ...] = (PAPER, GIGAPATH)
    tokens: tuple[int, ...] = (10_000, 65_536, 1 << 20)
    dataflow: int = 1 << 20
    dense: tuple[int, ...] = (65_536, 131_072)
    slope: tuple[int, ...] = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
    contract_seconds: float = 75.0
    seconds: float = 450.0
    dtype: torch.dtype = torch.bfloat16


DATAFLOW_GOALS = {"paper": 1.8, "GigaPath": 1.2}
SPEED_GOALS = {"forward": 0.80, "forward + backward": 0.70}
MEMORY_GOAL, DENSE_GOAL, PEAK_GOAL = 3.0, 0.7, 1.10


def find_device() -> torch.device:
    """The GPU to measure on. Raises InvalidInput where PyTorch sees none."""
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return torch.device(kind, module.current_device())
    raise InvalidInput(
        "bench --gpu: expected a GPU that PyTorch can use (CUDA, ROCm or XPU). Got none; leave out --gpu to measure "
        "on the CPU, or install the build of torch for this GPU."
    )


def backends_on(device: torch.device, dtype: torch.dtype) -> tuple[list[Backend], dict[str, list[str]]]:
    """The fused backends that can run LongNet's branches on the device, and the reasons against the others.

    `dense` and those that need tables of tiles for it are left out: they are not for long sequences.
    """
    able, against = [], {}
    x = torch.zeros(1, 4096, 2, 64, device=device, dtype=dtype)
    problem = make_problem(x, x, x, scale=0.125, query_start=0, needs_grad=True)
    plans = candidate_plans(longnet([1024, 4096], [1, 4]), problem)
    for backend in BACKENDS:
        if backend.name == "dense" or needs_tiles(backend.name):
            continue
        plan, why = reasons(backend, problem, plans)
        if plan is None:
            against[backend.name] = why
        else:
            able.append(backend)
    return able, against


@dataclass
class Course:
    """A run through all parts, which ends in time."""

    device: torch.device
    rounds: int
    sizes: Sizes
    names: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    end: float = 0.0

    def each(self, words: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The figures of a part, or None when time or memory is out."""
        if time.perf_counter() > self.end:
            self.skipped.append(f"{words}: out of time")
            return None
        try:
            return measure()
        except torch.OutOfMemoryError:
            self.skipped.append(f"{words}: out of memory")
            return None
        finally:
            if self.device.type != "cpu":
                torch.get_device_module(self.device).empty_cache()

    def speed(self, case: Case, with_backward: bool) -> dict[str, Any]:
        """Useful FLOP/s of each backend over those of the best dense kernel on problems of the same length."""
        device, dtype = self.device, self.sizes.dtype
        best = parts.yardstick(case, device, dtype, with_backward, self.rounds, dense_kernels(device))
        rows = {}
        for name in self.names:
            spread = parts.spread_of(parts.attend_run(case, device, dtype, name, with_backward), device, self.rounds)
            rate = case.flops(with_backward) / spread.median
            rows[name] = {
                "seconds": spread.to_dict(),
                "TFLOP/s": round(rate / 1e12, 3),
                "ratio": round(rate / best["FLOP/s"], 4),
            }
        work = "forward + backward" if with_backward else "forward"
        return {
            "case": case.name,
            "tokens": case.tokens,
            "work": work,
            "goal": SPEED_GOALS[work],
            "dense TFLOP/s": round(best["FLOP/s"] / 1e12, 3),
            "dense kernels": best["kernels"],
            "backends": rows,
        }

    def dataflow(self, case: Case, name: str) -> dict[str, Any]:
        """How many times faster than gather-and-scatter, and with how many times less memory at the peak."""
        device, dtype = self.device, self.sizes.dtype
        theirs = parts.gather_scatter_run(case, device, dtype)
        their_seconds, their_peak = parts.spread_of(theirs, device, self.rounds), self.peak(theirs)
        del theirs
        ours = parts.attend_run(case, device, dtype, name)
        our_seconds, our_peak = parts.spread_of(ours, device, self.rounds), self.peak(ours)
        result = case.tokens * case.heads * (case.head_dim * dtype.itemsize + 4)  # out and lse
        return {
            "case": case.name,
            "tokens": case.tokens,
            "backend": name,
            "times faster": round(their_seconds.median / our_seconds.median, 3),
            "goal": DATAFLOW_GOALS.get(case.name),
            "times less memory": _ratio(their_peak, our_peak),
            "memory goal": MEMORY_GOAL,
            "peak / (out + lse)": _ratio(our_peak, result),
            "peak goal": PEAK_GOAL,
        }

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes at the peak, or None where PyTorch does not count them."""
        return None if self.device.type == "cpu" else parts.peak_bytes(run, self.device)

    def against_dense(self, case: Case, name: str) -> dict[str, Any]:
        """How many times faster than dense attention, as a share of the ratio of FLOPs."""
        device, dtype = self.device, self.sizes.dtype
        shape = (1, case.heads, case.tokens, case.head_dim)
        dense = parts.dense_seconds(shape, device, dtype, rounds=self.rounds, kernels=dense_kernels(device))
        ours = parts.spread_of(parts.attend_run(case, device, dtype, name), device, self.rounds)
        faster = min(s.median for s in dense.values()) / ours.median
        fewer = case.heads * case.tokens**2 / case.pairs
        return {
            "case": case.name,
            "tokens": case.tokens,
            "backend": name,
            "times faster": round(faster, 3),
            "times fewer FLOPs": round(fewer, 3),
            "share": round(faster / fewer, 4),
            "goal": DENSE_GOAL,
        }


def dense_kernels(device: torch.device) -> Any:
    """The kernels of PyTorch's to compare with on this device."""
    chosen = parts.DENSE_KERNELS
    return {"flash": chosen["flash"]} if device.type == "cpu" else chosen


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a / b, 3)


def run_gpu(
    device: torch.device,
    rounds: int = 5,
    progress: Callable[[float], object] | None = None,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Everything, the contract first, as a dictionary that JSON can hold; ``progress`` gets the share done."""
    sizes = sizes or Sizes()
    course = Course(device, rounds, sizes, end=time.perf_counter() + sizes.seconds)
    able, against = backends_on(device, sizes.dtype)
    steps = len(able) + 2 * len(sizes.cases) * len(sizes.tokens) + len(sizes.cases) + len(sizes.dense) + 1
    done = 0

    def count(result: Any) -> Any:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / steps)
        return result

    contract = {b.name: count(parts.contract_on(b, device, sizes.contract_seconds)) for b in able}
    course.names = [name for name, found in contract.items() if found["passed"]]
    first = sizes.cases[0]
    results: dict[str, Any] = {
        "device": device_name(device),
        "versions": versions(),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "rounds": rounds,
        "against": against,
        "contract": contract,
        "speed": [],
        "gather-scatter": [],
        "dense": [],
        "slope": None,
        "skipped": course.skipped,
    }
    if not course.names:
        course.skipped.append("every speed: no fused backend passes the contract on this device")
        return results
    for case in (replace(c, tokens=n) for n in sizes.tokens for c in sizes.cases):
        for both in (False, True):
            words = f"speed of {case.name} at {case.tokens}"
            results["speed"].append(count(course.each(words, partial(course.speed, case, both))))
    best = fastest(results["speed"], course.names)
    for case in (replace(c, tokens=sizes.dataflow) for c in sizes.cases):
        words = f"gather-scatter, {case.name}"
        results["gather-scatter"].append(count(course.each(words, partial(course.dataflow, case, best))))
    for case in (replace(first, tokens=n) for n in sizes.dense):
        words = f"dense, {case.tokens}"
        results["dense"].append(count(course.each(words, partial(course.against_dense, case, best))))
    slope = partial(parts.slope, first, sizes.slope, device, sizes.dtype, best, rounds)
    results["slope"] = count(course.each("slope", slope))
    for name in ("speed", "gather-scatter", "dense"):
        results[name] = [figures for figures in results[name] if figures is not None]
    return results


def fastest(speed: list[dict[str, Any] | None], names: list[str]) -> str:
    """The backend with the highest ratios on the whole."""

    def mean(name: str) -> float:
        ratios: list[float] = [
            row["backends"][name]["ratio"] for row in speed if row is not None and name in row["backends"]
        ]
        return sum(ratios) / max(1, len(ratios))

    return max(names, key=mean)


def gpu_tables(results: dict[str, Any]) -> Tables:
    """(title, columns, rows) of each table to print."""
    contract: list[tuple[str, ...]] = [
        (name, "passed" if c["passed"] else c.get("violation", "nothing could be checked"), str(c["checks"]))
        for name, c in results["contract"].items()
    ]
    contract += [(name, "; ".join(why), "") for name, why in results["against"].items()]
    title = f"{results['device']}, {results['dtype']}, torch {results['versions']['torch']}, {results['rounds']} rounds"
    return [
        ("The contract on this device", ("backend", "answer", "checks"), contract),
        (
            f"Useful TFLOP/s over the best dense kernel's: {title}",
            ("branches", "tokens", "work", "backend", "TFLOP/s", "dense", "ratio", "goal"),
            list(_speed_rows(results)),
        ),
        (
            "Against gather-and-scatter, dense attention, and the least possible",
            ("what", "tokens", "backend", "measured", "goal"),
            list(_other_rows(results)),
        ),
    ]


def _speed_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in results["speed"]:
        dense = f"{row['dense TFLOP/s']:.1f} ({', '.join(sorted(set(row['dense kernels'])))})"
        for name, figures in row["backends"].items():
            rate, ratio = f"{figures['TFLOP/s']:.1f}", f"{figures['ratio']:.2f}"
            yield row["case"], str(row["tokens"]), row["work"], name, rate, dense, ratio, f"{row['goal']:.2f}"


def _other_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in results["gather-scatter"]:
        place = (str(row["tokens"]), row["backend"])
        for words, figure, goal in (
            ("times faster than gather-scatter", "times faster", row["goal"]),
            ("times less memory than gather-scatter", "times less memory", row["memory goal"]),
            ("peak memory / (out + lse)", "peak / (out + lse)", f"at most {row['peak goal']}"),
        ):
            yield f"{row['case']}: {words}", *place, _shown(row[figure]), _shown(goal)
    for row in results["dense"]:
        words = f"{row['case']}: times faster than dense, over times fewer FLOPs ({row['times fewer FLOPs']:.1f})"
        yield words, str(row["tokens"]), row["backend"], _shown(row["share"]), _shown(row["goal"])
    if results["slope"] is not None:
        lengths = ", ".join(results["slope"]["seconds"])
        yield "slope of log time against log N", lengths, "", _shown(results["slope"]["slope"]), "1.00 +- 0.05"
    for words in results["skipped"]:
        yield "skipped", "", "", words, ""


def _shown(value: Tensor | float | str | None) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
