"""What a pool hands out, from which shelf, and how it counts."""

import math

import pytest
import torch
from pools import SHAPE, make

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import (
    MemoryPoolConfig,
    PoolStatistics,
    clear_memory_pool,
    fill_with_nan,
    get_global_memory_pool,
    get_memory_pool_info,
    reset_global_memory_pool,
)
from dilated_attention_pytorch.memory import pool as pool_module
from dilated_attention_pytorch.memory.placement import Topology
from dilated_attention_pytorch.memory.snapshot import MIB
from dilated_attention_pytorch.memory.strategies import SizeClasses, Slices


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
