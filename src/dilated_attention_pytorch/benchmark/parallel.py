"""Context parallelism: a ring of processes against one process, and the bytes that each method brings to a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.benchmark.attention import threads
from dilated_attention_pytorch.benchmark.cases import GIGAPATH, PAPER, Case
from dilated_attention_pytorch.benchmark.crew import Ended, crew
from dilated_attention_pytorch.benchmark.measure import Spread, goal_text, seconds_of, spread_text, times_faster
from dilated_attention_pytorch.benchmark.received import ReceivedBytes
from dilated_attention_pytorch.flops import backward_flops, forward_flops
from dilated_attention_pytorch.parallel.choice import METHODS, rank_problem
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.parallel.costs import EVEN, layout_imbalance, planned_world
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.parallel.sharding import shard_sequence
from dilated_attention_pytorch.patterns import Causal, Pattern, longnet
from dilated_attention_pytorch.problem import Problem, make_problem

RING_GOALS = {"forward": None, "forward + backward": 0.85}
"""Times as fast as one process with as many threads as the ring has processes."""
HAND_GOAL = 0.05
"""How far the gather's bytes may be from those counted by hand."""
ROUNDS_OF_ROUNDS = 5
"""The ring is short and its two sides need both cores: it runs so many times as often as other parts."""
MEGABYTE = 1e6
SCALED = Case("GigaPath, 1 / 64", 1 << 14, 16, 48, (16, 91, 512, 2896, 16384), GIGAPATH.dilation_rates)
"""GigaPath's branches at a 64th of their length, which a process group of this machine carries in seconds."""


@dataclass(frozen=True)
class ParallelSizes:
    """What is measured: a causal ring (B 1, zigzag, float32), and the bytes of branches at two lengths (B 1, bf16).

    The bytes of ``scaled`` are counted on a process group of ``bytes_world`` ranks, those of ``whole`` are computed.
    """

    tokens: int = 8192
    heads: int = 8
    head_dim: int = 64
    ring_world: int = 2
    whole: Case = GIGAPATH
    scaled: Case = SCALED
    bytes_world: int = 8
    balance_worlds: tuple[int, ...] = (2, 8, 64)
    rounds_of_rounds: int = ROUNDS_OF_ROUNDS

    def describe(self) -> str:
        """The shape of the ring in one line."""
        return f"N {self.tokens}, H {self.heads}, D {self.head_dim}, causal, zigzag"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v of the ring, and a gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.tokens, self.heads, self.head_dim)
        q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
        return q, k, v, dout


def parallel_steps(rounds: int, sizes: ParallelSizes = ParallelSizes()) -> int:
    """How often `measure_parallel` calls its progress function."""
    return rounds * sizes.rounds_of_rounds + len(METHODS)


def measure_parallel(
    rounds: int, progress: Callable[[], object] | None = None, sizes: ParallelSizes = ParallelSizes()
) -> dict[str, Any]:
    """The ring's time and every method's bytes; a dictionary that JSON can hold."""
    return {
        "shape": sizes.describe(),
        "processes": sizes.ring_world,
        "ring rounds": rounds * sizes.rounds_of_rounds,
        "ring": _ring(rounds * sizes.rounds_of_rounds, progress, sizes),
        "world": sizes.bytes_world,
        "bytes": [
            _bytes_of(sizes.scaled, sizes.bytes_world) | {"counted": _counted(sizes, progress)},
            _bytes_of(sizes.whole, sizes.bytes_world),
        ],
        "balance": list(_balance((sizes.whole, PAPER), sizes.balance_worlds)),
    }


def _ring(rounds: int, progress: Callable[[], object] | None, sizes: ParallelSizes) -> dict[str, Any]:
    """Seconds of the ring, of the ring with nothing sent, and of one process with as many threads, round by round."""
    q, k, v, dout = sizes.inputs()
    seconds: dict[str, list[float]] = {}
    with crew(sizes.ring_world, lambda: _ring_jobs(sizes)) as run, threads(sizes.ring_world):
        alone = _attention(attend, q, k, v, dout)

        def measure(name: str, work: str) -> float:
            return seconds_of(alone[work]) if name == "one process" else run(f"{name} {work}").seconds

        order = [(name, work) for work in RING_GOALS for name in ("one process", "ring", "nothing sent")]
        for number in range(rounds + 1):
            for name, work in order:
                taken = measure(name, work)
                if number > 0:  # the first round warms up
                    seconds.setdefault(f"{name} {work}", []).append(taken)
            if number > 0 and progress is not None:
                progress()
    pairs = sizes.heads * sizes.tokens * (sizes.tokens + 1) // 2
    forward = forward_flops(pairs, sizes.head_dim, sizes.head_dim)
    flops = {"forward": forward, "forward + backward": forward + backward_flops(pairs, sizes.head_dim, sizes.head_dim)}
    return {
        work: {
            "times as fast as one process": times_faster(seconds, f"ring {work}", f"one process {work}").to_dict(),
            "times as long as with nothing sent": times_faster(
                seconds, f"nothing sent {work}", f"ring {work}"
            ).to_dict(),
            "seconds": Spread.of(seconds[f"ring {work}"]).to_dict(),
            "seconds of one process": Spread.of(seconds[f"one process {work}"]).to_dict(),
            "GFLOP/s": round(flops[work] / Spread.of(seconds[f"ring {work}"]).median / 1e9, 1),
        }
        for work in RING_GOALS
    }


