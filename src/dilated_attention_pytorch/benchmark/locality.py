"""Orders of a grid: how much of a token's neighbourhood shares its segment, and whether attention takes as long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dilated_attention_pytorch.benchmark.attention import forward_run, threads
from dilated_attention_pytorch.benchmark.measure import (
    Spread,
    goal_text,
    interleaved_seconds,
    seconds_of,
    spread_text,
    times_faster,
)
from dilated_attention_pytorch.orderings import (
    Order,
    hilbert_order,
    morton_order,
    neighbourhood_share,
    raster_order,
    snake_order,
)
from dilated_attention_pytorch.patterns import longnet

ORDERS: dict[str, Callable[[tuple[int, ...]], Order]] = {
    "Hilbert": hilbert_order,
    "Morton": morton_order,
    "snake": snake_order,
    "raster": raster_order,
}
BASE = "raster"
SAME_TIME = 0.05
"""By how much the time of attention may differ from that in raster order, as a share of it."""


@dataclass(frozen=True)
class GridSizes:
    """A grid of tokens, the segments and rates of the attention on it, and what shares are taken of.

    In segments of 1024, a power of four, Hilbert's and Morton's are the same squares; in segments of 1000 they differ.
    """

    shape: tuple[int, int] = (512, 512)
    segment_lengths: tuple[int, ...] = (1024, 4096)
    dilation_rates: tuple[int, ...] = (1, 4)
    neighbourhoods: tuple[int, ...] = (3, 9)
    share_segments: tuple[int, ...] = (1024, 1000)
    heads: int = 2
    head_dim: int = 16
    thread_count: int = 2

    def describe(self) -> str:
        """The problem in one line."""
        w, r = (" ".join(map(str, x)) for x in (self.segment_lengths, self.dilation_rates))
        rows, columns = self.shape
        return f"{rows} x {columns} tokens, H {self.heads}, D {self.head_dim}, w {w}, r {r}"


def order_steps(rounds: int, sizes: GridSizes = GridSizes()) -> int:
    """How often `measure_orders` calls its progress function."""
    return len(ORDERS) + 2 * len(ORDERS) * rounds


def measure_orders(
    rounds: int, progress: Callable[[], object] | None = None, sizes: GridSizes = GridSizes()
) -> dict[str, Any]:
    """Shares, and seconds of making each order, of putting tokens in it and back, and of attention in it."""
    generator = torch.Generator().manual_seed(0)
    tokens = sizes.shape[0] * sizes.shape[1]
    q, k, v = (torch.randn(1, tokens, sizes.heads, sizes.head_dim, generator=generator) for _ in range(3))
    pattern = longnet(sizes.segment_lengths, sizes.dilation_rates)
    runs: dict[str, Callable[[], object]] = {}
    orders: dict[str, dict[str, Any]] = {}
    with threads(sizes.thread_count):
        for name, make in ORDERS.items():
            order = make(sizes.shape)  # the first call warms up
            made = Spread.of([seconds_of(lambda make=make: make(sizes.shape)) for _ in range(rounds)])  # type: ignore[misc]
            shares = {
                f"{n} x {n}, segments of {w}": round(neighbourhood_share(order, sizes.shape, w, n), 4)
                for w in sizes.share_segments
                for n in sizes.neighbourhoods
            }
            orders[name] = {"shares": shares, "milliseconds to make": made.times(1000).to_dict()}
            runs[name] = forward_run(order.apply(q, 1), order.apply(k, 1), order.apply(v, 1), pattern)
            runs[f"{name}, ordering"] = _there_and_back(order, q, k, v)
            if progress is not None:
                progress()
        seconds = interleaved_seconds(runs, rounds, progress)
    for name, figures in orders.items():
        figures["attention, times as long as raster"] = _times_as_long(seconds, name)
        figures["with ordering, times as long as raster"] = _times_as_long(
            {n: [a + b for a, b in zip(seconds[n], seconds[f"{n}, ordering"])] for n in ORDERS}, name
        )
    return {"shape": sizes.describe(), "threads": sizes.thread_count, "orders": orders}


def _there_and_back(order: Order, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """A call that orders q, k and v, and undoes the order of an output."""

    def run() -> None:
        for x in (q, k, v):
            order.apply(x, 1)
        order.undo(v, 1)

    return run


def _times_as_long(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    return times_faster(seconds, BASE, name).to_dict()


def order_columns(results: dict[str, Any]) -> tuple[str, ...]:
    """The columns of `order_rows`."""
    shares = [f"share of {what}" for what in results["orders"][BASE]["shares"]]
    times = ("attention, times as long as in raster order", "with ordering", "ms to make the order")
    return ("order", *shares, *times)


def order_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each order; a goal that is not reached says so."""
    for name, figures in results["orders"].items():
        shares = [f"{share:.3f}" for share in figures["shares"].values()]
        goal = None if name == BASE else 1 + SAME_TIME
        attention = goal_text(figures["attention, times as long as raster"], goal, at_most=True)
        ordering = spread_text(figures["with ordering, times as long as raster"])
        yield name, *shares, attention, ordering, spread_text(figures["milliseconds to make"])


def order_tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]:
    """(title, columns, rows, note) of the table to show."""
    note = (
        "share: how much of a token's neighbourhood lies in its own segment, itself included. Attention on "
        f"{results['shape']}, {results['threads']} threads: median (lowest-highest).\n"
        '"with ordering" adds putting q, k, v in order and the output back.'
    )
    return [("Orders of a grid", order_columns(results), list(order_rows(results)), note)]
