"""Measuring on noisy machines: interleaved rounds, ratios within a round, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures, and how many there were.

    Example:
        >>> str(Spread.of([3.0, 1.0, 2.0]))
        '2.00 (1.00-3.00)'
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """The spread of a list that is not empty."""
        return cls(statistics.median(figures), min(figures), max(figures), len(figures))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"

    def to_dict(self) -> dict[str, float]:
        """For JSON, to four digits."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def interleaved_seconds(
    candidates: Mapping[str, Callable[[], object]], rounds: int, progress: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one warm-up call each; each round runs all of them in turn.

    Example:
        >>> seconds = interleaved_seconds({"nothing": lambda: None}, rounds=3)
        >>> len(seconds["nothing"])
        3
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            if progress is not None:
                progress()
    return seconds


def times_faster(seconds: Mapping[str, list[float]], name: str, base: str) -> Spread:
    """How many times faster ``name`` ran than ``base``, round by round.

    Example:
        >>> times_faster({"old": [2.0, 4.0], "new": [1.0, 2.0]}, "new", "old").median
        2.0
    """
    return Spread.of([b / t for b, t in zip(seconds[base], seconds[name])])
