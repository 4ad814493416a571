"""Pools as the tests make them: no machine's limits, no nodes, unless they are given."""

from dilated_attention_pytorch.memory import (
    MemoryPoolConfig,
    UnifiedMemoryPool,
)
from dilated_attention_pytorch.memory.placement import Topology

SHAPE = (64, 8)


def make(strategy=None, **options):
    room = options.pop("room", lambda: None)
    topology, cpu = options.pop("topology", Topology({})), options.pop("current_cpu", None)
    return UnifiedMemoryPool(
        MemoryPoolConfig(**options), strategy=strategy, topology=topology, current_cpu=cpu, room=room
    )


def live(pool):
    return pool.get_statistics().live_buffers
