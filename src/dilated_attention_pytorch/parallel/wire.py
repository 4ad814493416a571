"""All that attention sends: rows to peers, and rows to everyone, started now and awaited later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.memory import empty


@dataclass(frozen=True)
class Pending:
    """Transfers under way, and the tensors that they read and write, which must not be touched before `wait`."""

    works: tuple[dist.Work, ...] = ()
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)

    def wait(self) -> None:
        """Return when everything has arrived and left; raises what the transport raises, such as a time-out."""
        for work in self.works:
            work.wait()


def start_exchange(
    group: dist.ProcessGroup, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
) -> Pending:
    """Send contiguous tensors to ranks of the group and receive from others, all at once.

    Between two ranks messages arrive in the order of their lists. Empty tensors are left out, on both sides.
    """
    operations = [
        dist.P2POp(operation, x, dist.get_global_rank(group, peer), group)
        for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
        for peer, x in messages
        if x.numel() > 0
    ]
    if not operations:
        return Pending()
    works = dist.batch_isend_irecv(operations)
    return Pending(tuple(works), tuple(operation.tensor for operation in operations))


def start_all_to_all(
    group: dist.ProcessGroup, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
) -> tuple[Pending, Tensor]:
    """Send ``send_counts[r]`` of the rows (dim 0, contiguous) to each rank r; what comes lies by source rank.

    The received rows may be read after `wait`.
    """
    received = empty((sum(receive_counts), *rows.shape[1:]), rows.dtype, rows.device, "exchange")
    work = dist.all_to_all_single(received, rows, list(receive_counts), list(send_counts), group=group, async_op=True)
    return Pending(() if work is None else (work,), (rows, received)), received
