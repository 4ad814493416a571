"""Forked processes, joined by gloo, that stay and run named jobs together when told: for measuring a world."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dilated_attention_pytorch.errors import InvalidInput

TIME_LIMIT = 600.0
"""Seconds that a job may take."""


class Ended(NamedTuple):
    """A job's end: seconds from the first start to the last end, and what each rank returned."""

    seconds: float
    results: list[Any]


@contextmanager
def crew(
    size: int, jobs: Callable[[], Mapping[str, Callable[[], Any]]], time_limit: float = TIME_LIMIT
) -> Iterator[Callable[[str], Ended]]:
    """Within it, ``size`` processes of one thread each wait for the name of a job, which all of them then run.

    ``jobs`` is called once in each process, where the default group is gloo's. A job starts when all ranks are ready;
    what it returns must be picklable. Waiting processes take no time from others. Raises RuntimeError with the
    traceback of a rank that fails, TimeoutError after ``time_limit`` seconds, and InvalidInput where processes cannot
    be forked. No process outlives the block.

    Example:
        >>> with crew(2, lambda: {"rank": dist.get_rank}) as run:
        ...     run("rank").results
        [0, 1]
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise InvalidInput("worlds are measured in forked processes, which this system does not have.")
    fork = multiprocessing.get_context("fork")
    ours: list[Connection] = []
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="crew-") as folder:
        try:
            for rank in range(size):
                here, there = fork.Pipe()
                ours.append(here)
                arguments = (rank, size, f"{folder}/store", there, jobs, time_limit)
                processes.append(fork.Process(target=_live, args=arguments, daemon=True))
                processes[-1].start()
                there.close()

            def run(name: str) -> Ended:
                for pipe in ours:
                    pipe.send(name)
                starts, ends, results = zip(*_told(ours, name, time_limit))
                return Ended(max(ends) - min(starts), list(results))

            yield run
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in ours:
                pipe.close()


def _told(pipes: list[Connection], name: str, time_limit: float) -> list[tuple[float, float, Any]]:
    """What each rank told of a job: start, end, result. The first that fails ends it."""
    told: dict[int, Any] = {}
    deadline = time.monotonic() + time_limit
    while len(told) < len(pipes):
        late = [rank for rank in range(len(pipes)) if rank not in told]
        ready = wait([pipes[rank] for rank in late], max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise TimeoutError(f"ranks {late} have not ended {name!r} after {time_limit:.0f} s")
        for rank in late:
            if pipes[rank] in ready:
                try:
                    fine, told[rank] = pipes[rank].recv()
                except EOFError as error:
                    raise RuntimeError(f"rank {rank} died in {name!r}") from error
                if not fine:
                    raise RuntimeError(f"rank {rank} failed in {name!r}:\n{told[rank]}")
    return [told[rank] for rank in range(len(pipes))]


def _live(rank: int, size: int, store: str, pipe: Connection, make_jobs: Callable[[], Any], time_limit: float) -> None:
    """The life of a process: join, make the jobs, and run each that is named."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=time_limit),
        )
        jobs = make_jobs()
        while True:
            job = jobs[pipe.recv()]
            dist.barrier()
            start = time.perf_counter()
            result = job()
            pipe.send((True, (start, time.perf_counter(), result)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
