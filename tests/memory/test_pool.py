"""A pool's buffers never share memory, come back when their storage dies, and stay within the limits."""

import copy
import gc
import math
import os
import signal
import threading
import time
import weakref
from itertools import pairwise

import pytest
import torch

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import (
    MemoryPoolConfig,
    PoolStatistics,
    UnifiedMemoryPool,
    clear_memory_pool,
    fill_with_nan,
    get_global_memory_pool,
    get_memory_pool_info,
    reset_global_memory_pool,
)
from dilated_attention_pytorch.memory import pool as pool_module
from dilated_attention_pytorch.memory.placement import Topology
from dilated_attention_pytorch.memory.pressure import Room
from dilated_attention_pytorch.memory.snapshot import MIB
from dilated_attention_pytorch.memory.strategies import SizeClasses, Slices
from dilated_attention_pytorch.memory.trial import describe_trial, seconds_per_hit, try_threads

SHAPE = (64, 8)


@pytest.fixture(autouse=True)
def _quick_collections():
    gc.freeze()  # what was there before the test is not looked through
    yield
    gc.unfreeze()


def make(strategy=None, **options):
    room = options.pop("room", lambda: None)
    topology, cpu = options.pop("topology", Topology({})), options.pop("current_cpu", None)
    return UnifiedMemoryPool(
        MemoryPoolConfig(**options), strategy=strategy, topology=topology, current_cpu=cpu, room=room
    )


def live(pool):
    return pool.get_statistics().live_buffers


