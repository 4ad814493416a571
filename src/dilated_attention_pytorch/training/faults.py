"""What becomes of a fault on one rank: an exception on all within the timeout, or smaller micro-batches on all.

At the end of every step the ranks meet, on connections of their own, and tell how the step went. A rank that fails in
any other way does not come, and the others raise RankLost. When memory ran out on any rank, all halve their
micro-batches, once in a run. One process then computes the gradient of the step again; several begin again from the
last checkpoint, because a rank that leaves the middle of a step leaves transfers of others behind that cannot be
taken up. They find out as their transfers time out, or at once when memory ran out on all of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.files import read_json, write_json
from dilated_attention_pytorch.training.ranks import ALONE, Ranks, joined, launched
from dilated_attention_pytorch.training.run import Run

GRACE = timedelta(seconds=10)
"""How much later than the others, whose transfers have failed, a rank may come to a meeting."""

Result = TypeVar("Result")
log = logging.getLogger("dilated_attention_pytorch")


class RankLost(RuntimeError):
    """Another rank was killed, raised, or hung for longer than the timeout; the message says where to look."""


class BeginAgain(RuntimeError):
    """Raised on every rank: connections are broken, and all go on from the last checkpoint with smaller micro-batches.

    `together` does so.
    """


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an allocator's, of a GPU or of the CPU.

    >>> ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")), ran_out_of_memory(ValueError("no"))
    (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def together(device: str, timeout: timedelta, work: Callable[[], Result]) -> Result:
    """What `work` gives, while the processes that torchrun started form a group as in `ranks.joined`.

    When it raises BeginAgain, all join anew and do it a second time.
    """
    if not launched():
        return work()
    kept, rank, size = next(rendezvous("env://", timeout=timeout))
    store = unwritten(kept, rank, size, timeout)
    with contextlib.suppress(BeginAgain), joined(device, timeout, PrefixStore("first", store)):
        return work()
    with joined(device, timeout, PrefixStore("again", store)):
        return work()


def unwritten(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of `store` into which nothing was written before all ranks called this.

    torchrun keeps its store when it starts the processes again, with the addresses of those that are gone. Rank 0
    offers a new name; a rank believes an offer only when rank 0 has answered to what this very process wrote. Raises
    TimeoutError when a rank does not come.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("offer", mine)
        here = [mine]
        for other in range(1, size):
            store.wait([f"{mine} {other}"], timeout)
            here.append(store.get(f"{mine} {other}").decode())
        store.set(f"{mine} answer", " ".join(here))
        return PrefixStore(mine, store)
    while time.monotonic() < deadline:
        if store.check(["offer"]):
            name = store.get("offer").decode()
            store.set(f"{name} {rank}", mine)
            if store.check([f"{name} answer"]) and store.get(f"{name} answer").decode().split()[rank] == mine:
                return PrefixStore(name, store)
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} of {size} waited {timeout.total_seconds():g} s for rank 0 to start")


def failed_transfer(error: BaseException) -> bool:
    """Whether the error came from a transfer between ranks: one that timed out, or whose other end is gone.

    >>> failed_transfer(dist.DistBackendError("NCCL")), failed_transfer(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, dist.DistError):
        return True
    gloo = ("gloo/transport", "gloo/gloo", "Operation timed out!", "[c10d]")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in gloo)


