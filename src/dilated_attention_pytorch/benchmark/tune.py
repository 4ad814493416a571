"""Measuring what `auto` shall take: every candidate for every key, the fastest first, kept in a table.

A key is measured on one problem that stands for all of its kind (`example`). Candidates run in interleaved rounds;
those that a first run shows to be far behind get no more.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from dilated_attention_pytorch.backends import BACKENDS, Backend
from dilated_attention_pytorch.backends.tuning import (
    PATTERN_CLASSES,
    Choice,
    Key,
    Measured,
    Table,
    Timing,
    device_name,
    load_table,
)
from dilated_attention_pytorch.benchmark.measure import Spread
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Causal, Dilated, Documents, Full, Pattern, Window, longnet, random_blocks
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan, Plan, TilePlan, candidate_plans
from dilated_attention_pytorch.plans.planner import strided_plan
from dilated_attention_pytorch.problem import Problem, make_problem
from dilated_attention_pytorch.training.environment import versions
from dilated_attention_pytorch.training.files import write_whole

LENGTHS = (64, 256, 1024, 4096, 16384)
GPU_LENGTHS = (128, 1024, 4096, 16384, 65536, 262144)
QUADRATIC = ("full", "causal", "blocks", "other")
QUADRATIC_LENGTH = 4096
"""The longest that patterns with a quadratic number of pairs are measured at (tokens); longer ones take its ranking."""
TILED = ("full", "causal", "window", "blocks", "other")
DECODED = ("causal", "window", "dilated-short-causal", "dilated-long-causal")
PAIRS = 1 << 25
"""Pairs that an example has at most on a CPU, over its heads; long ones get fewer heads, two at least."""
GPU_PAIRS = 1 << 33
BLOCKS_DENSITY = 0.25
"""Share of blocks kept in the example of "blocks", before it is made causal."""
FAR_PAIRS = 1 << 22
"""A plan with more pairs than this, and 8 times those of the best plan or its logits in chunks, is not measured."""
FAR = 3.0
"""A candidate that takes so many times the fastest one's seconds gets no further rounds."""
REFINED = 1.5
"""Other options than the first are measured of a backend and plan that takes at most so many times the fastest."""
TIE = 1.05
"""Medians that differ by less than this factor differ by noise."""
PROBE_SECONDS = 0.05
ROUND_SECONDS = 5e-3
"""A round repeats a candidate until it lasts about so long."""

_log = logging.getLogger("dilated_attention_pytorch")


@dataclass(frozen=True)
class Example:
    """A problem that stands for all of a key."""

    pattern: Pattern
    problem: Problem


def grid(
    dtypes: Sequence[str],
    head_dims: Sequence[int] = (64, 128),
    lengths: Sequence[int] = LENGTHS,
    patterns: Sequence[str] = PATTERN_CLASSES,
) -> list[Key]:
    """All keys to measure. Raises InvalidInput for what is no dtype, head dim, length or pattern class.

    Example:
        >>> [str(key) for key in grid(["float32"], [64], [128], ["full"])][0]
        'float32, D 64, full, queries on 128 keys, forward'
    """
    for dtype in dtypes:
        if dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise InvalidInput(f"tune: expected float16, bfloat16, float32 or float64. Got {dtype!r}.")
    for pattern in patterns:
        if pattern not in PATTERN_CLASSES:
            raise InvalidInput(f"tune: expected pattern classes among {', '.join(PATTERN_CLASSES)}. Got {pattern!r}.")
    for name, numbers in (("head dims", head_dims), ("lengths", lengths)):
        if min(numbers, default=0) < 1:
            raise InvalidInput(f"tune: expected {name} of at least 1. Got {', '.join(map(str, numbers))}.")
    buckets = sorted({1 << (n - 1).bit_length() for n in lengths})
    keys = []
    for dtype, head_dim, pattern, length in product(dtypes, head_dims, patterns, buckets):
        if length <= QUADRATIC_LENGTH or pattern not in QUADRATIC:
            keys += [Key(dtype, head_dim, pattern, length, False, training) for training in (False, True)]
        if pattern in DECODED:
            keys.append(Key(dtype, head_dim, pattern, length, True, False))
    return keys


