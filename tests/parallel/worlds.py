"""Worlds of forked processes, joined by gloo, for tests of what several ranks do together."""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Failure:
    """How a rank failed: its traceback, or how its process ended."""

    rank: int
    text: str


class WorldFailed(RuntimeError):
    """A rank raised, or died. ``failures`` holds those that were known by then, the first one first."""

    def __init__(self, failures):
        self.failures = failures
        super().__init__(f"rank {failures[0].rank} failed:\n{failures[0].text}")


def run_world(size, function, *arguments, timeout=60):
    """``function(*arguments)`` in ``size`` forked processes, whose default process group is gloo; results by rank.

    A rank is told by `dist.get_rank()`. Each computes on one thread and begins with seed 0. Raises WorldFailed with the
    traceback of the rank that failed first, and TimeoutError with every thread's stack when ``timeout`` seconds have
    passed. No process outlives the call.
    """
    ends, failures = _ends_of_world(size, function, arguments, timeout, patient=False)
    if failures:
        raise WorldFailed(failures)
    return ends


def ends_of_world(size, function, *arguments, timeout=60):
    """As `run_world`, but a rank's failure is returned at its place and the others may go on to their own ends."""
    return _ends_of_world(size, function, arguments, timeout, patient=True)[0]


def _ends_of_world(size, function, arguments, timeout, patient):
    ends, times, deadline = [None] * size, {}, time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        pipes, ranks = [], []
        try:
            for r in range(size):
                ours, theirs = _FORK.Pipe()
                pipes.append(ours)
                life = (r, size, folder, theirs, timeout, function, arguments)
                ranks.append(_FORK.Process(target=_live, args=life, daemon=True))
                ranks[r].start()
                theirs.close()  # no other process may hold it: a rank's death must end its pipe
            running = {ours: r for r, ours in enumerate(pipes)}
            while running and (patient or not times):
                ready = wait(list(running), max(deadline - time.monotonic(), 0))
                if not ready:
                    late = sorted(running.values())
                    raise TimeoutError(
                        f"ranks {late} of {size} have not ended after {timeout} s\n{_stacks(folder, ranks, late)}"
                    )
                for pipe in ready:
                    r = running.pop(pipe)
                    ends[r], failed_at = _end_of(r, pipe, ranks[r])
                    if failed_at is not None:
                        times[r] = failed_at
        finally:
            for rank in ranks:
                rank.kill()  # each has ended, or is late, or waits for one that failed
                rank.join()
                rank.close()
            for pipe in pipes:
                pipe.close()
    return ends, [ends[r] for r in sorted(times, key=times.__getitem__)]


def _live(rank, size, folder, pipe: Connection, timeout, function, arguments):
    """The life of a rank: join the world, compute, tell the end, and stay until all have ended."""
    parent = os.getppid()
    with Path(folder, f"stacks-{rank}").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            store = dist.FileStore(f"{folder}/store", size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
            store.set(f"rank {rank}", "joined")
            store.wait([f"rank {r}" for r in range(size)])  # all are connected before any may fail
            end = (True, function(*arguments))
            content = BytesIO()
            torch.save(end, content)
        except BaseException:  # noqa: BLE001  (whatever a rank dies of belongs into the test's report)
            content = BytesIO()
            torch.save((False, (time.monotonic(), traceback.format_exc())), content)
        pipe.send_bytes(content.getvalue())
        while os.getppid() == parent:  # sockets closed before the others' end would look like a failure to them
            time.sleep(0.05)


def _end_of(rank, pipe, process):
    """What a rank has told, and when it failed if it did."""
    try:
        fine, told = torch.load(BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        process.join(5)
        return Failure(rank, f"its process ended without a result, exit code {process.exitcode}"), time.monotonic()
    return (told, None) if fine else (Failure(rank, told[1]), told[0])


def _stacks(folder, ranks, late):
    for r in late:
        os.kill(ranks[r].pid, signal.SIGUSR1)
    time.sleep(0.3)
    return "\n".join(f"rank {r}:\n{Path(folder, f'stacks-{r}').read_text()}" for r in late)
