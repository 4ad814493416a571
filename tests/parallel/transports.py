"""A transport that keeps to the letter of what was promised, so that a schedule that does not is noticed."""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist


class StrictTransport:
    """Delivers at `wait` and not before, and notices when a message is written to while it is under way.

    Until `wait` a receive buffer holds NaN. What is sent is what stood there at the start; nobody may write to it
    before `wait`, which for one never awaited means: ever.
    """

    def __init__(self):
        self.messages = 0
        self._under_way = {}
        self._violations = []

    def check(self, name):
        """AssertionError if a message was written to since the last call."""
        for tensor, sent in self._under_way.values():
            self._compare(tensor, sent)
        violations, self._under_way, self._violations = self._violations, {}, []
        assert not violations, f"{name}: {violations}"

    def batch_isend_irecv(self, operations):
        works, ours = [], []
        for operation in operations:
            assert operation.tensor.is_contiguous()
            sending = operation.op is dist.isend
            shadow = self._sent(operation.tensor) if sending else self._awaited(operation.tensor)
            ours.append(dist.P2POp(operation.op, shadow, operation.peer, operation.group))
            works.append((sending, operation.tensor, shadow))
        return [_Work(self, work, *rest) for work, rest in zip(_real_batch(ours), works, strict=True)]

    def all_to_all_single(
        self, output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        sent, received = self._sent(input), self._awaited(output)
        work = _real_all_to_all(received, sent, output_split_sizes, input_split_sizes, group, async_op=True)
        ours = _Pair(_Work(self, work, False, output, received), _Work(self, None, True, input, sent))
        if async_op:
            return ours
        ours.wait()
        return None

    def _sent(self, tensor):
        self.messages += 1
        copy = tensor.clone()
        self._under_way[id(copy)] = (tensor, copy)
        return copy

    def _awaited(self, tensor):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        return torch.empty_like(tensor)

    def arrived(self, sending, tensor, shadow):
        if not sending:
            tensor.copy_(shadow)
        elif id(shadow) in self._under_way:
            self._compare(*self._under_way.pop(id(shadow)))

    def _compare(self, tensor, sent):
        if not torch.equal(tensor.nan_to_num(), sent.nan_to_num()):
            self._violations.append(f"a message of shape {tuple(sent.shape)} was written to while it was under way")


class _Work:
    def __init__(self, transport, work, *message):
        self.transport, self.work, self.message = transport, work, message

    def wait(self):
        if self.work is not None:
            self.work.wait()
        if self.message:
            self.transport.arrived(*self.message)
        self.message = ()


class _Pair:
    def __init__(self, *works):
        self.works = works

    def wait(self):
        for work in self.works:
            work.wait()


_real_batch, _real_all_to_all = dist.batch_isend_irecv, dist.all_to_all_single


@contextmanager
def strict_transport(transport=None):
    """Within it everything that attention sends goes through the StrictTransport that it gives."""
    transport = transport or StrictTransport()
    with (
        mock.patch.object(dist, "batch_isend_irecv", transport.batch_isend_irecv),
        mock.patch.object(dist, "all_to_all_single", transport.all_to_all_single),
    ):
        yield transport