def example_pattern(name: str, length: int) -> Pattern:
    """The pattern that stands for a class, at a length (tokens)."""
    short, long = longnet([256, 512, 1024], [1, 2, 4]), longnet([2048, 4096, 8192], [1, 2, 4])
    parts = [length // 2, length // 4, length // 8, length - length // 2 - length // 4 - length // 8]
    return {
        "full": Full(),
        "causal": Causal(),
        "window": Window(max(16, min(256, length // 4))) & Causal(),
        "documents": Documents(parts).of(Causal()),
        "dilated-short": short,
        "dilated-long": long,
        "dilated-short-causal": short & Causal(),
        "dilated-long-causal": long & Causal(),
        "blocks": random_blocks(length, block_size=max(16, min(128, length // 16)), density=BLOCKS_DENSITY) & Causal(),
        "other": Dilated(512, 2) & Dilated(768, 3),
    }[name]


def example(key: Key, device: torch.device) -> Example:
    """The problem that stands for a key; its numbers are the same everywhere."""
    pattern = example_pattern(key.pattern, key.length)
    generator = torch.Generator().manual_seed(0)
    queries, dtype = 1 if key.decode else key.length, getattr(torch, key.dtype)

    def problem(heads: int, numbers: bool) -> Problem:
        shapes = [(1, n, heads, key.head_dim) for n in (queries, key.length, key.length)]
        if numbers:
            q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        else:
            q, k, v = (torch.empty(1, dtype=dtype).expand(shape) for shape in shapes)
        scale = 1 / math.sqrt(key.head_dim)
        return make_problem(q, k, v, scale=scale, query_start=key.length - queries, needs_grad=key.training)

    strided = strided_plan(pattern, problem(1, False))
    pairs = queries * key.length if strided is None else strided.issued_pairs(problem(1, False))
    limit = PAIRS if device.type == "cpu" else GPU_PAIRS
    return Example(pattern, problem(max(2, min(8, limit // max(1, pairs))), True))


def candidates(
    problem: Problem, pattern: Pattern, kind: str, backends: Sequence[Backend]
) -> dict[Choice, tuple[Backend, Plan]]:
    """Everything worth measuring: each backend with each plan and each of its options, where no reason stands against.

    Tables of tiles are made where they may pay: not for dilated patterns, which scatter their pairs over all tiles, and
    not for documents, which are others at every call.
    """
    tiles = kind in TILED and any(TilePlan in b.plans and b.import_error() is None for b in backends)
    plans = candidate_plans(pattern, problem, tiles=tiles)
    pairs = {plan: plan.issued_pairs(problem) for plan in plans}
    least = min(pairs.values())
    near = [plan for plan in plans if pairs[plan] <= max(FAR_PAIRS, 8 * least)]
    chunked: list[Plan] = [
        p for p in near if isinstance(p, DensePlan) and p.log_counts is None and pairs[p] > FAR_PAIRS
    ]
    near = [plan for plan in near if plan not in chunked] or chunked  # logits in chunks lose against any other way
    found: dict[Choice, tuple[Backend, Plan]] = {}
    for backend in backends:
        if backend.import_error() is not None:
            continue
        for plan in (plan for plan in near if isinstance(plan, backend.plans)):
            dense = isinstance(plan, DensePlan)  # one call, in which there is nothing to choose
            for options in (backend.options,) if dense else backend.candidates(problem):
                one = type(backend)(options)
                walked: Plan | None = plan
                if options.tile != backend.options.tile:
                    others = candidate_plans(pattern, problem, tiles, options.tile)
                    resized = (p for p in others if type(p) is type(plan) and tiles_of(p) != tiles_of(plan))
                    walked = next(resized, None)
                if walked is not None and not one.reasons_against(problem, walked):
                    found[Choice(backend.name, plan.kind, options)] = (one, walked)
    return found


def tiles_of(plan: Plan) -> tuple[int, int] | None:
    """Query rows and key rows of a plan's tiles, or None where it has none."""
    tiles = plan.tiles if isinstance(plan, OrderedPlan) else plan
    return tiles.block_size if isinstance(tiles, TilePlan) else None


def runner(backend: Backend, problem: Problem, plan: Plan) -> Callable[[], object]:
    """A call of the backend, forward or with backward as the problem says, that ends when the device has finished."""
    finish = getattr(torch, problem.q.device.type).synchronize if problem.q.device.type != "cpu" else None

    def run() -> None:
        with torch.no_grad():
            out, lse = backend.forward(problem, plan)
            if problem.needs_grad:
                backend.backward(problem, plan, out, None, out, lse)
        if finish is not None:
            finish()

    return run


def race(runs: Mapping[Choice, Callable[[], object]], rounds: int, limit: float = 1.0) -> dict[Choice, list[float]]:
    """Seconds of one call, for every run and round; far ones have one round, failed ones are left out.

    Rounds interleave and end early after ``limit`` seconds. Short runs are repeated within a round.
    """
    seconds: dict[Choice, list[float]] = {}
    for name, run in runs.items():
        try:
            run()  # compiles and warms up
            seconds[name] = [_probed(run)]
        except (RuntimeError, MemoryError) as error:
            _log.warning("tune: %s failed and is left out: %s", name, str(error).partition("\n")[0])
    best = min((s[0] for s in seconds.values()), default=0.0)
    near = {name: max(1, round(ROUND_SECONDS / s[0])) for name, s in seconds.items() if s[0] <= FAR * best}
    end = time.perf_counter() + limit
    for count in range(rounds):
        if count > 0 and time.perf_counter() > end:
            break
        for name, repeats in near.items():
            figure = _timed(runs[name], repeats)
            seconds[name] = [figure] if count == 0 else [*seconds[name], figure]
    return seconds


def _probed(run: Callable[[], object]) -> float:
    """Seconds of the best of three calls, or of fewer that last: other processes only ever add to a call."""
    end = time.perf_counter() + PROBE_SECONDS
    best = _timed(run, 1)
    for _ in range(2):
        if time.perf_counter() > end:
            break
        best = min(best, _timed(run, 1))
    return best


def _timed(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def rank(key: Key, device: torch.device, rounds: int, known: Sequence[Choice] = ()) -> tuple[Measured, ...] | None:
    """The candidates of a key, the fastest first; None when the known choices are of all backends and plans there are.

    The first options of every backend and plan race first, then all options of those that came near.
    """
    one = example(key, device)
    found = candidates(one.problem, one.pattern, key.pattern, BACKENDS)
    groups: dict[tuple[str, str], list[Choice]] = {}
    for choice in found:
        groups.setdefault((choice.backend, choice.plan), []).append(choice)
    if known and {(c.backend, c.plan) for c in known} == set(groups):
        return None
    runs = {choice: runner(b, one.problem, plan) for choice, (b, plan) in found.items()}
    first = race({choices[0]: runs[choices[0]] for choices in groups.values()}, 1)
    limit = REFINED * min((s[0] for s in first.values()), default=0.0)
    near = [choices for choices in groups.values() if first.get(choices[0], [math.inf])[0] <= limit]
    seconds = race({choice: runs[choice] for choices in near for choice in choices}, rounds)
    return in_order({choice: Spread.of(figures) for choice, figures in (first | seconds).items()})


def in_order(spreads: Mapping[Choice, Spread]) -> tuple[Measured, ...]:
    """The fastest first; what is within TIE of it is as fast, and stands in the order given, the best guess first."""
    measured = [Measured(c, Timing(s.median, s.low, s.high, s.rounds)) for c, s in spreads.items()]
    limit = TIE * min((m.seconds.median for m in measured), default=0.0)
    tied = [m for m in measured if m.seconds.median <= limit]
    rest = [m for m in measured if m.seconds.median > limit]
    return (*tied, *sorted(rest, key=lambda m: m.seconds.median))


def tune(
    keys: Sequence[Key],
    device: torch.device,
    path: Path,
    *,
    rounds: int = 5,
    force: bool = False,
    any_device: bool = False,
    progress: Callable[[float], object] | None = None,
) -> Table:
    """The table of all keys, in ``path`` after each of them. Keys that the file holds are kept, unless ``force``.

    They are measured again when library, torch or the number of threads were others, or when candidates are others.
    With ``any_device`` the table is for every device of this type, as the one that is shipped.
    """
    library, version = (versions()[name] for name in ("dilated-attention-pytorch", "torch"))
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    name = device.type if any_device else device_name(device)
    before = None if force else load_table(path, device, BACKENDS)
    entries: dict[Key, tuple[Measured, ...]] = {}
    if before is not None and (before.device, before.library, before.torch, before.threads) == (
        name,
        library,
        version,
        threads,
    ):
        entries = dict(before.entries)
    table = Table(name, entries, threads, library, version, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for done, key in enumerate(keys):
        ranking = rank(key, device, rounds, [m.choice for m in entries.get(key, ())])
        if ranking is not None:
            entries[key] = best_of_each(ranking) if any_device else ranking
            write_whole(path, table_text(table).encode())
        if progress is not None:
            progress((done + 1) / len(keys))
    return table


def best_of_each(ranking: Sequence[Measured]) -> tuple[Measured, ...]:
    """The ranking with the best options only of each backend and plan."""
    first: dict[tuple[str, str], Measured] = {}
    for measured in ranking:
        first.setdefault((measured.choice.backend, measured.choice.plan), measured)
    return tuple(first.values())


def table_text(table: Table) -> str:
    """The table as JSON, a line for each key, so that a change of one is a change of one line."""
    value = table.to_dict()
    lines = [f"    {json.dumps(entry)}" for entry in value.pop("entries")]
    head = json.dumps(value, indent=2).removesuffix("\n}")
    return f'{head},\n  "entries": [\n' + ",\n".join(lines) + "\n  ]\n}\n"


CHOICE_COLUMNS = ("problem", "fastest, by number of keys (times faster than the next)")


def choice_rows(table: Table) -> list[tuple[str, ...]]:
    """A row for each dtype, D, pattern class and kind of work: what is chosen from which length on, and by how much."""
    groups: dict[tuple[str, ...], list[Key]] = {}
    for key in sorted(table.entries):
        work = "decode" if key.decode else "training" if key.training else "forward"
        groups.setdefault((key.dtype, f"D {key.head_dim}", key.pattern, work), []).append(key)
    return [(", ".join(group), "; ".join(_choices(table, keys))) for group, keys in groups.items()]


def _choices(table: Table, keys: Sequence[Key]) -> Iterator[str]:
    """For each run of lengths with the same choice: its lengths, the choice, and the ratio to the next one."""
    runs: list[tuple[str, list[int], list[float]]] = []
    for key in keys:
        ranking = table.entries[key]
        if not ranking:
            continue
        words = str(ranking[0].choice)
        if not runs or runs[-1][0] != words:
            runs.append((words, [], []))
        runs[-1][1].append(key.length)
        if len(ranking) > 1:
            runs[-1][2].append(ranking[1].seconds.median / ranking[0].seconds.median)
    for words, lengths, ratios in runs:
        span = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]}-{lengths[-1]}"
        low, high = (f"{f(ratios):.2f}" for f in (min, max)) if ratios else ("", "")
        yield f"{span} {words}" + (f" ({low if low == high else f'{low}-{high}'} x)" if ratios else "")
