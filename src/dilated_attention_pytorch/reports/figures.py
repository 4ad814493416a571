"""Figures as PNG files. matplotlib is imported when the first one is drawn, and never touches a display."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, LINE = "#1b1f24", "#5b6570", "#d9dee4"
COLOURS = ("#0b6bcb", "#c2410c", "#2e7d32", "#7b3fa0")


@dataclass(frozen=True)
class Curve:
    """One line: points (x, y), standard errors or None, its name, and whether it is a faint or dashed companion."""

    x: Sequence[float]
    y: Sequence[float]
    name: str
    errors: Sequence[float] | None = None
    style: str = "solid"  # or "dashed", "faint"


def check_matplotlib() -> None:
    """matplotlib can be imported. Raises InvalidInput, naming the extra, when it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        fix = "python -m pip install 'dilated-attention-pytorch[plots]'"
        raise InvalidInput(f"figures need matplotlib, which is not installed; {fix}")


@contextmanager
def _figure(path: Path, title: str, x_label: str, y_label: str) -> Iterator[Axes]:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel(x_label, color=SOFT)
    axes.set_ylabel(y_label, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    yield axes
    figure.savefig(path, format="png", facecolor="white")


def line_figure(
    path: Path, title: str, x_label: str, y_label: str, curves: Sequence[Curve], *, ticks: Sequence[int] | None = None
) -> None:
    """A PNG in `path` with one line per curve. With `ticks` the x axis is logarithmic and names exactly those values.

    Raises InvalidInput when matplotlib is not installed.
    """
    with _figure(path, title, x_label, y_label) as axes:
        colours = iter(COLOURS)
        for curve in curves:
            if curve.style == "faint":
                axes.plot(curve.x, curve.y, color=LINE, linewidth=0.9, label=curve.name)
                continue
            colour = next(colours)
            if curve.style == "dashed":
                axes.plot(curve.x, curve.y, "s--", color=colour, markersize=4, linewidth=1.3, label=curve.name)
            elif curve.errors is None:
                axes.plot(curve.x, curve.y, color=colour, linewidth=1.8, label=curve.name)
            else:
                axes.errorbar(
                    curve.x, curve.y, curve.errors, fmt="o-", color=colour, capsize=3, markersize=5, label=curve.name
                )
        if ticks is not None:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=SOFT)


def span_figure(
    path: Path, title: str, x_label: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, str]]]]
) -> None:
    """A PNG in `path` with one bar per row (name, spans), made of spans (start, length, kind); a legend of the kinds.

    Raises InvalidInput when matplotlib is not installed.
    """
    kinds = list(dict.fromkeys(kind for _, spans in rows for *_, kind in spans))
    colours = dict(zip(kinds, COLOURS))
    with _figure(path, title, x_label, "") as axes:
        for y, (_, spans) in enumerate(rows):
            for kind in kinds:
                bars = [(start, length) for start, length, which in spans if which == kind]
                axes.broken_barh(bars, (y - 0.4, 0.8), color=colours[kind])
        for kind in kinds:
            axes.broken_barh([], (0, 0), color=colours[kind], label=kind)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.legend(frameon=False, labelcolor=SOFT)
