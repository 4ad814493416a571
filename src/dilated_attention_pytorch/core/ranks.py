"""How many processes there are, and how layers of several deal their tokens, for configs, layers and factories."""

from __future__ import annotations

import os

import torch.distributed as dist

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.parallel.world import rank_and_size, resolve_group


def rank_of_world() -> tuple[int, int]:
    """This process's number in the default process group, and its size; (0, 1) without one.

    Example:
        >>> rank_of_world()
        (0, 1)
    """
    return rank_and_size(resolve_group())


def check_ranks(name: str, size: int | None) -> None:
    """Raise InvalidInput unless the default process group has ``size`` ranks; one process without it, None any."""
    if size is not None and size != rank_of_world()[1]:
        raise InvalidInput(
            f"{name}={size}: this process is one of {rank_of_world()[1]}; start as many with torchrun and call "
            "torch.distributed.init_process_group first, or leave it out"
        )


def dealt_by(method: str, given: ContextParallel | None = None) -> ContextParallel:
    """``given``; without it the ranks of the default process group, by ``method``: of one rank a call is local.

    Raises InvalidInput where torchrun started processes that have no group yet: each would take its shard for the
    whole.

    Example:
        >>> dealt_by("ring").method
        'ring'
    """
    if given is not None:
        return given
    if not (dist.is_available() and dist.is_initialized()) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidInput(
            f"torchrun started {os.environ['WORLD_SIZE']} processes and they have no process group yet: call "
            "torch.distributed.init_process_group before layers over several ranks are made"
        )
    return ContextParallel(method=method)
