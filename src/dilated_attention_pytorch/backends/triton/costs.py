"""Which branches share a launch, by a model of time: matrix rate, cache, memory, tail and launch.

One launch for all branches reads and writes each row once, but its tiles hold few rows of a short segment and walk the
keys of several. One launch per branch wastes nothing and pays for rows again. No figure here changes a result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dilated_attention_pytorch.backends.triton.launches import (
    TILE_OVERHEAD,
    Launch,
    Layout,
    key_launches,
    query_launches,
)

MATRIX_SHARE, CACHE_SHARE, MEMORY_SHARE = 0.6, 0.6, 0.9
"""Shares of the peaks that attention kernels are taken to reach: estimates, not measurements."""
SAMPLED_HEADS = 4
"""Heads that an estimate looks at; others are taken to be like them."""


@dataclass(frozen=True)
class Device:
    """Peaks of one kind of GPU: dense half-precision matrix products, caches, memory; and programs that run at once.

    `DEVICES` says which figures are published and which are estimates.
    """

    matrix_tflops: float
    cache_terabytes: float  # per second, L2
    memory_terabytes: float  # per second
    launch_microseconds: float
    slots: int


DEVICES: dict[str, Device] = {
    "H200": Device(989.0, 9.0, 4.8, 5.0, 264),
    "H100": Device(989.0, 9.0, 3.35, 5.0, 264),
    "A100": Device(312.0, 7.2, 2.04, 5.0, 216),
    "MI300X": Device(1307.0, 12.0, 5.3, 10.0, 608),
    "L4": Device(120.0, 2.5, 0.3, 5.0, 116),
}
"""By a part of the device's name. Matrix rates (bf16, dense), memory bandwidths and processors (132, 132, 108, 304, 58;
two slots each) are as published for these GPUs; L2 bandwidths and launch times are estimates."""
GENERIC = Device(200.0, 4.0, 1.0, 5.0, 160)
"""For a GPU that has no entry: an estimate, in the middle of the table."""


def device_named(name: str) -> Device:
    """The figures of the GPU that torch calls ``name``.

    Example:
        >>> device_named("NVIDIA H100 80GB HBM3").memory_terabytes
        3.35
    """
    words = name.upper().replace("-", " ").replace("_", " ").split()
    return next((figures for key, figures in DEVICES.items() if key in words), GENERIC)


class Role(NamedTuple):
    """What a kernel does for a tile: matrix products, rows of q's size that it moves for each row, more with carry."""

    products: int
    own: float
    partners: float
    carried: float


ROLES = {
    "forward": Role(2, 2, 2, 1),  # q, out; k, v; out again
    "queries": Role(3, 3, 2, 3),  # q, dout, dq; k, v; dq is summed in float32
    "keys": Role(4, 4, 2, 6),  # k, v, dk, dv; q, dout; both sums in float32
}


def launch_seconds(
    launch: Launch, layout: Layout, device: Device, head_dim: int, role: str = "forward", element_size: int = 2
) -> float:
    """Estimated time of a launch (seconds), over all samples and heads.

    ``head_dim`` is that of the matrix products, padding included; ``element_size`` in bytes. Float32 is taken to run at
    half the matrix rate of half types. ``role`` is "forward", "queries" (dq) or "keys" (dk, dv).
    """
    work = ROLES[role]
    heads = layout.num_heads // _share(layout, role)
    times = launch.samples * heads / (heads if layout.heads is None else len(layout.heads))
    busy = launch.visited[launch.visited > 0] + TILE_OVERHEAD
    if len(busy) == 0 or times == 0:
        return device.launch_microseconds * 1e-6
    flops = 2.0 * work.products * head_dim * launch.block[0] * element_size / 2
    slot = device.matrix_tflops * 1e12 * MATRIX_SHARE / device.slots
    last = np.sort(busy)[: max(1, int(device.slots / times))]
    tail = float(last.mean()) / 2
    matrix = max(float(busy.sum()) * times / device.slots + tail, float(busy.max())) * flops / slot
    row = float(head_dim * element_size)
    cache = float(launch.visited.sum()) * times * 2 * row
    low, high = layout.keys if role == "keys" else layout.queries
    rows = min(len(busy) * launch.block[0] * times, layout.batch * layout.num_heads * float(high - low))
    shared = work.partners / (1 if role == "keys" else layout.kv_group)
    memory = rows * (work.own + shared + (work.carried if launch.carry else 0)) * row
    seconds = max(
        matrix,
        cache / (device.cache_terabytes * 1e12 * CACHE_SHARE),
        memory / (device.memory_terabytes * 1e12 * MEMORY_SHARE),
    )
    return seconds + device.launch_microseconds * 1e-6


def choose_split(
    layout: Layout,
    block: tuple[int, int],
    device: Device,
    head_dim: int,
    role: str = "forward",
    element_size: int = 2,
) -> tuple[tuple[int, ...], ...]:
    """The branches of each launch that make the estimated time least: ``split`` of `query_launches`, `key_launches`.

    Branches stand in order of their rates, then segments, and launches take neighbours: these share rows and borders.
    """
    numbers = sorted(range(len(layout.branches)), key=lambda i: _order(layout, i))
    if len(numbers) < 2:
        return (tuple(numbers),)
    sample = replace(layout, heads=_planned(layout, role))
    best: list[tuple[float, tuple[tuple[int, ...], ...]]] = [(0.0, ())]
    for stop in range(1, len(numbers) + 1):
        ways = []
        for start in range(stop):
            part = tuple(numbers[start:stop])
            if role == "keys":
                (launch,) = key_launches(sample, block, [part], carry=start > 0)
            else:
                (launch,) = query_launches(sample, block, [part], carry=start > 0, only_lists=role == "queries")
            spent, parts = best[start]
            seconds = launch_seconds(launch, sample, device, head_dim, role, element_size)
            ways.append((spent + seconds, (*parts, part)))
        best.append(min(ways))
    return best[-1][1]


def _share(layout: Layout, role: str) -> int:
    """Query heads that one head of the tiles stands for."""
    return layout.kv_group if role == "keys" else 1


def _planned(layout: Layout, role: str) -> tuple[int, ...]:
    """The heads to estimate from: a few spread over all, or all where branches have heads of their own."""
    count = layout.num_heads // _share(layout, role)
    if count <= SAMPLED_HEADS or any(b.heads is not None for b in layout.branches):
        return tuple(range(count))
    return tuple((2 * i + 1) * count // (2 * SAMPLED_HEADS) for i in range(SAMPLED_HEADS))


def _order(layout: Layout, number: int) -> tuple[int, int]:
    branch = layout.branches[number]
    return branch.dilation_rate, layout.end if branch.segment_length is None else branch.segment_length
