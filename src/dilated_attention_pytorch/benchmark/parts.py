"""Measurements of one thing each, on any device: speed, the best dense kernel's speed, peaks, slopes, the contract.

`gpu` puts them together for the branches of LongNet and Prov-GigaPath.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import Backend
from dilated_attention_pytorch.backends.sdpa.kernels import Need, choose_kernel
from dilated_attention_pytorch.benchmark.baselines import gather_scatter
from dilated_attention_pytorch.benchmark.cases import Case
from dilated_attention_pytorch.benchmark.measure import Spread, interleaved_seconds
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import longnet
from dilated_attention_pytorch.testing import CASES, ContractReport, ContractViolation
from dilated_attention_pytorch.testing import Case as ContractCase
from dilated_attention_pytorch.testing.contract import check_case

DENSE_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "the device's own": SDPBackend.OVERRIDEABLE,
}
"""PyTorch's dense kernels, the best of which is the yardstick."""


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call of ``run`` that ends when the device has done its work."""

    def call() -> None:
        run()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    return call


def spread_of(run: Callable[[], object], device: torch.device, rounds: int) -> Spread:
    """Seconds of a call until the device has finished."""
    return Spread.of(interleaved_seconds({"it": finished(run, device)}, rounds)["it"])


def inputs(case: Case, device: torch.device, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Normal numbers of shape (1, N, H, D), ``count`` tensors of them."""
    shape = (1, case.tokens, case.heads, case.head_dim)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]


def attend_run(
    case: Case, device: torch.device, dtype: torch.dtype, backend: str, with_backward: bool = False
) -> Callable[[], object]:
    """A call of `attend` with the branches of the case."""
    q, k, v, dout = inputs(case, device, dtype, 4)
    pattern = longnet(case.segment_lengths, case.dilation_rates)
    leaves = [x.requires_grad_() for x in (q, k, v)] if with_backward else []

    def run() -> None:
        with torch.set_grad_enabled(with_backward):
            out = attend(q, k, v, pattern, backend=backend)
        if with_backward:
            torch.autograd.grad(out, leaves, dout)

    return run


def dense_seconds(
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    with_backward: bool = False,
    rounds: int = 3,
    kernels: Mapping[str, SDPBackend] = DENSE_KERNELS,
) -> dict[str, Spread]:
    """Seconds of full attention (batch, heads, N, D) by each of PyTorch's kernels that takes it, by name."""
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)] if with_backward else []

    def run() -> None:
        with torch.set_grad_enabled(with_backward):
            out = scaled_dot_product_attention(q, k, v)
        if with_backward:
            torch.autograd.grad(out, leaves, dout)

    found: dict[str, Spread] = {}
    for name, kernel in kernels.items():
        with sdpa_kernel([kernel]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says why a kernel will not, one warning for each reason
            try:
                found[name] = spread_of(run, device, rounds)
            except RuntimeError:
                continue  # it does not take this device, dtype or shape
    if not found:
        raise InvalidInput(f"no dense kernel of PyTorch's takes {dtype} of shape {shape} on {device}")
    return found


def yardstick(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    with_backward: bool,
    rounds: int,
    kernels: Mapping[str, SDPBackend] = DENSE_KERNELS,
) -> dict[str, Any]:
    """FLOP/s of the best dense kernel on contiguous problems of the length ``w / r`` of each branch, all together."""
    flops, seconds, names = 0.0, 0.0, []
    for segment_length, rate in zip(case.segment_lengths, case.dilation_rates):
        w = min(segment_length, case.tokens)
        shape = (case.tokens // w, case.heads, -(-w // rate), case.head_dim)
        found = dense_seconds(shape, device, dtype, with_backward, rounds, kernels)
        name = min(found, key=lambda n: found[n].median)
        names.append(name)
        seconds += found[name].median
        flops += 4.0 * case.head_dim * shape[0] * shape[1] * shape[2] ** 2 * (3.5 if with_backward else 1.0)
    return {"FLOP/s": flops / seconds, "kernels": names}


def gather_scatter_run(case: Case, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A call of the gather-and-scatter dataflow on the fused kernel that sdpa would take for the longest branch."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    is_rocm = torch.version.hip is not None
    kernel = choose_kernel(Need(device.type, dtype, case.head_dim, capability=capability, is_rocm=is_rocm))
    if isinstance(kernel, str):
        raise InvalidInput(f"gather-scatter: {kernel}")
    q, k, v = inputs(case, device, dtype)

    def run() -> None:
        with torch.no_grad():
            gather_scatter(case, q, k, v, kernel)

    return run


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call adds to what was allocated before, at its peak; what it returns is held until it ends.

    Raises InvalidInput on a CPU, where PyTorch does not count.
    """
    if device.type == "cpu":
        raise InvalidInput("peak memory is counted on accelerators; on a CPU see benchmark.attention.memory")
    module = torch.get_device_module(device)
    run()
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    run()
    module.synchronize(device)
    return int(module.max_memory_allocated(device) - before)


def slope(
    case: Case, lengths: Iterable[int], device: torch.device, dtype: torch.dtype, backend: str, rounds: int
) -> dict[str, Any]:
    """Seconds of a forward against N at fixed branches, and the slope of their logarithms: 1 is linear."""
    medians: dict[int, float] = {}
    skipped: dict[str, str] = {}
    for n in lengths:
        try:
            run = attend_run(replace(case, tokens=n), device, dtype, backend)
            medians[n] = spread_of(run, device, rounds).median
        except torch.OutOfMemoryError:
            skipped[str(n)] = "out of memory"
    figure = None
    if len(medians) > 1:
        logs = (np.log(list(medians)), np.log(list(medians.values())))
        figure = round(float(np.polyfit(*logs, 1)[0]), 4)
    return {"seconds": {str(n): s for n, s in medians.items()}, "slope": figure, "skipped": skipped}


def contract_on(
    backend: Backend,
    device: torch.device,
    seconds: float,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    cases: tuple[ContractCase, ...] = CASES,
) -> dict[str, Any]:
    """What the contract says of a backend on a device, within so many seconds, cases of all kinds first.

    ``passed`` is True when every case that was checked held and at least one was not refused.
    """
    report, end = ContractReport(), time.perf_counter() + seconds
    seen = 0
    stride = max(1, math.isqrt(len(cases)))
    order = [case for first in range(stride) for case in cases[first::stride]]
    all_dtypes = tuple(dtypes)
    for case in order:
        for dtype in all_dtypes:
            try:
                check_case(backend, case, dtype, device, report)
            except (ContractViolation, RuntimeError) as error:
                words = f"{case.name} {dtype}: {error}".partition("\n")[0]
                return {"passed": False, "violation": words, "checks": report.checked, "cases": seen}
        seen += 1
        if time.perf_counter() > end:
            break
    return {"passed": report.checked > 0, "checks": report.checked, "cases": seen, "of": len(cases)}
