"""Eight threads of ten thousand requests each, by every strategy, in a wide and in a narrow pool."""

import pytest

from dilated_attention_pytorch.memory import MemoryPoolConfig, UnifiedMemoryPool
from dilated_attention_pytorch.memory.snapshot import MIB
from dilated_attention_pytorch.memory.strategies import SizeClasses, Slices
from dilated_attention_pytorch.memory.trial import try_threads

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("strategy", [SizeClasses, Slices])
@pytest.mark.parametrize("limit", [1, 256])
def test_no_aliasing_no_growth_no_deadlock(strategy, limit):
    config = MemoryPoolConfig(max_pool_size_mb=limit, cleanup_threshold_mb=min(limit, 8))
    pool = UnifiedMemoryPool(config, strategy=strategy)
    held = []
    for seed in range(2):
        trial = try_threads(pool, threads=8, requests=10_000, seed=1000 * seed, seconds=300)
        assert (trial.requests, trial.overwritten, trial.unfinished) == (80_000, 0, 0)
        assert trial.most_bytes_held <= limit * MIB
        assert pool.get_statistics().live_buffers == 0
        held.append(pool.get_statistics().bytes_held)
    if limit > 1:  # a narrow pool lets go and allocates all the time
        assert held[1] <= 1.5 * held[0], "the second round finds what the first left"
