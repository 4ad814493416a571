"""Live buffers never share memory: in one thread, in eight, in finalizers and in forked children."""

import math
import os
import signal
import threading
import time
from itertools import pairwise

import pytest
import torch
from pools import SHAPE, live, make

from dilated_attention_pytorch.memory import (
    UnifiedMemoryPool,
)
from dilated_attention_pytorch.memory import pool as pool_module
from dilated_attention_pytorch.memory.snapshot import MIB
from dilated_attention_pytorch.memory.strategies import SizeClasses, Slices
from dilated_attention_pytorch.memory.trial import describe_trial, seconds_per_hit, try_threads


@pytest.mark.parametrize("strategy", [SizeClasses, Slices])
def test_live_buffers_share_no_byte(strategy):
    pool, generator = make(strategy, max_pool_size_mb=1, cleanup_threshold_mb=1), torch.Generator().manual_seed(0)
    kept = []
    for step in range(600):
        n = int(torch.randint(1, 20_000, (1,), generator=generator))
        kept.append((pool.get_buffer((n,), torch.int16).fill_(step), step))
        if len(kept) > 12:
            kept.pop(int(torch.randint(len(kept), (1,), generator=generator)))
        if step % 20 == 0:
            assert all(bool((x == stamp).all()) for x, stamp in kept)
            spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x, _ in kept)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            found = pool.snapshot()
            assert found.statistics.bytes_held <= MIB
            for allocation in found.allocations:  # the spans cover it
                assert sum(span.size for span in allocation.spans) == allocation.size
                ends = [0] + [span.start + span.size for span in allocation.spans]
                assert [span.start for span in allocation.spans] == ends[:-1]
    assert pool.get_statistics().unpooled == 0
    assert pool.get_statistics().hit_rate > 0.3


def test_eight_threads():
    pool = make(max_pool_size_mb=32, cleanup_threshold_mb=4)
    trial = try_threads(pool, threads=8, requests=1000, seconds=60)
    assert (trial.requests, trial.overwritten, trial.unfinished) == (8000, 0, 0)
    assert 0 < trial.most_bytes_held <= 32 * MIB
    assert live(pool) == 0
    assert "0 overwritten" in describe_trial(trial)
    held = pool.get_statistics().bytes_held
    try_threads(pool, threads=8, requests=200, seconds=60)
    assert pool.get_statistics().bytes_held <= 1.5 * held


def test_the_trial_sees_shared_memory():
    class Aliasing(UnifiedMemoryPool):
        def get_buffer(self, shape, dtype=torch.float32, device=None, pinned=False, pool_type="default"):
            return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    memory = torch.empty(1 << 20, dtype=torch.uint8)
    assert try_threads(Aliasing(), threads=1, requests=200).overwritten > 10


def test_a_hit_is_measured():
    pool = make()
    assert 1e-8 < seconds_per_hit(pool, rounds=3) < 1e-3
    assert pool.get_statistics().hits >= 3000


def test_a_finalizer_may_ask_while_the_pool_is_at_work(monkeypatch):
    pool, found = make(), []

    class Asks:
        def __del__(self):
            found.append(pool.get_buffer(SHAPE).fill_(1))

    original = pool_module._Request.form

    def form(request, extent):
        monkeypatch.setattr(pool_module._Request, "form", original)
        garbage = Asks()
        del garbage
        return original(request, extent)

    monkeypatch.setattr(pool_module._Request, "form", form)
    x = pool.get_buffer((3, 3)).fill_(2)
    assert len(found) == 1
    assert bool((found[0] == 1).all())
    assert bool((x == 2).all())
    assert pool.get_statistics().unpooled == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_use_the_pool(monkeypatch):
    pool, stop, busy, original = make(), threading.Event(), threading.Event(), pool_module._Request.form

    def form(request, extent):  # the lock is held nearly all the time
        busy.set()
        time.sleep(0.01)
        return original(request, extent)

    def work():
        while not stop.is_set():
            for rows in range(1, 9):  # of one size class, and another form each time
                pool.get_buffer((rows, 3)).fill_(1)

    x = pool.get_buffer((7, 7)).fill_(3)
    monkeypatch.setattr(pool_module._Request, "form", form)
    thread = threading.Thread(target=work)
    thread.start()
    busy.wait(10)
    try:
        codes = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                signal.alarm(5)  # a lock that never opens
                right = bool((pool.get_buffer(SHAPE).fill_(2) == 2).all()) and bool((x == 3).all())
                os._exit(0 if right else 1)
            codes.append(os.waitpid(child, 0)[1])
    finally:
        stop.set()
        thread.join(10)
    assert codes == [0] * 4