def _ring_jobs(sizes: ParallelSizes) -> dict[str, Callable[[], object]]:
    """What a rank of the ring runs: on the real group, and on one that computes the same and sends nothing."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the transport "fake")

    shards = [shard_sequence(x, layout="zigzag") for x in sizes.inputs()]
    jobs: dict[str, Callable[[], object]] = {}
    for name, group in (("ring", dist.group.WORLD), ("nothing sent", dist.new_group(backend="fake"))):
        context = ContextParallel(group=group, layout="zigzag", method="ring")
        jobs |= {f"{name} {work}": run for work, run in _attention(context.attend, *shards).items()}
    return jobs


def _attention(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> dict[str, Callable[[], object]]:
    """Causal calls of a forward pass, and of forward and backward; what they return is let go."""
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))

    def forward() -> None:
        with torch.no_grad():
            attention(*leaves, Causal())

    def both() -> None:
        torch.autograd.grad(attention(*leaves, Causal()), leaves, dout)

    return {"forward": forward, "forward + backward": both}


def _counted(sizes: ParallelSizes, progress: Callable[[], object] | None) -> dict[str, Any]:
    """Bytes that each rank received on a real process group, by method and direction."""
    counted: dict[str, Any] = {}
    with crew(sizes.bytes_world, lambda: {m: _count_job(sizes.scaled, m) for m in METHODS}) as run:
        for method in METHODS:
            ended: Ended = run(method)
            counted[method] = {way: [of[way] for of in ended.results] for way in ("forward", "backward")}
            if progress is not None:
                progress()
    return counted


def _count_job(case: Case, method: str) -> Callable[[], dict[str, int]]:
    """One call on random numbers that counts what arrives, but for the small messages by which ranks agree."""

    def job() -> dict[str, int]:
        shape = (1, Layout("contiguous", case.tokens, dist.get_world_size()).count(dist.get_rank()))
        leaves = torch.randn(3, *shape, case.heads, case.head_dim, dtype=torch.bfloat16).unbind()
        q, k, v = (x.requires_grad_() for x in leaves)
        pattern = longnet(case.segment_lengths, case.dilation_rates)
        with ReceivedBytes() as there:
            out = ContextParallel(method=method).attend(q, k, v, pattern)
        with ReceivedBytes() as back:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        return {way: _of_attention(x) for way, x in (("forward", there), ("backward", back))}

    return job


def _of_attention(received: ReceivedBytes) -> int:
    return received.bytes["recv_"] + received.bytes["alltoall_base_"]


def _bytes_of(case: Case, world: int) -> dict[str, Any]:
    """Bytes that each rank receives as each method says before it runs, and the gather's counted by hand."""
    whole = _whole(case)
    pattern = longnet(case.segment_lengths, case.dilation_rates)
    said: dict[str, Any] = {}
    rows = planned_world(whole, "contiguous", world)
    for method, module in METHODS.items():
        traffic = [
            module.traffic(rank_problem(whole, rows, rank), pattern, replace(rows, rank=rank)) for rank in range(world)
        ]
        said[method] = {way: [getattr(t, way) for t in traffic] for way in ("forward", "backward")}
    return {"case": case.name, "shape": case.describe(), "said": said, "by hand": gather_by_hand(case, world)}


def _whole(case: Case) -> Problem:
    """The problem of all ranks together, in bfloat16 and without data."""
    x = torch.empty(1, case.tokens, case.heads, case.head_dim, dtype=torch.bfloat16, device="meta")
    return make_problem(x, x, x, scale=1.0, query_start=0, needs_grad=True)


