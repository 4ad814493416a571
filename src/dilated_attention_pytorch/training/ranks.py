"""The processes that train one model: who they are, what each is dealt, and how they hold the parameters.

Ranks form a mesh ("data", "context"): the batch is dealt over the first dim, each sequence over the second, so ranks
that follow one another share a sequence. Parameters are sharded over all ranks, not over "data" alone: the ranks of
one sequence hold parts of one gradient, so the sum over all ranks is wanted anyway, and each rank keeps the least.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.context import set_context_parallel
from dilated_attention_pytorch.nn.transformer import DilatedTransformerEncoderLayer
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.parallel.layouts import LAYOUTS
from dilated_attention_pytorch.training.settings import COMPRESSIONS, TrainingSettings

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # flags and checkpoints travel between CPUs
UNCOMPRESSED_SHARE = 0.1
"""The share of the steps after which PowerSGD begins; torch's documentation advises a tenth."""

Result = TypeVar("Result")
log = logging.getLogger("dilated_attention_pytorch")


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of one training, and which of them this process is; by default one process, which sends nothing.

    ``mesh`` has the dims "data" and "context"; ``context`` is how a sequence is shared, None when it is not. Whoever
    waits for another longer than ``timeout`` gets an exception.

    Example:
        >>> ALONE.is_first, ALONE.any(True), ALONE.on_first(lambda: 3)
        (True, True, 3)
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    context: ContextParallel | None = None
    timeout: timedelta = default_pg_timeout

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def deal(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's tokens and the tokens to predict, (b, n) each, of a batch (B, N + 1) that all ranks have."""
        if self.mesh is not None:
            batch = batch.chunk(self.mesh.size(0))[self.mesh.get_local_rank("data")]
        tokens, labels = batch[:, :-1], batch[:, 1:]
        if self.context is not None:
            tokens, labels = self.context.shard(tokens), self.context.shard(labels)
        return tokens, labels

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks, without a gradient."""
        x = x.detach()
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives on the first rank, told to all; its InvalidInput or OSError is raised on all."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except (InvalidInput, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return cast(Result, told[0])

    def share(self, model: nn.Module, settings: TrainingSettings) -> nn.Module:
        """What to call in place of ``model``: its sequences, parameters and gradients are shared as the settings say.

        The model itself is changed. Gradients are averaged over all ranks.
        """
        if self.mesh is None:
            return model
        if self.context is not None:
            set_context_parallel(model, self.context)
        if settings.parallel == "ddp":
            return _replicated(model, settings)
        from torch.distributed.fsdp import fully_shard  # half a second that one process does not need

        over_all = init_device_mesh(self.mesh.device_type, (self.size,), mesh_dim_names=("all",))  # the default group
        for module in model.modules():
            if isinstance(module, DilatedTransformerEncoderLayer):
                fully_shard(module, mesh=over_all)
        fully_shard(model, mesh=over_all)
        return model


ALONE = Ranks()
"""One process."""


def form_ranks(settings: TrainingSettings, timeout: timedelta | None = None) -> Ranks:
    """The ranks of the default process group, dealt as the settings say; called by all of them.

    ``timeout`` is that of the groups made here; None is torch's. Raises InvalidInput as `check_sharing` does.
    """
    timeout = default_pg_timeout if timeout is None else timeout
    size = world_size()
    check_sharing(settings, size)
    if size == 1:
        return ALONE
    rank, numbers = dist.get_rank(), torch.arange(size).view(-1, settings.context_parallel)
    # Made by hand, because a mesh's own groups would wait torch's half hour for a rank that hangs.
    data, _ = dist.new_subgroups_by_enumeration(numbers.T.tolist(), timeout=timeout)
    context, _ = dist.new_subgroups_by_enumeration(numbers.tolist(), timeout=timeout)
    mesh = DeviceMesh.from_group([data, context], settings.device, mesh=numbers, mesh_dim_names=("data", "context"))
    if settings.context_parallel == 1:
        return Ranks(rank, size, mesh, timeout=timeout)
    return Ranks(rank, size, mesh, ContextParallel(mesh=mesh["context"], layout=settings.layout), timeout)


def check_sharing(settings: TrainingSettings, size: int) -> None:
    """Raise InvalidInput unless so many processes can share the work as the settings say.

    Example:
        >>> check_sharing(TrainingSettings(batch_size=3), 2)
        Traceback (most recent call last):
        dilated_attention_pytorch.errors.InvalidInput: batch_size 3 cannot be dealt over 2 ranks of "data" ...
    """
    parts = settings.context_parallel
    if size == 1 and (parts > 1 or settings.gradient_compression != "none"):
        asked = f"context_parallel {parts}" if parts > 1 else f"gradient_compression {settings.gradient_compression!r}"
        raise InvalidInput(
            f"{asked} is for several processes, and this is one; start them with "
            f"`torchrun --nproc-per-node {max(parts, 2)} -m dilated_attention_pytorch.cli train ...`"
        )
    if size % parts != 0:
        raise InvalidInput(f"context_parallel {parts} must divide the number of processes, {size}; set another")
    if settings.batch_size % (size // parts) != 0:
        raise InvalidInput(
            f'batch_size {settings.batch_size} cannot be dealt over {size // parts} ranks of "data" ({size} processes '
            f"by context_parallel {parts}); make it a multiple: --set batch_size={size // parts}"
        )


def shared_anew(settings: TrainingSettings, sharing: Mapping[str, Any], size: int) -> TrainingSettings:
    """The settings of a run that goes on with `size` processes: ``sharing`` replaces what it names of how they share.

    A process alone shares nothing, however the run was begun. Raises InvalidInput for values that cannot work.

    Example:
        >>> begun = TrainingSettings(context_parallel=4, layout="zigzag")
        >>> shared_anew(begun, {}, 1).context_parallel, shared_anew(begun, {"context_parallel": 2}, 2).layout
        (1, 'contiguous')
    """
    alone = {"context_parallel": 1, "parallel": settings.parallel} if size == 1 else {}
    sharing = alone | dict(sharing)
    if "context_parallel" in sharing:
        sharing = {"layout": LAYOUTS[0]} | sharing
    if "parallel" in sharing:
        sharing = {"gradient_compression": COMPRESSIONS[0]} | sharing
    return dataclasses.replace(settings, **sharing)


def world_size() -> int:
    """How many processes have joined; 1 for one that is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> bool:
    """Whether torchrun, or a launcher that sets what it sets, started this process as one of several."""
    return launched_size() > 1


def launched_size() -> int:
    """How many processes the launcher has started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextlib.contextmanager
def joined(device: str, timeout: timedelta, store: Store | None = None) -> Iterator[None]:
    """Inside, the processes that torchrun started form the default process group: gloo, and NCCL on GPUs.

    A process that was started alone stays alone. Whoever waits longer than ``timeout`` for another gets an exception.
    They find each other through ``store``; None is torchrun's own, which serves once.
    """
    if not launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(BACKENDS[device], timeout=timeout, store=store, rank=rank, world_size=size)
    log.info("rank %d of %d has joined", dist.get_rank(), dist.get_world_size())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _replicated(model: nn.Module, settings: TrainingSettings) -> DistributedDataParallel:
    """The model on every rank, its gradients averaged over all, compressed as asked."""
    replicated = DistributedDataParallel(model)
    if settings.gradient_compression == "powersgd":
        first = max(2, round(UNCOMPRESSED_SHARE * settings.steps))
        state = powerSGD_hook.PowerSGDState(process_group=None, start_powerSGD_iter=first)
        replicated.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif settings.gradient_compression != "none":
        hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
        replicated.register_comm_hook(None, hooks[settings.gradient_compression])
    return replicated
