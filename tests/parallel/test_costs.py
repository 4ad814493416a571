"""The work of ranks is what the dense counts say, and published branches have a layout that makes it even."""

import random
from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import BlockSparse, Causal, Dilated, Documents, Full, Window, longnet
from dilated_attention_pytorch.parallel.costs import (
    EVEN,
    Work,
    best_layout,
    first_even,
    layout_imbalance,
    planned_world,
    rank_work,
)
from dilated_attention_pytorch.parallel.layouts import LAYOUTS
from dilated_attention_pytorch.problem import make_problem, positions_tensor
from dilated_attention_pytorch.testing.cases import random_pattern

PAPER = longnet([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]), 12  # LongNet's branches and heads
GIGAPATH = longnet([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16]), 16  # Prov-GigaPath's
WORLDS = (2, 3, 4, 6, 8, 16, 32, 64)


def whole(length, heads, batch=1, visible=None, keys=None, start=0):
    q = torch.empty(1, device="meta").expand(batch, length, heads, 8)
    k = torch.empty(1, device="meta").expand(batch, keys or length, heads, 8)
    return replace(make_problem(q, k, k, scale=1.0, query_start=start), key_lengths=visible)


def drawn(problem, pattern, world, inner):
    """The work of each rank from the whole mask, said independently of the engine."""
    length, start = problem.query_length, problem.query_positions[0].start
    mask = pattern.to_mask(problem.num_heads, length, problem.key_length, query_start=start)
    mask = (mask if mask.dim() == 4 else mask[None]).expand(problem.batch, -1, -1, -1)
    if problem.key_lengths is not None:
        mask = mask * (torch.arange(problem.key_length) < torch.tensor(problem.key_lengths).view(-1, 1, 1, 1))
    shares = []
    for rank in range(world.size):
        row, column = divmod(rank, inner)
        rows = torch.cat([positions_tensor(at) for at in world.queries[row * inner : (row + 1) * inner]]) - start
        heads = slice(column * problem.num_heads // inner, (column + 1) * problem.num_heads // inner)
        shares.append(int(mask[:, heads, rows].sum()))
    return tuple(shares)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "inner"), [(1, 1), (3, 1), (5, 1), (3, 3), (6, 2), (90, 1)])
def test_work_of_each_rank_is_that_of_the_mask(layout, size, inner):
    source = random.Random(size + inner)
    for pattern, problem in (
        (longnet([8, 16, 32], [1, 2, 4]) & Causal(), whole(53, 6)),
        (longnet([10, 26, 21], [1, 3, 2], head_groups=True), whole(53, 6, 2, (53, 20))),
        (longnet([16, 32], [2, 3], head_offset="torchscale"), whole(40, 6, keys=53, start=9)),
        (Documents([7, 0, 23, 17]).of(longnet([8, 64], [1, 2]) & Causal()), whole(53, 6)),
        (Documents([[7, 13, 33], [1, 2, 50]]).of(Window(6)), whole(53, 6, 2)),
        (random_pattern(source, 53, 0), whole(53, 6)),
        (BlockSparse(5, torch.randint(0, 3, (6, 11, 11), generator=torch.Generator().manual_seed(1))), whole(53, 6)),
        (Dilated(24, 2) & Dilated(40, 3), whole(53, 6)),
    ):
        world = planned_world(problem, layout, size, rank=size - 1)
        found = rank_work(problem, pattern, world, inner)
        assert found.pairs == drawn(problem, pattern, world, inner), pattern
        assert found.is_exact


def test_imbalance_is_of_the_heaviest_rank():
    work = Work((3, 5, 4), True)
    assert (work.total, work.heaviest, work.imbalance) == (12, 5, 1.25)
    assert Work((0, 0), True).imbalance == 1.0


@pytest.mark.parametrize("length", [1 << 16, 200_000, 1 << 20, 10**7])
@pytest.mark.parametrize("branches", [PAPER, GIGAPATH], ids=["longnet", "gigapath"])
def test_published_branches_have_an_even_layout(branches, length):
    pattern, heads = branches
    problem = whole(length, heads)
    for size in WORLDS:
        full, causal = layout_imbalance(problem, pattern, size), layout_imbalance(problem, pattern & Causal(), size)
        assert max(full.values()) <= EVEN, (size, full)
        assert causal["striped"] <= 1.03, (size, causal)
        assert first_even(full) == "contiguous"
        assert causal[first_even(causal)] <= EVEN


def test_layouts_that_do_not_make_causal_branches_even():
    """A segment that ends between two shards' borders is a triangle that zigzag does not fold."""
    problem = whole(1 << 16, 12)
    of_two_shards = longnet([1 << 14], [1]) & Causal()
    found = layout_imbalance(problem, of_two_shards, 8)
    assert found["contiguous"] == pytest.approx(1.5, abs=1e-3)  # a quarter and three quarters of each triangle
    assert found["zigzag"] == pytest.approx(1.0, abs=1e-3)
    assert first_even(found) == "zigzag"
    odd = longnet([40000], [1]) & Causal()
    found = layout_imbalance(problem, odd, 8)
    assert min(found["contiguous"], found["zigzag"]) > EVEN > found["striped"]
    assert best_layout(problem, odd, 8) == "striped"
    # 12 heads on 64 offsets: stripes of 64 ranks give 12 of them all the work
    few = longnet([1 << 15], [64])
    found = layout_imbalance(problem, few, 64)
    assert found["striped"] == pytest.approx(64 / 12)
    assert first_even(found) == "contiguous"
    assert first_even({"contiguous": 2.0, "zigzag": 1.3, "striped": 1.2}) == "striped"


def test_full_causal_attention_is_even_in_zigzag_and_stripes():
    found = layout_imbalance(whole(10**9, 8), Causal(), 1024)
    assert found["contiguous"] == pytest.approx(2, abs=2e-3)
    assert found["zigzag"] == pytest.approx(1, abs=1e-5)
    assert found["striped"] == pytest.approx(1, abs=1e-5)


def test_rates_beyond_the_heads_want_lengths_that_segments_divide():
    """Of 512 offsets 16 heads use 16: stripes starve. Zigzag folds triangles of segments that divide the length."""
    pattern = longnet([2048 * 4**i for i in range(10)], [2**i for i in range(10)]) & Causal()
    found = layout_imbalance(whole(1 << 30, 16), pattern, 1024)
    assert found["zigzag"] < 1.001 < EVEN < found["contiguous"] < found["striped"]
    uneven = layout_imbalance(whole(10**9, 16), pattern, 1024)
    assert min(uneven.values()) == uneven["zigzag"] == pytest.approx(1.305, abs=1e-3)


def test_without_a_closed_form_a_sample_tells():
    table = torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) < 0.3
    pattern = BlockSparse(512, table) & Causal()
    problem = whole(64 * 512, 2)
    work = rank_work(problem, pattern, planned_world(problem, "contiguous", 4))
    assert not work.is_exact
    blocks = table.tril(-1) * 512.0**2 + table.diag().diag() * (512 * 513 / 2)
    for found, rows in zip(work.pairs, blocks.tensor_split(4)):
        assert found == pytest.approx(2 * float(rows.sum()), rel=0.05)


def test_ranks_without_tokens_have_no_work():
    problem = whole(3, 4)
    assert rank_work(problem, Full(), planned_world(problem, "contiguous", 5)).pairs == (12, 12, 12, 0, 0)
    assert rank_work(whole(0, 4), Full(), planned_world(whole(0, 4), "zigzag", 2)).imbalance == 1.0