def gather_by_hand(case: Case, world: int) -> dict[str, list[int]]:
    """Bytes of the grid rows of the segments that a rank overlaps, less its own: keys and values in bfloat16.

    Backward the same rows come home as gradients in float32. Ranks hold contiguous shards of the same length.

    Example:
        >>> gather_by_hand(Case("", 8, 1, 1, (4,), (2,)), 4)["forward"]  # one of the grid's rows 0, 2 | 4, 6 is away
        [4, 4, 4, 4]
    """
    size = case.tokens // world
    bounds = [(rank * size, (rank + 1) * size) for rank in range(world)]
    rows = [[0] * world for _ in bounds]  # rows[receiver][owner]
    for w, rate in zip(case.segment_lengths, case.dilation_rates):
        for receiver, (begin, end) in enumerate(bounds):
            for start in range(begin // w * w, end, w):
                for owner, (low, high) in enumerate(bounds):
                    if owner != receiver:
                        low, high = max(low, start), min(high, start + w)
                        rows[receiver][owner] += sum(
                            _on_grid(low, high, start + h % rate, rate) for h in range(case.heads)
                        )
    numbers = 2 * case.head_dim  # of a row: key and value
    return {
        "forward": [2 * numbers * sum(of_rank) for of_rank in rows],
        "backward": [4 * numbers * sum(of_rank) for of_rank in zip(*rows)],
    }


def _on_grid(low: int, high: int, first: int, rate: int) -> int:
    """How many of first, first + rate, ... lie from low up to high."""
    return max(0, -((first - high) // rate)) - max(0, -((first - low) // rate)) if high > low else 0


def _balance(cases: tuple[Case, ...], worlds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The heaviest rank's pairs over the mean, in each layout, of the branches and of full causal attention."""
    asked: list[tuple[str, Case, Pattern]] = []
    for case in cases:
        branches = longnet(case.segment_lengths, case.dilation_rates)
        asked += [(case.name, case, branches), (f"{case.name}, causal", case, branches & Causal())]
    whole = replace(cases[0], segment_lengths=(cases[0].tokens,), dilation_rates=(1,))
    asked.append(("full, causal", whole, Causal()))
    for words, case, pattern in asked:
        for size in worlds:
            found = layout_imbalance(_whole(case), pattern, size)
            layouts = {name: round(x, 4) for name, x in found.items()}
            yield {"pattern": words, "shape": case.describe(), "world": size, "layouts": layouts}


RING_COLUMNS = (
    "work",
    "times as fast as one process",
    "times as long as with nothing sent",
    "seconds",
    "seconds of one process",
    "GFLOP/s",
)
BYTE_COLUMNS = ("branches", "method", "pass", "MB per rank, mean (least-most)", "counted / said", "said / by hand")


BALANCE_COLUMNS = ("pattern", "ranks", *LAYOUTS)


def ring_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `RING_COLUMNS`; a goal that is not reached says so."""
    for work, of in results["ring"].items():
        yield (
            work,
            goal_text(of["times as fast as one process"], RING_GOALS[work]),
            spread_text(of["times as long as with nothing sent"]),
            spread_text(of["seconds"]),
            spread_text(of["seconds of one process"]),
            f"{of['GFLOP/s']:.0f}",
        )


def byte_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `BYTE_COLUMNS`; a method whose bytes are not those that it said says so."""
    for of in results["bytes"]:
        for method, ways in of["said"].items():
            for way, said in ways.items():
                counted = of.get("counted", {}).get(method, {}).get(way)
                hand = of["by hand"][way] if method == "gather" else None
                yield (
                    of["case"],
                    method,
                    way,
                    f"{sum(said) / len(said) / MEGABYTE:.1f} ({min(said) / MEGABYTE:.1f}-{max(said) / MEGABYTE:.1f})",
                    "" if counted is None else _ratio(counted, said, 0.0),
                    "" if hand is None else _ratio(said, hand, HAND_GOAL),
                )


def balance_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of `BALANCE_COLUMNS`; where no layout is even, that is said."""
    for of in results["balance"]:
        missed = "" if min(of["layouts"].values()) <= EVEN else f", goal at most {EVEN} missed"
        yield of["pattern"], str(of["world"]), *(f"{x:.3f}{missed}" for x in of["layouts"].values())


def _ratio(found: list[int], expected: list[int], reach: float) -> str:
    """The ratio that is furthest from 1, rank by rank, and whether that is too far."""
    ratio = max((a / b if b else 1.0 + a for a, b in zip(found, expected)), key=lambda r: abs(r - 1))
    wanted = "equal" if reach == 0 else f"within {100 * reach:.0f} %"
    return f"{ratio:.3f}, goal {wanted}{'' if abs(ratio - 1) <= reach else ' missed'}"


def parallel_tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], str]]:
    """(title, columns, rows, note) of the tables to show."""
    count = results["processes"]
    ring_note = (
        f"{results['shape']}, float32: {count} processes of one thread each, against one process of {count} threads on "
        f"the same problem, within a round; median (lowest-highest) of {results['ring rounds']} rounds.\n"
        '"nothing sent": the same processes compute the same steps on a process group that sends nothing, so what is '
        "above 1 was spent on sending and waiting."
    )
    byte_note = (
        f"{results['world']} ranks, batch 1, bfloat16, contiguous shards, not causal. said: what a method says it will "
        "receive. counted: what the process group received (gloo), the furthest rank's ratio.\n"
        "by hand: the grid rows of the segments that a rank overlaps, less its own. Backward, gradients travel in "
        "float32."
    )
    shapes = dict.fromkeys(f"{of['case']}: {of['shape']}" for of in results["bytes"])
    byte_note += "\n" + "\n".join(shapes)
    patterns = dict.fromkeys(f"{of['pattern']}: {of['shape']}" for of in results["balance"])
    balance_note = "Counted pairs of the heaviest rank over the mean of ranks; exact, nothing is timed.\n"
    balance_note += "\n".join(patterns)
    return [
        (f"A ring of {count} processes", RING_COLUMNS, list(ring_rows(results)), ring_note),
        ("Bytes received", BYTE_COLUMNS, list(byte_rows(results)), byte_note),
        ("Balance", BALANCE_COLUMNS, list(balance_rows(results)), balance_note),
    ]
