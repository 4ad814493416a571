"""A pool stays within its limits and drops what is cold, or what the machine has no room for."""

import gc

import torch
from pools import make

from dilated_attention_pytorch.memory import pool as pool_module
from dilated_attention_pytorch.memory.pressure import Room
from dilated_attention_pytorch.memory.snapshot import MIB
from dilated_attention_pytorch.memory.strategies import SizeClasses


def test_the_limit_is_never_passed():
    pool = make(max_pool_size_mb=1, cleanup_threshold_mb=1)
    kept = [pool.get_buffer((300_000,), torch.uint8).fill_(i) for i in range(6)]
    found = pool.get_statistics()
    assert found.bytes_held <= MIB
    assert (found.live_buffers, found.unpooled) == (3, 3)
    assert all(bool((x == i).all()) for i, x in enumerate(kept)), "what is outside the pool is memory all the same"
    kept.clear()
    assert pool.get_buffer((1_000_000,), torch.uint8).nbytes == 1_000_000
    assert pool.get_statistics().bytes_held <= MIB, "the free ones made room"
    assert pool.get_buffer((2 * MIB,), torch.uint8).nbytes == 2 * MIB
    assert pool.get_statistics().unpooled == 4


def test_a_full_pool_collects_garbage_that_holds_buffers():
    pool = make(max_pool_size_mb=1, cleanup_threshold_mb=1)
    gc.disable()
    try:
        cycle = [pool.get_buffer((900_000,), torch.uint8)]
        cycle.append(cycle)
        del cycle
        x = pool.get_buffer((900_000,), torch.uint8)
    finally:
        gc.enable()
    found = pool.get_statistics()
    assert (found.unpooled, found.live_buffers, x.nbytes) == (0, 1, 900_000)


def test_cold_buffers_go_and_hot_ones_stay(clock):
    pool = make(SizeClasses, hot_cache_threshold=5)
    for _ in range(5):
        pool.get_buffer((100,))
    pool.get_buffer((100_000,))
    live_one = pool.get_buffer((50_000,))
    pool.trim()  # ages count from when the pool learns of a return
    clock.now += 29
    assert pool.trim() == 0
    clock.now += 2
    assert pool.trim() == SizeClasses().size_of(400_000)
    assert [a.size for a in pool.snapshot().allocations] == [SizeClasses().size_of(200_000), 512]
    for _ in range(3):  # nobody asks any more: what was hot is cold
        clock.now += 31
        pool.trim()
    assert [a.size for a in pool.snapshot().allocations] == [SizeClasses().size_of(live_one.nbytes)]


def test_room_is_made_of_the_cold_first(clock):
    pool = make(SizeClasses, hot_cache_threshold=2, max_pool_size_mb=1, cleanup_threshold_mb=1)
    for n in (300_000, 300_000, 400_000, 600_000):  # the hot one is the longest unused
        pool.get_buffer((n,), torch.uint8)
        pool.trim()
        clock.now += 0.1
    assert [a.size for a in pool.snapshot().allocations] == [SizeClasses().size_of(n) for n in (600_000, 300_000)]


def test_hot_is_at_most_so_many(clock):
    pool = make(SizeClasses, hot_cache_threshold=1, hot_cache_size=1)
    for shape in ((100,), (100_000,), (100_000,)):
        pool.get_buffer(shape)
    pool.trim()
    clock.now += 31
    assert pool.trim() == 512


def test_too_many_free_bytes_are_cleaned_up(clock):
    pool = make(cleanup_threshold_mb=1, hot_cache_size=0)
    buffers = [pool.get_buffer((400_000 + 40_000 * i,), torch.uint8) for i in range(5)]
    sizes = [SizeClasses().size_of(x.nbytes) for x in buffers]
    while buffers:
        clock.now += 0.1
        pool.get_buffer((1,))
        del buffers[0]
    clock.now += 2
    pool.get_buffer((3_000_000,))  # a miss, after a while
    held = {a.size for a in pool.snapshot().allocations}
    assert not held & set(sizes[:3]), "the longest unused went"
    assert {sizes[-1]} <= held


def test_memory_pressure_drops_even_the_hot(clock):
    free = [10_000]
    pool = make(SizeClasses, hot_cache_threshold=1, room=lambda: Room(10_000, free[0]))
    for size in (4000, 2000):
        pool.get_buffer((size,), torch.uint8)
        assert pool.trim() == 0
        clock.now += 1
    free[0] = 900
    assert pool.trim() == 4096, "100 bytes are wanted; the longest unused goes"
    assert pool.trim() == 2048
    assert pool.get_statistics().bytes_held == 0


def test_a_collection_trims(clock):
    pool = make()
    pool.get_buffer((1000,))
    gc.collect()
    clock.now += 31
    gc.collect(0)
    assert pool.get_statistics().bytes_held > 0
    gc.collect()
    assert pool.get_statistics().bytes_held == 0


def test_a_collection_does_not_disturb_a_snapshot(clock, monkeypatch):
    pool, original = make(SizeClasses), pool_module.Span
    kept = [pool.get_buffer((1000 * n,)) for n in range(1, 9)]
    kept.clear()
    pool.trim()
    clock.now += 31
    monkeypatch.setattr(pool_module, "Span", lambda *values: (gc.collect(), original(*values))[1])
    found = pool.snapshot()
    assert sum(a.size for a in found.allocations) == found.statistics.bytes_held > 0
    assert all(len(a.spans) == 1 for a in found.allocations)
    gc.collect()
    assert pool.get_statistics().bytes_held == 0
