"""Bytes that arrive at this rank, counted where PyTorch hands collectives to the process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention_pytorch.errors import InvalidInput


class ReceivedBytes(TorchDispatchMode):
    """Within it, ``bytes`` counts what this rank receives from others, by collective: "recv_", "alltoall_base_", ...

    Counts the buffers that the process group fills, less this rank's own part. Raises InvalidInput for a collective
    that it cannot count.

    Example:
        >>> with ReceivedBytes() as received:
        ...     pass
        >>> received.total
        0
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes of all collectives."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            self.bytes[name] += _received(name, args)
        return func(*args, **(kwargs or {}))


def _received(name: str, args: tuple[Any, ...]) -> int:
    if name in ("send", "barrier"):
        return 0
    if name == "recv_":
        return sum(_bytes(x) for x in args[0])
    if name == "alltoall_base_":
        output, boxed = args[0], args[2]
        group = dist.ProcessGroup.unbox(boxed)
        rows = list(args[3]) or [output.shape[0] // group.size()] * group.size()
        others = int(sum(rows) - rows[group.rank()])
        return others * _bytes(output) // max(int(output.shape[0]), 1)
    if name == "allgather_":
        return sum(_bytes(x) for xs in args[0] for x in xs) - sum(_bytes(x) for x in args[1])
    if name == "_allgather_base_":
        return _bytes(args[0]) - _bytes(args[1])
    raise InvalidInput(f"ReceivedBytes does not know what {name!r} receives")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
