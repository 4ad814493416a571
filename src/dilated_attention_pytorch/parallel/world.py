"""The ranks that share one problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.problem import Positions


@dataclass(frozen=True, eq=False)
class World:
    """The ranks that share one problem, where the rows of each stand, and which of them this one is.

    Without a ``group`` nothing can be sent: a world of one, or one that is only planned.

    Example:
        >>> from dilated_attention_pytorch.parallel.layouts import Layout
        >>> rows = tuple(Layout("contiguous", 10, 2).positions(r) for r in range(2))
        >>> World(0, rows, rows).size
        2
    """

    rank: int
    queries: tuple[Positions, ...]
    keys: tuple[Positions, ...]
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.queries)


def resolve_group(group: dist.ProcessGroup | None = None, mesh: DeviceMesh | None = None) -> dist.ProcessGroup | None:
    """The process group over which rows are dealt; None is a world of one.

    ``mesh`` is a DeviceMesh of one dim. Without either it is the default group, or None where `torch.distributed` was
    not initialised. A group of one rank gives None too. Raises InvalidInput for both, for a mesh of more dims, and for
    a group that this process is not in.
    """
    if group is not None and mesh is not None:
        raise InvalidInput("expected group= or mesh=. Got both; leave one out.")
    if mesh is not None:
        if mesh.ndim != 1:
            raise InvalidInput(
                f"expected a mesh of one dim here. Got {mesh.ndim} dims {mesh.mesh_dim_names}; take one, as in "
                'mesh["context"], or flatten it.'
            )
        group = mesh.get_group()
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    if group is None or dist.get_rank(group) < 0:
        raise InvalidInput("this process is not in the group; call it on the group's ranks only.")
    return None if dist.get_world_size(group) == 1 else group


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's number in the group and the number of ranks; (0, 1) without one.

    Example:
        >>> rank_and_size(None)
        (0, 1)
    """
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
