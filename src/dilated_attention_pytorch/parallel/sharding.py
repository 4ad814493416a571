"""Cut a tensor that every rank holds into shards of tokens, and join shards again; differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.layouts import Layout, check_layout, whole_layout
from dilated_attention_pytorch.parallel.world import rank_and_size, resolve_group
from dilated_attention_pytorch.problem import Positions


def shard_sequence(
    x: Tensor,
    *,
    dim: int = 1,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
) -> Tensor:
    """This rank's rows of ``x``, which every rank holds whole; any dtype, any length, possibly no rows.

    ``dim`` counts the tokens; `Layout` says which rows a rank gets, in the order of their positions. ``group`` or
    ``mesh`` name the ranks, by default the default group; on a mesh of more dims rows are dealt over all its ranks in
    row-major order. Without `torch.distributed`, and in a group of one, the result is ``x``. Nothing is sent.

    Backward: what follows is a share of one loss that is the sum over ranks, so the gradient of ``x`` is that sum's,
    the same on every rank: the ranks' gradients are gathered, and each rank must take part.

    Raises InvalidInput for what is not a tensor with this dim, an unknown layout, or group and mesh both.

    Example:
        >>> shard_sequence(torch.arange(6).view(1, 6))  # in a world of one
        tensor([[0, 1, 2, 3, 4, 5]])
    """
    check_layout(layout)
    dim = _checked_dim("shard_sequence", x, dim)
    group = resolve_flat_group(group, mesh)
    if group is None:
        return x
    _, size = rank_and_size(group)
    return _Cut.apply(x, dim, Layout(layout, x.shape[dim], size), group)  # type: ignore[no-any-return]


def unshard_sequence(
    x: Tensor,
    *,
    dim: int = 1,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
    length: int | None = None,
) -> Tensor:
    """The whole sequence, on every rank, of which each rank gives the rows that `shard_sequence` gave it.

    Other arguments are those of `shard_sequence`. ``length`` is that of the whole sequence; None finds it by one small
    all-gather, which also compares shapes and dtypes. With a ``length`` a rank looks at its own shard only.

    Backward: what follows is the same on every rank, the loss too, and is counted once: each rank takes its own rows of
    the gradient, and nothing is sent. For a loss that differs by rank, sum it over the ranks instead.

    Raises InvalidInput as `shard_sequence` does; without ``length`` also, on every rank, for shards that are not those
    of the layout or differ in their other dims or dtypes, naming ranks and shapes.

    Example:
        >>> unshard_sequence(torch.arange(6).view(1, 6))  # in a world of one
        tensor([[0, 1, 2, 3, 4, 5]])
    """
    check_layout(layout)
    dim = _checked_dim("unshard_sequence", x, dim)
    group = resolve_flat_group(group, mesh)
    rank, size = rank_and_size(group)
    if length is None:
        rows = x.shape[dim] if group is None else _agreed_length(x, dim, layout, group)
    else:
        rows = length
        expected = Layout(layout, rows, size).count(rank)
        if x.shape[dim] != expected:
            raise InvalidInput(
                f"unshard_sequence: rank {rank} of {size} holds {expected} of {rows} rows in layout {layout!r}. Got "
                f"{x.shape[dim]}; pass the length of the whole sequence, or none to have it found."
            )
    if group is None:
        return x
    return _Join.apply(x, dim, Layout(layout, rows, size), group)  # type: ignore[no-any-return]


def resolve_flat_group(
    group: dist.ProcessGroup | None = None, mesh: DeviceMesh | None = None
) -> dist.ProcessGroup | None:
    """As `resolve_group`, but a mesh of more dims stands for all its ranks in row-major order.

    Raises InvalidInput for a mesh of more dims without names, which PyTorch cannot flatten.

    Example:
        >>> resolve_flat_group() is None  # torch.distributed was not initialised
        True
    """
    if mesh is not None and mesh.ndim > 1 and group is None:
        if mesh.mesh_dim_names is None:
            raise InvalidInput(
                f"expected a mesh whose dims have names. Got {mesh.ndim} dims without; pass mesh_dim_names= to "
                "init_device_mesh."
            )
        mesh = mesh._flatten()  # PyTorch keeps the group of a flattened mesh and gives it again
    return resolve_group(group, mesh)


def _checked_dim(function: str, x: Tensor, dim: int) -> int:
    """The dim counted from the front."""
    if not isinstance(x, Tensor):
        raise InvalidInput(f"{function}: expected a tensor. Got {type(x).__name__}.")
    if not -x.dim() <= dim < x.dim():
        raise InvalidInput(f"{function}: expected dim from {-x.dim()} to {x.dim() - 1}. Got dim={dim}.")
    return dim % x.dim()


def _agreed_length(x: Tensor, dim: int, layout: str, group: dist.ProcessGroup) -> int:
    """The rows of all ranks together; InvalidInput on every rank unless the shards are those of the layout."""
    facts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(facts, (layout, dim, str(x.dtype), tuple(x.shape)), group=group)
    alike = {(name, at, dtype, *shape[:at], *shape[at + 1 :]) for name, at, dtype, shape in facts}
    told = "; ".join(
        f"rank {r}: {shape}, {dtype}, dim {at}, {name}" for r, (name, at, dtype, shape) in enumerate(facts)
    )
    if len(alike) > 1:
        raise InvalidInput(f"unshard_sequence: shards differ in more than their number of rows. {told}.")
    return whole_layout(layout, [shape[dim] for *_, shape in facts]).length


class _Cut(torch.autograd.Function):
    """x -> this rank's rows of it; the gradient of the sum of all ranks' losses comes back whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, whole: Layout, group: dist.ProcessGroup) -> Tensor:
        ctx.place = (dim, whole, group)
        runs = _rows(x, dim, whole.positions(dist.get_rank(group)))
        return torch.cat(runs, dim) if runs else x.narrow(dim, 0, 0).clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Join.apply(dout, *ctx.place), None, None, None


class _Join(torch.autograd.Function):
    """Shards -> the whole on every rank; of its gradient each rank takes its own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, whole: Layout, group: dist.ProcessGroup) -> Tensor:
        ctx.place = (dim, whole, group)
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        counts = [whole.count(rank) for rank in range(whole.world)]
        row_bytes = math.prod(before) * math.prod(after) * x.element_size()
        own = x.new_zeros(max(counts) * row_bytes, dtype=torch.uint8)  # bytes: some transports know fewer dtypes
        own[: x.numel() * x.element_size()] = x.contiguous().view(-1).view(torch.uint8)
        received = [torch.empty_like(own) for _ in counts]
        dist.all_gather(received, own, group=group)
        out = x.new_empty((*before, whole.length, *after))
        for rank, (count, raw) in enumerate(zip(counts, received)):
            runs = _rows(out, dim, whole.positions(rank))
            rows = raw[: count * row_bytes].view(x.dtype).view((*before, count, *after))
            for target, part in zip(runs, rows.split([run.shape[dim] for run in runs], dim) if runs else ()):
                target.copy_(part)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Cut.apply(dout, *ctx.place), None, None, None


def _rows(x: Tensor, dim: int, positions: Positions) -> list[Tensor]:
    """The rows at positions, a view for each run."""
    stretches = [slice(run.start, run.start + run.step * run.length, run.step) for run in positions]
    return [x[tuple([slice(None)] * dim + [stretch])] for stretch in stretches]
