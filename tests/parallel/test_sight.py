"""What is taken to see nothing sees nothing, and what is plainly empty is found to be."""

import pytest
import torch

from dilated_attention_pytorch import BlockSparse, Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.parallel.sight import sees, sources
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.problem import Run, positions_tensor

LENGTH, HEADS, SIZE = 60, 4, 5
PATTERNS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(7) & Causal(),
    "longnet": longnet([6, 12], [1, 2]) & Causal(),
    "documents": Documents([13, 20, 27]).of(longnet([8, 32], [1, 4])),
    "batch_of_documents": Documents([[13, 20, 27], [30, 30, 0]]).of(Full()),
    "blocks": BlockSparse(12, torch.eye(5, dtype=torch.bool)),
}


def worlds(layout):
    rows = tuple(Layout(layout, LENGTH, SIZE).positions(rank) for rank in range(SIZE))
    return [World(rank, rows, rows) for rank in range(SIZE)]


def truth(pattern, key_lengths=None):
    """Whether any head of any sample sees a pair: (N, N)."""
    counts = pattern.to_mask(HEADS, LENGTH)
    if key_lengths is not None:
        counts = counts * (torch.arange(LENGTH) < max(key_lengths))
    return counts.flatten(0, -3).any(0)


@pytest.mark.parametrize("key_lengths", [None, (17, 25)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_seen_is_missed_and_ranks_agree(name, layout, key_lengths):
    pattern, all_worlds = PATTERNS[name], worlds(layout)
    told = [sources(pattern, HEADS, world, key_lengths) for world in all_worlds]
    visible = truth(pattern, key_lengths)
    shards = [positions_tensor(at) for at in all_worlds[0].keys]
    for r in range(SIZE):
        for s in range(SIZE):
            part = told[r][0][s]
            assert part == told[s][1][r]
            rows = torch.cat([torch.arange(len(shards[s]))[cut] for cut in part.slices] or [torch.empty(0).long()])
            assert part.length == len(rows)
            assert positions_tensor(part.positions).tolist() == shards[s][rows].tolist()
            unseen = sorted({*shards[s].tolist()} - {*shards[s][rows].tolist()})
            assert not visible[shards[r]][:, unseen].any()


@pytest.mark.parametrize("name", ["causal", "window", "documents", "blocks"])
def test_contiguous_shards_that_see_nothing_are_found(name):
    """Bounds of intervals are tight here: what is empty is not sent."""
    visible = truth(PATTERNS[name])
    for world in worlds("contiguous"):
        needed, _ = sources(PATTERNS[name], HEADS, world)
        q = positions_tensor(world.queries[world.rank])
        seen = [visible[q][:, positions_tensor(keys)].any() for keys in world.keys]
        assert [part.length > 0 for part in needed] == seen
        assert sum(part.length for part in needed) < LENGTH or world.rank == SIZE - 1


def test_pairs_of_runs():
    assert not sees(Window(4), 1, (Run(0, 1, 8),), (Run(12, 1, 8),))
    assert sees(Window(6), 1, (Run(0, 1, 8),), (Run(12, 1, 8),))
    assert not sees(Full(), 1, (Run(0, 1, 8),), (Run(12, 1, 8),), key_lengths=[3, 12])
    assert not sees(Full(), 1, (), (Run(12, 1, 8),))
