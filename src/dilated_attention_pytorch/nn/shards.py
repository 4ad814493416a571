"""Where the rows of a shard stand in the whole sequence: one small all-gather tells."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.compiling import run_eagerly
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.parallel.layouts import whole_layout
from dilated_attention_pytorch.parallel.sharding import resolve_flat_group
from dilated_attention_pytorch.parallel.world import rank_and_size


class ShardRows(NamedTuple):
    """Rows number ``at (n,)``, int64, of a sequence of ``length`` tokens: those a rank holds; None is all of them."""

    length: int
    at: Tensor | None


def as_context(context: ContextParallel | DeviceMesh | None) -> ContextParallel | None:
    """``context`` itself; a mesh, such as ``mesh["context"]``, with the default layout and method.

    Raises InvalidInput for anything else.

    Example:
        >>> as_context(ContextParallel(layout="striped")).layout
        'striped'
    """
    if context is None:
        return None
    if isinstance(context, DeviceMesh):
        return ContextParallel(mesh=context)
    if not isinstance(context, ContextParallel):
        raise InvalidInput(
            "expected context_parallel to be a ContextParallel, a mesh of one dim such as mesh['context'], or None. "
            f"Got {type(context).__name__}."
        )
    return context


def over_ranks(context: ContextParallel | None) -> ContextParallel | None:
    """``context`` where it deals tokens over several ranks; None where one rank has them all, and a call is local.

    Example:
        >>> over_ranks(ContextParallel(layout="zigzag")) is None  # in a world of one
        True
    """
    if context is None or resolve_flat_group(context.group, context.mesh) is None:
        return None
    return context


@run_eagerly("where a shard's rows stand is asked of other ranks: compile without fullgraph")
def whole_lengths(context: ContextParallel, *shards: Tensor) -> tuple[int, ...]:
    """The tokens of all ranks together, for each of some shards (B, n, ...) that every rank gives.

    Raises InvalidInput on every rank, naming ranks and numbers, unless they are the layout's shards of one batch.

    Example:
        >>> whole_lengths(ContextParallel(), torch.zeros(1, 5, 8), torch.zeros(1, 3, 8))
        (5, 3)
    """
    group = resolve_flat_group(context.group, context.mesh)
    own = torch.tensor([n for x in shards for n in x.shape[:2]], device=shards[0].device)
    _, size = rank_and_size(group)
    counts = [torch.empty_like(own) for _ in range(size)]
    if group is None:
        counts = [own]
    else:
        dist.all_gather(counts, own, group=group)
    lengths = []
    table = torch.stack(counts, 1).tolist()  # samples and tokens of each shard, by rank
    for samples, held in zip(table[::2], table[1::2]):
        if len(set(samples)) > 1:
            raise InvalidInput(
                f"ranks 0 to {size - 1} hold {samples} samples; those of one sequence share their batch."
            )
        lengths.append(whole_layout(context.layout, held, "tokens").length)
    return tuple(lengths)


def shard_rows(context: ContextParallel, shard: Tensor) -> ShardRows:
    """Where the rows of ``shard (B, n, ...)`` stand; every rank calls it. Raises InvalidInput as `whole_lengths`.

    Example:
        >>> shard_rows(ContextParallel(), torch.zeros(1, 3, 8))
        ShardRows(length=3, at=tensor([0, 1, 2]))
    """
    (length,) = whole_lengths(context, shard)
    return ShardRows(length, context.positions(length).to(shard.device))


def whole_shapes(context: ContextParallel, *shards: Tensor) -> tuple[Tensor, ...]:
    """Tensors without memory, of the shapes that the shards have when joined. Raises InvalidInput as `whole_lengths`.

    Example:
        >>> whole_shapes(ContextParallel(), torch.zeros(1, 3, 2, 8))[0].shape
        torch.Size([1, 3, 2, 8])
    """
    lengths = whole_lengths(context, *shards)
    return tuple(
        torch.empty((x.shape[0], length, *x.shape[2:]), dtype=x.dtype, device="meta")
        for x, length in zip(shards, lengths)
    )
