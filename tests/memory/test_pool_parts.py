"""What a pool is made of: its config, strategies, the machine's nodes and limits, and snapshots."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import (
    MemoryPoolConfig,
    PoolSnapshot,
    UnifiedMemoryPool,
    reset_global_memory_pool,
)
from dilated_attention_pytorch.memory.placement import Topology, machine_topology, node_finder
from dilated_attention_pytorch.memory.pressure import Room, memory_room
from dilated_attention_pytorch.memory.strategies import MOST_CARVED, SMALLEST, Arena, Extent, SizeClasses, Slices


def test_config_defaults_and_json():
    config = MemoryPoolConfig()
    values = {
        "hot_cache_size": 50,
        "hot_cache_threshold": 10,
        "allow_buffer_slicing": True,
        "cleanup_threshold_mb": 100,
        "max_pool_size_mb": 1024,
        "enable_statistics": True,
        "device": None,
    }
    assert config.to_dict() == values
    other = MemoryPoolConfig(5, 2, False, 0, 1.5, False, torch.device("cuda:1"))
    again = MemoryPoolConfig.from_dict(json.loads(json.dumps(other.to_dict())))
    assert again == MemoryPoolConfig(5, 2, False, 0, 1.5, False, "cuda:1")
    with pytest.raises(AttributeError):
        config.hot_cache_size = 3
    with pytest.raises(InvalidInput, match=r"fields hot_cache_size, .* Got max_size"):
        MemoryPoolConfig.from_dict({"max_size": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"hot_cache_size": -1},
        {"hot_cache_size": 1.5},
        {"hot_cache_threshold": 0},
        {"hot_cache_threshold": True},
        {"allow_buffer_slicing": 1},
        {"enable_statistics": None},
        {"cleanup_threshold_mb": -1},
        {"max_pool_size_mb": "1"},
        {"max_pool_size_mb": float("inf")},
        {"max_pool_size_mb": float("nan")},
        {"device": "nowhere"},
        {"device": 1.5},
    ],
)
def test_config_is_checked(values):
    with pytest.raises(InvalidInput, match=f"{next(iter(values))} must be"):
        MemoryPoolConfig(**values)


def test_config_fields_fit_together():
    with pytest.raises(InvalidInput, match="cleanup_threshold_mb must be at most max_pool_size_mb"):
        MemoryPoolConfig(max_pool_size_mb=50)


@given(st.integers(1, 1 << 40))
def test_size_classes_lose_little(nbytes):
    size = SizeClasses().size_of(nbytes)
    assert size % SMALLEST == 0
    assert nbytes <= size <= max(nbytes + SMALLEST, nbytes * 1.125)
    assert SizeClasses().size_of(size) == size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_slices_cover_their_arenas_without_overlap(steps):
    shelf, arenas, live = Slices(), [], []
    for give, number in steps:
        if give and live:
            extent = live.pop(number % len(live))
            extent.home.append(extent)
            continue
        size = SMALLEST * number
        free = shelf.of_size(size)
        extent = free.pop() if free else shelf.take_larger(size)
        if extent is None:
            arenas.append(Arena(torch.empty(size, dtype=torch.uint8).numpy(), shelf, ("default", 0), 0.0))
            extent = Extent(arenas[-1], 0, size)
        assert extent.size == size
        assert extent.arena.size <= 40 * SMALLEST
        live.append(extent)
        for arena in arenas:
            spans = sorted((e.start, e.start + e.size) for e in [*live, *shelf.free()] if e.arena is arena)
            assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), arena.size]
    shelf.forget(arenas)
    assert list(shelf.free()) == []


def test_the_smallest_that_fits_is_carved():
    shelf = Slices()
    for kib in (64, 8, 4):
        arena = Arena(torch.empty(kib << 10, dtype=torch.uint8).numpy(), shelf, ("default", 0), 0.0)
        shelf.of_size(arena.size).append(Extent(arena, 0, arena.size))
    assert shelf.take_larger(2048).arena.size == 4096
    assert shelf.take_larger(4096).arena.size == 8192
    assert shelf.take_larger((64 << 10) // MOST_CARVED - SMALLEST) is None, "it would pin the large one"


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_made_up_topology(tmp_path):
    assert machine_topology(tmp_path).nodes == (0,)
    write(tmp_path, "sys/devices/system/node/node0/cpulist", "0-1,4\n")
    write(tmp_path, "sys/devices/system/node/node2/cpulist", "2-3,5-6\n")
    write(tmp_path, "sys/devices/system/node/node3/cpulist", "\n")  # memory without CPUs
    (tmp_path / "sys/devices/system/node/node4").mkdir()
    topology = machine_topology(tmp_path)
    assert topology.node_of_cpu == {0: 0, 1: 0, 4: 0, 2: 2, 3: 2, 5: 2, 6: 2}
    assert topology.nodes == (0, 2)
    assert [topology.node_of(cpu) for cpu in (1, 3, 99)] == [0, 2, 0]
    finder = node_finder(topology, lambda: 5)
    assert finder() == 2
    assert node_finder(Topology({0: 0, 1: 0}), lambda: 1) is None, "one node: nothing to place"
    here = node_finder(topology)
    assert here is None or here() in (0, 2)


def test_limits_of_control_groups_version_2(tmp_path):
    assert memory_room(tmp_path) is None
    write(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n")
    assert memory_room(tmp_path) == Room(1_024_000, 921_600)
    write(tmp_path, "proc/self/cgroup", "0::/user/job\n")
    write(tmp_path, "sys/fs/cgroup/user/job/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/user/job/memory.current", "100\n")
    assert memory_room(tmp_path) == Room(1_024_000, 921_600)
    write(tmp_path, "sys/fs/cgroup/user/memory.max", "1000\n")
    write(tmp_path, "sys/fs/cgroup/user/memory.current", "700\n")
    assert memory_room(tmp_path) == Room(1000, 300), "the limit above holds too"
    write(tmp_path, "sys/fs/cgroup/user/memory.stat", "anon 600\ninactive_file 50\n")
    assert memory_room(tmp_path) == Room(1000, 350), "pages of files may go"
    write(tmp_path, "sys/fs/cgroup/user/job/memory.max", "80\n")
    assert memory_room(tmp_path) == Room(80, 0)


def test_limits_of_control_groups_version_1(tmp_path):
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "sys/fs/cgroup/memory/job/memory.usage_in_bytes", "400\n")
    assert memory_room(tmp_path) is None, "no limit"
    write(tmp_path, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", "1000\n")
    write(tmp_path, "sys/fs/cgroup/memory/job/memory.stat", "total_inactive_file 100\n")
    assert memory_room(tmp_path) == Room(1000, 700)


def test_snapshots_go_to_a_file_and_back(tmp_path):
    pool = UnifiedMemoryPool()
    kept = pool.get_buffer((100, 7), pool_type="ring")
    pool.get_buffer((5000,))
    snapshot = pool.snapshot()
    snapshot.save(tmp_path / "pool.json")
    assert PoolSnapshot.load(tmp_path / "pool.json") == snapshot
    ring = next(a for a in snapshot.allocations if a.pool_type == "ring")
    assert [span.requested for span in ring.spans] == [kept.nbytes]
    assert snapshot.allocations[0].size == max(a.size for a in snapshot.allocations)
    for text in ("", "[]", "{}", '{"format": "another"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InvalidInput, match="expected a snapshot of a memory pool"):
            PoolSnapshot.load(tmp_path / "other.json")
    with pytest.raises(InvalidInput, match="No such file"):
        PoolSnapshot.load(tmp_path / "absent.json")


def test_the_page_runs_and_names_every_option(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    monkeypatch.chdir(tmp_path)
    reset_global_memory_pool()
    try:
        names = {"print": lambda *_: None}
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, "memory.md", "exec"), names)
        assert names["y"].shape == (0,)
        assert names["get_memory_pool_info"]()["live_buffers"] == 0
        keys = set(names["get_memory_pool_info"]())
    finally:
        reset_global_memory_pool()
    defaults = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert defaults == {name: str(value) for name, value in MemoryPoolConfig().to_dict().items()}
    assert keys == {key for key in keys if f"`{key}`" in text}
