"""How many processes there are, for configs and factories."""

from __future__ import annotations

import os

import torch.distributed as dist

from dilated_attention_pytorch.errors import InvalidInput


def check_ranks(name: str, size: int | None) -> None:
    """Raise InvalidInput unless the default process group has ``size`` ranks; one process without it, None any."""
    if size is not None and size != rank_of_world()[1]:
        raise InvalidInput(
            f"{name}={size}: this process is one of {rank_of_world()[1]}; start as many with torchrun and call "
            "torch.distributed.init_process_group first, or leave it out"
        )


def world_size() -> int:
    """The ranks of the default process group, 1 without one. InvalidInput where torchrun started more than joined."""
    size = rank_of_world()[1]
    if not (dist.is_available() and dist.is_initialized()) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidInput(
            f"torchrun started {os.environ['WORLD_SIZE']} processes and they have no process group yet: call "
            "torch.distributed.init_process_group before layers over several ranks are made"
        )
    return size


def rank_of_world() -> tuple[int, int]:
    """This process's number in the default process group, and its size; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
