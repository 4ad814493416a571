"""Measuring on noisy machines: interleaved rounds, ratios within a round, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace


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
        return spread_text(asdict(self))

    def times(self, factor: float) -> Spread:
        """The spread of the same figures, each multiplied by a factor above 0."""
        return replace(self, median=factor * self.median, low=factor * self.low, high=factor * self.high)

    def to_dict(self) -> dict[str, float]:
        """For JSON, to four digits."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def spread_text(spread: Mapping[str, float]) -> str:
    """A stored spread as a cell of a table.

    Example:
        >>> spread_text(Spread.of([1.0, 2.0, 3.0]).to_dict())
        '2.00 (1.00-3.00)'
    """
    return f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def goal_text(spread: Mapping[str, float], goal: float | None, at_most: bool = False) -> str:
    """A stored spread as a cell of a table with its goal, and the word "missed" where the median falls short of it.

    Example:
        >>> spread = Spread.of([0.58]).to_dict()
        >>> goal_text(spread, 0.60), goal_text(spread, 1.05, at_most=True), goal_text(spread, None)
        ('0.58 (0.58-0.58), goal 0.60 missed', '0.58 (0.58-0.58), goal at most 1.05', '0.58 (0.58-0.58)')
    """
    if goal is None:
        return spread_text(spread)
    met = spread["median"] <= goal if at_most else spread["median"] >= goal
    return f"{spread_text(spread)}, goal {'at most ' if at_most else ''}{goal:.2f}{'' if met else ' missed'}"


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call.

    Example:
        >>> 0 <= seconds_of(lambda: None) < 1
        True
    """
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved_seconds(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[], object] | None = None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one warm-up call each; each round runs all of them in turn.

    Without ``warm_up`` something alike must have run before.

    Example:
        >>> seconds = interleaved_seconds({"nothing": lambda: None}, rounds=3)
        >>> len(seconds["nothing"])
        3
    """
    for run in candidates.values() if warm_up else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(seconds_of(run))
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