class Clock:
    """Stands for the module time in the pool; the tests move it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(pool_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def keep_view(x):
    return x[3:]


def keep_detached(x):
    return x.detach()


def keep_data(x):
    return x.data


def keep_other_shape(x):
    return x.view(-1)[::2]


def keep_storage(x):
    return x.untyped_storage()


def keep_array(x):
    return x.numpy()


def keep_copy(x):
    return copy.copy(x)


def keep_graph(x):
    weight = torch.ones(SHAPE, requires_grad=True)
    return weight * x  # saves x for the gradient of weight


def keep_graph_of_view(x):
    return keep_graph(x.view(8, 64).t())


KEEPERS = [
    keep_view,
    keep_detached,
    keep_data,
    keep_other_shape,
    keep_storage,
    keep_array,
    keep_copy,
    keep_graph,
    keep_graph_of_view,
]


@pytest.mark.parametrize("keep", KEEPERS, ids=lambda f: f.__name__)
def test_a_buffer_is_live_while_anything_holds_its_storage(keep):
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(3)
    address, tensor = x.data_ptr(), weakref.ref(x)
    held = keep(x)
    del x
    if keep in (keep_detached, keep_data, keep_storage, keep_copy):
        assert tensor() is None, "the tensor's own end says nothing of its storage"
    assert live(pool) == 1
    other = pool.get_buffer(SHAPE).fill_(5)
    assert other.data_ptr() != address
    del held
    assert live(pool) == 1, "only the other one"
    assert pool.get_buffer(SHAPE).data_ptr() == address


def test_what_autograd_saved_is_right_and_comes_back_after_backward():
    pool, weight = make(), torch.ones(SHAPE, requires_grad=True)
    x = pool.get_buffer(SHAPE).fill_(3)
    y = (weight * x).sum()
    del x
    pool.get_buffer(SHAPE).fill_(9)
    y.backward()
    assert bool((weight.grad == 3).all())
    assert live(pool) == 0


def test_copies_own_their_memory():
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(2)
    copied = copy.deepcopy(x)
    del x
    assert live(pool) == 0
    pool.get_buffer(SHAPE).fill_(7)
    assert bool((copied == 2).all())


def test_memory_moved_away_comes_back():
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(2)
    x.share_memory_()  # the storage has other memory now
    assert live(pool) == 0
    pool.get_buffer(SHAPE).fill_(7)
    assert bool((x == 2).all())
    with pytest.raises(RuntimeError, match="not resizable"):
        pool.get_buffer(SHAPE).resize_(10_000)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_buffers_are_plain_tensors(dtype):
    pool = make()
    for shape in ((3, 5, 2), (), (7,), torch.Size((2, 2)), [4, 3]):
        x = pool.get_buffer(shape, dtype)
        assert x.shape == torch.Size(shape)
        assert (x.dtype, x.device.type, x._base, x.requires_grad) == (dtype, "cpu", None, False)
        assert x.is_contiguous()
        assert x.data_ptr() % 64 == 0
        assert x.untyped_storage().nbytes() == math.prod(shape) * dtype.itemsize
    assert pool.get_buffer((0, 4), dtype).shape == (0, 4)
    with torch.inference_mode():
        assert pool.get_buffer((3,), dtype).is_inference()
    assert not pool.get_buffer((3,), dtype).is_inference(), "a mode does not stick to the memory"


def test_borrowed_memory_is_back_at_the_end():
    pool = make()
    for pattern in (torch.float32, torch.bfloat16):
        with pool.borrow(SHAPE, pattern) as x:
            assert live(pool) == 1
            x.fill_(1)
        assert x.shape == (0,)
        assert live(pool) == 0
    with pool.borrow(SHAPE) as x:
        view = x[2:].fill_(4)
    assert live(pool) == 1, "a view keeps it"
    pool.get_buffer(SHAPE).fill_(6)
    assert bool((view == 4).all())


def test_a_backward_over_returned_memory_raises():
    pool, weight = make(), torch.ones(SHAPE, requires_grad=True)
    with pool.borrow(SHAPE) as x:
        y = (weight * x.fill_(2)).sum()
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()
    with pytest.raises(KeyError), pool.borrow(SHAPE) as x:
        raise KeyError
    assert x.numel() == 0


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


def test_statistics_count():
    pool = make()
    x = pool.get_buffer((1000,))
    held = SizeClasses().size_of(4000)
    assert pool.get_statistics() == PoolStatistics(0, 1, 0, 0, 1, 0, 4000, 0, held, 1 - 4000 / held)
    del x
    assert pool.get_statistics() == PoolStatistics(0, 1, 0, 0, 0, 1, 0, held, held, 0.0)
    pool.get_buffer((500, 2))
    found = pool.get_statistics()
    assert (found.hits, found.misses, found.hit_rate) == (1, 1, 0.5)
    uncounted = make(enable_statistics=False)
    uncounted.get_buffer((3,))
    assert uncounted.get_statistics().hits is uncounted.get_info()["misses"] is uncounted.get_info()["hit_rate"] is None


def test_part_of_a_larger_buffer_serves_and_is_joined_again():
    pool = make(Slices)
    large = pool.get_buffer((4096,), torch.uint8)
    address = large.data_ptr()
    del large
    parts = [pool.get_buffer((1024,), torch.uint8) for _ in range(4)]
    assert sorted(x.data_ptr() - address for x in parts) == [0, 1024, 2048, 3072]
    del parts[1:]
    assert pool.get_statistics().fragmentation == 0.75
    parts.clear()
    assert pool.get_buffer((4096,), torch.uint8).data_ptr() == address
    assert pool.get_statistics().bytes_held == 4096


def test_a_small_request_does_not_pin_a_huge_buffer():
    pool = make()
    pool.get_buffer((1 << 20,), torch.uint8)
    x = pool.get_buffer((512,), torch.uint8)
    assert pool.get_statistics().bytes_held == (1 << 20) + x.nbytes


def test_size_classes_alone_split_nothing():
    pool = make(allow_buffer_slicing=False)
    pool.get_buffer((4096,), torch.uint8)
    x = pool.get_buffer((1024,), torch.uint8)
    assert pool.get_statistics().bytes_held == 4096 + x.nbytes


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


def test_a_pool_that_is_gone_leaves_no_hook_and_valid_buffers():
    gc.collect()
    before = len(gc.callbacks)
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(3)
    reference = weakref.ref(pool)
    assert len(gc.callbacks) == before + 1
    del pool
    gc.collect()
    assert reference() is None
    assert len(gc.callbacks) == before
    assert bool((x == 3).all())


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


def test_nodes_have_their_own_shelves():
    here = [0]
    pool = make(topology=Topology({0: 0, 1: 0, 2: 1, 3: 1}), current_cpu=lambda: here[0])
    x = pool.get_buffer(SHAPE)
    address = x.data_ptr()
    here[0] = 3
    del x  # wherever it dies, its pages lie on node 0
    y = pool.get_buffer(SHAPE)
    assert y.data_ptr() != address
    here[0] = 1
    assert pool.get_buffer(SHAPE).data_ptr() == address
    assert sorted(a.node for a in pool.snapshot().allocations) == [0, 1]


def test_pool_types_are_kept_apart():
    pool = make()
    addresses = {}
    for kind in pool_module.POOL_TYPES:
        x = pool.get_buffer(SHAPE, pool_type=kind)
        addresses[kind] = x.data_ptr()
        del x
    assert len(set(addresses.values())) == 4
    assert all(pool.get_buffer(SHAPE, pool_type=kind).data_ptr() == at for kind, at in addresses.items())
    assert {a.pool_type for a in pool.snapshot().allocations} == set(addresses)


def test_other_devices_are_left_to_their_allocators():
    pool = make(device="meta")
    assert pool.get_buffer((3, 4)).device.type == "meta"
    assert pool.get_buffer((3, 4), device="cpu").device.type == "cpu"
    assert pool.get_buffer((3, 4), device=torch.device("cpu")).device.type == "cpu"
    found = pool.get_statistics()
    assert (found.delegated, found.live_buffers + found.free_buffers) == (1, 1)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinned memory needs an accelerator")
def test_pinned_buffers():
    pool = make()
    assert pool.get_buffer((3, 4), pinned=True).is_pinned()
    assert pool.get_statistics().delegated == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is here")
def test_pinned_memory_without_an_accelerator_is_an_error():
    with pytest.raises(InvalidInput, match="needs an accelerator"):
        make().get_buffer((3, 4), pinned=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pool_type": "rings"}, "pool_type must be one of default, ring, sparse, distributed. Got 'rings'"),
        ({"shape": (-1, 3)}, "no negative dim"),
        ({"shape": (1.5,)}, "whole numbers"),
        ({"shape": 5}, "whole numbers"),
        ({"dtype": "float32"}, "torch dtype"),
        ({"dtype": torch.qint8}, "not quantized"),
        ({"device": "nowhere"}, "device must be"),
        ({"device": "meta", "pinned": True}, "pinned memory is host memory"),
    ],
)
def test_bad_requests(arguments, text):
    pool = make()
    with pytest.raises(InvalidInput, match=text):
        pool.get_buffer(**{"shape": (2,), **arguments})
    assert pool.get_statistics() == make().get_statistics()


def test_contents_are_poisoned_where_tests_ask_for_it():
    pool = make()
    pool.get_buffer((3,)).zero_()
    with fill_with_nan():
        for shape, dtype in (((3,), torch.float32), ((5,), torch.bfloat16), ((1 << 20,), torch.complex64)):
            assert bool(pool.get_buffer(shape, dtype).isnan().all())
        assert pool.get_buffer((3,), torch.int32).shape == (3,)


def test_the_global_pool():
    reset_global_memory_pool()
    try:
        pool = get_global_memory_pool(MemoryPoolConfig(max_pool_size_mb=200))
        assert get_global_memory_pool() is pool
        assert get_global_memory_pool(MemoryPoolConfig(max_pool_size_mb=200)) is pool
        with pytest.raises(InvalidInput, match="reset_global_memory_pool"):
            get_global_memory_pool(MemoryPoolConfig(max_pool_size_mb=300))
        x = pool.get_buffer((MIB,), torch.uint8).fill_(1)
        info = get_memory_pool_info()
        assert (info["total_buffers"], info["total_memory_mb"], info["hits"], info["misses"]) == (1, 1.0, 0, 1)
        assert (info["live_buffers"], info["live_memory_mb"], info["free_memory_mb"]) == (1, 1.0, 0.0)
        clear_memory_pool()
        assert get_memory_pool_info()["total_buffers"] == 1, "a live buffer stays"
        del x
        clear_memory_pool()
        assert get_memory_pool_info()["total_memory_mb"] == 0
        reset_global_memory_pool()
        assert get_global_memory_pool() is not pool
        assert get_memory_pool_info()["misses"] == 0
    finally:
        reset_global_memory_pool()


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
