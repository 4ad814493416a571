"""Two proofs that a user can run on their own machine: threads that stamp their buffers, and seconds of a hit."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from dilated_attention_pytorch.memory.pool import POOL_TYPES, UnifiedMemoryPool
from dilated_attention_pytorch.memory.snapshot import MIB

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8)


@dataclass(frozen=True)
class ThreadTrial:
    """What `try_threads` saw: requests served, buffers whose stamp was gone, most bytes held, threads that hang."""

    requests: int
    overwritten: int
    most_bytes_held: int
    unfinished: int


def try_threads(
    pool: UnifiedMemoryPool, *, threads: int = 8, requests: int = 10_000, seed: int = 0, seconds: float = 60.0
) -> ThreadTrial:
    """Threads ask for buffers of random shapes, stamp them, keep them or views for random times, and look again.

    ``requests`` are those of each thread, and ``seconds`` how long to wait for all. A stamp is written to all of a
    buffer and read back when it is given up: two live buffers that share memory are seen.
    """
    found, lock = [0, 0, 0], threading.Lock()

    def work(number: int) -> None:
        random, kept, served, overwritten, held = Random(seed + number), dict[int, tuple[Tensor, int]](), 0, 0, 0
        for step in range(requests):
            shape = tuple(random.choice((1, 3, 16, 40)) for _ in range(random.randint(1, 3)))
            stamp = (number * 31 + step) % 127
            x = pool.get_buffer(shape, random.choice(DTYPES), pool_type=random.choice(POOL_TYPES)).fill_(stamp)
            served += 1
            place = random.randrange(24)  # what was kept there ends now
            overwritten += _gone(kept.pop(place, None))
            kept[place] = (x[random.randrange(shape[0]) :] if random.random() < 0.3 else x, stamp)
            if step % 256 == 0:
                held = max(held, pool.get_statistics().bytes_held)
        overwritten += sum(_gone(pair) for pair in kept.values())
        with lock:
            found[:] = found[0] + served, found[1] + overwritten, max(found[2], held)

    crew = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for thread in crew:
        thread.start()
    end = time.monotonic() + seconds
    for thread in crew:
        thread.join(max(0.0, end - time.monotonic()))
    with lock:
        served, overwritten, held = found
    return ThreadTrial(served, overwritten, held, sum(thread.is_alive() for thread in crew))


def _gone(pair: tuple[Tensor, int] | None) -> bool:
    return pair is not None and not bool((pair[0] == pair[1]).all())


def seconds_per_hit(
    pool: UnifiedMemoryPool, shape: tuple[int, ...] = (256, 64), dtype: torch.dtype = torch.float32, rounds: int = 15
) -> float:
    """The median over rounds of the processor seconds that a hit takes, its return included; of 1,000 hits a round.

    Processor time, since a machine with other work on it stretches the time of the wall.
    """
    get, times = pool.get_buffer, []
    get(shape, dtype)
    for _ in range(rounds):
        begin = time.process_time_ns()
        for _ in range(1000):
            get(shape, dtype)
        times.append((time.process_time_ns() - begin) / 1000)
    return statistics.median(times) / 1e9


def describe_trial(trial: ThreadTrial) -> str:
    """One sentence on what `try_threads` saw."""
    return (
        f"{trial.requests:,} requests of concurrent threads: {trial.overwritten} overwritten, "
        f"{trial.unfinished} threads unfinished, at most {trial.most_bytes_held / MIB:.1f} MiB held"
    )