class MicroBatch:
    """How many samples a rank computes at once, `size`: all that it is dealt, or half of them after memory ran out.

    What was halved stays so when the run is continued. All ranks make it together.
    """

    def __init__(self, run: Run, ranks: Ranks = ALONE) -> None:
        self._run, self._ranks = run, ranks
        parts = 1 if ranks.mesh is None else ranks.mesh.size(0)
        self.size = run.settings.batch_size // parts
        kept = ranks.on_first(self._kept)
        self._halved = bool(kept)
        self.size = min([self.size, *kept])

    def split(self, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """The tensors' samples (dim 0) in parts of `size`."""
        return list(zip(*(tensor.split(self.size) for tensor in tensors)))

    def halve(self, step: int, cause: str, keep: bool = True) -> None:
        """`size` is half of what it was; `keep` says whether this process writes that down for a continued run.

        Raises torch.OutOfMemoryError when it was halved before, or is 1 already.
        """
        if self._halved or self.size == 1:
            why = "micro-batches were halved before" if self._halved else "a micro-batch is one sample already"
            raise torch.OutOfMemoryError(
                f"memory ran out in step {step}, and {why}. Start a run with a shorter window or, for several "
                f"processes, a larger --context-parallel. {cause}"
            )
        before, self.size, self._halved = self.size, (self.size + 1) // 2, True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "memory ran out in step %d (%s); from now on a rank computes %d samples at once instead of %d, and adds up "
            "their gradients",
            step,
            cause,
            self.size,
            before,
        )
        if keep:
            file = self._run.path / f"micro_batch-{self._ranks.rank}.json"
            write_json(file, {"micro_batch": self.size, "step": step, "cause": cause})

    def _kept(self) -> list[int]:
        """What any rank has written down; it may be more than one when a meeting failed."""
        sizes = []
        for file in sorted(self._run.path.glob("micro_batch-*.json")):
            size = read_json(file).get("micro_batch")
            if type(size) is not int or size < 1:
                raise InvalidInput(f"{file} is damaged: expected micro_batch of at least 1, got {size!r:.40}")
            sizes.append(size)
        return sizes


class Watch:
    """Steps that all ranks take together, or leave together. All ranks make it together."""

    def __init__(self, run: Run, ranks: Ranks = ALONE) -> None:
        self._run, self._ranks = run, ranks
        self._group = None
        if ranks.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=ranks.timeout + GRACE)

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """Inside, a transfer that fails raises RankLost."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankLost) or self._group is None or not failed_transfer(error):
                raise
            raise self._lost(str(error)) from error

    def attempt(self, step: int, work: Callable[[], Result], micro_batch: MicroBatch) -> Result:
        """What `work` gives, once it is done on all ranks.

        When memory ran out on any, micro-batches are halved and BeginAgain is raised on all; torch.OutOfMemoryError
        where they cannot be. Raises RankLost when a rank does not answer. With one process it is only `work`.
        """
        if self._group is None:
            return work()
        result: Result | None = None
        out_of_memory, cut_off, patience = "", "", self._ranks.timeout + GRACE
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if ran_out_of_memory(error):
                out_of_memory = str(error)
            elif failed_transfer(error):
                cut_off, patience = str(error), min(GRACE, self._ranks.timeout)
            else:
                raise
        told = torch.tensor([bool(out_of_memory), bool(cut_off)], dtype=torch.int64)
        try:
            meeting = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert meeting is not None
            meeting.wait(patience)
        except RuntimeError as error:
            if out_of_memory:  # the others will not know, but those who continue the run shall
                micro_batch.halve(step, out_of_memory)
            raise self._lost(cut_off or str(error), step) from error
        if told[0]:
            micro_batch.halve(step, out_of_memory or "on another rank", keep=self._ranks.is_first)
            raise BeginAgain(
                f"memory ran out in step {step}; continue the run: dilated-attention train --resume {self._run.path}"
            )
        if told[1]:
            raise self._lost(cut_off or "another rank says so", step)
        return result  # type: ignore[return-value]  # work has returned it

    def _lost(self, cause: str, step: int | None = None) -> RankLost:
        where = "" if step is None else f" of step {step}"
        seconds = self._ranks.timeout.total_seconds()
        return RankLost(
            f"rank {self._ranks.rank} of {self._ranks.size}: a transfer{where} failed, because another rank was "
            f"killed, raised, or hung for more than {seconds:g} s. Look for the first error that any rank printed "
            "(torchrun names the process that ended first; its --log-dir DIR --redirects 3 keeps what each printed; "
            "exit code -9 is often the system out of memory). Then continue with "
            f"--resume {self._run.path}, which torchrun --max-restarts does by itself. {cause}"
        )
