"""Dense problems between runs of queries and runs of keys that a window or the causal order lets see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dilated_attention_pytorch.patterns import Causal, Full, Pattern, Window
from dilated_attention_pytorch.problem import Run


class Shape(NamedTuple):
    """A dense problem in places of a grid."""

    is_causal: bool
    window: int | None
    queries: Run
    keys: Run

    @property
    def pattern(self) -> Pattern:
        """Which place sees which."""
        window = Full() if self.window is None else Window(self.window)
        return window & Causal() if self.is_causal else window


def splits(
    is_causal: bool, window: int | None, queries: Sequence[Run], keys: Sequence[Run]
) -> Iterator[tuple[Shape, list[int], list[int]]]:
    """Dense problems that together hold the visible pairs: their shape, and the numbers of their runs in row order.

    Runs of one side are disjoint. No two problems share both a query and a key.

    Example:
        >>> for shape, rows, seen in splits(True, None, [Run(4, 1, 4), Run(20, 1, 4)], [Run(8, 1, 2), Run(0, 1, 4)]):
        ...     print(shape.pattern, shape.queries.length, shape.keys.length, rows, seen)
        Full() 4 4 [0] [1]
        Full() 4 6 [1] [1, 0]
    """
    if not is_causal and window is None:
        n, m = (sum(run.length for run in side) for side in (queries, keys))
        yield Shape(False, None, Run(0, 1, n), Run(0, 1, m)), list(range(len(queries))), list(range(len(keys)))
        return
    ascending = sorted(range(len(keys)), key=lambda number: keys[number])
    for i, q in enumerate(queries):
        whole, mixed = [], []
        for number in ascending:
            seen = _visibility(is_causal, window, q, keys[number])
            if seen is None:
                mixed.append(number)
            elif seen:
                whole.append(number)
        if whole:
            yield Shape(False, None, Run(0, 1, q.length), Run(0, 1, sum(keys[b].length for b in whole))), [i], whole
        for joined, numbers in _joined(mixed, keys):
            shape = relative(is_causal, window, q, joined)
            if shape is not None:
                yield shape, [i], numbers


def _visibility(is_causal: bool, window: int | None, q: Run, k: Run) -> bool | None:
    """Whether all rows of a run see all places of another, or none does; None where it differs."""
    nearest, furthest = q.start - _last(k), _last(q) - k.start  # the least and the greatest distance back
    low, high = 0 if is_causal else nearest, furthest + 1
    if window is not None:
        low, high = max(low, 1 - window), min(high, window)
    if low <= nearest and furthest < high:
        return True
    return False if furthest < low or nearest >= high else None


def _last(run: Run) -> int:
    return run.start + run.step * (run.length - 1)


def _joined(numbers: Sequence[int], runs: Sequence[Run]) -> Iterator[tuple[Run, list[int]]]:
    """Runs in ascending order, those that go on where the one before ends made one."""
    whole: Run | None = None
    parts: list[int] = []
    for number in numbers:
        run = runs[number]
        if whole is not None and whole.step == run.step and _last(whole) + whole.step == run.start:
            whole, parts = whole._replace(length=whole.length + run.length), [*parts, number]
            continue
        if whole is not None:
            yield whole, parts
        whole, parts = run, [number]
    if whole is not None:
        yield whole, parts


def relative(is_causal: bool, window: int | None, q: Run, k: Run) -> Shape | None:
    """The problem of two runs, from place 0 and with step 1 where it can be; None where nothing is seen.

    Example:
        >>> relative(True, None, Run(5, 4, 9), Run(2, 4, 9))
        Shape(is_causal=True, window=None, queries=Run(start=0, step=1, length=9), keys=Run(start=0, step=1, length=9))
    """
    step = max(q.step if q.length > 1 else 1, k.step if k.length > 1 else 1)
    alike = all(run.length == 1 or run.step == step for run in (q, k))
    ahead, rest = divmod(q.start - k.start, step)
    size = window
    if alike and window is not None:  # from query i back to key j it is step * (i + ahead - j) + rest
        size = -((rest - window) // step)
        if size < 1 and is_causal:
            return None
        alike = is_causal or rest == 0
    if alike:
        low = max(0, -ahead)
        return Shape(is_causal, size, Run(ahead + low, 1, q.length), Run(low, 1, k.length))
    low = min(q.start, k.start)
    return Shape(is_causal, window, q._replace(start=q.start - low), k._replace(start=k.start - low))
