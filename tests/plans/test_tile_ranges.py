"""Tables of tiles in ranges: together the tables of the whole, each within the limit, none of them kept."""

import gc
import weakref

import pytest
import torch

from dilated_attention_pytorch import Causal, InvalidInput
from dilated_attention_pytorch.explanation import explain
from dilated_attention_pytorch.patterns import BlockSparse
from dilated_attention_pytorch.plans import (
    DensePlan,
    OrderedPlan,
    RowOrder,
    TileRanges,
    candidate_plans,
    planner,
    tile_plan,
    tile_ranges,
    tiles,
)
from dilated_attention_pytorch.plans.base import shapes_of
from dilated_attention_pytorch.plans.orders import chosen_plan
from dilated_attention_pytorch.problem import Run, make_problem
from dilated_attention_pytorch.selection import SelectedTiles
from dilated_attention_pytorch.testing import PATTERNS


def problem_of(n, *, heads=2, batch=1, visible=None, start=0):
    q, k = torch.zeros(batch, n, heads, 1), torch.zeros(batch, n + start, heads, 1)
    mask = None if visible is None else torch.arange(n + start) >= torch.tensor(visible)[:, None]
    return make_problem(q, k, k, scale=1.0, query_start=start, key_padding_mask=mask)


def chosen(n=128, block=16):
    """A choice in which no two tiles are alike."""
    generator = torch.Generator().manual_seed(0)
    inner = BlockSparse(1, torch.randint(0, 3, (n, n), generator=generator)) & Causal()
    return SelectedTiles(BlockSparse(block, torch.ones(2, -(-n // block), n // block, dtype=torch.bool)), inner)


LISTS = ("kv", "full", "q", "full_q")


@pytest.mark.parametrize("name", ["longnet_causal", "documents_batched", "product_of_grids", "causal"])
@pytest.mark.parametrize("limit", [1, 500, 1 << 20])
def test_the_parts_have_the_tiles_of_the_whole_in_its_order(name, limit, monkeypatch):
    monkeypatch.setattr(tiles, "TABLE_BYTES", limit)
    problem = problem_of(37, heads=4, batch=2, visible=(37, 20))
    ranges = tile_ranges(PATTERNS[name], problem, (8, 4))
    monkeypatch.undo()
    whole, parts = tile_plan(PATTERNS[name], problem, (8, 4)), list(ranges.parts())
    assert len(parts) == len(ranges.ranges)
    assert ranges.ranges[0][0] == 0
    assert [first for first, _ in ranges.ranges[1:]] == [last for _, last in ranges.ranges[:-1]]
    assert ranges.ranges[-1][1] == whole.kv_num.numel()
    assert ranges.grid == whole.grid == (*whole.kv_num.shape, whole.q_num.shape[2])
    for part in parts:
        assert part.grid == whole.grid
        alone = len(part.kv_num.flatten().nonzero()) <= 1
        assert alone or part.counts.nbytes <= limit
    for kind in ("kv", "full"):
        numbers = torch.stack([getattr(part, f"{kind}_num") for part in parts])
        assert bool((numbers.count_nonzero(0) <= 1).all()), "a block of queries has all its tiles in one part"
        assert torch.equal(numbers.sum(0, dtype=torch.int32), getattr(whole, f"{kind}_num"))
        for part in parts:
            held = torch.arange(getattr(part, f"{kind}_idx").shape[-1]) < getattr(part, f"{kind}_num").unsqueeze(-1)
            index = getattr(whole, f"{kind}_idx")[..., : held.shape[-1]]
            assert torch.equal(getattr(part, f"{kind}_idx")[held], index[held])
    for kind in ("q", "full_q"):
        numbers = sum(getattr(part, f"{kind}_num") for part in parts)
        assert torch.equal(numbers, getattr(whole, f"{kind}_num"))
    expected = DensePlan(PATTERNS[name]).expand(problem)
    assert torch.equal(ranges.expand(problem), expected)
    assert ranges.counted_pairs(problem) == int(expected.sum())
    assert ranges.issued_pairs(problem) >= whole.issued_pairs(problem)


def test_ranges_are_few_and_as_large_as_the_limit_lets_them(monkeypatch):
    problem, size = problem_of(128), 16 * 16
    unlimited = tile_ranges(chosen(), problem, (16, 16))
    assert len(unlimited.ranges) == 1
    monkeypatch.setattr(tiles, "TABLE_BYTES", 20 * size)
    ranges = tile_ranges(chosen(), problem, (16, 16))
    held = [part.counts.nbytes // size for part in ranges.parts()]
    assert held == [20, 16, 20, 16]
    assert "tables made in 4 parts" in ranges.describe(problem)
    assert ranges.num_tiles == 2 * 36


def test_only_a_choice_is_cut_and_its_rows_stay_apart(monkeypatch):
    monkeypatch.setattr(tiles, "TABLE_BYTES", 1)
    planner._cache.clear()
    problem = problem_of(100, start=28)
    alone = chosen().right
    assert [type(plan) for plan in candidate_plans(alone, problem, tiles=True)] == [DensePlan]
    for block, start, queries in ((16, 28, 2), (16, 32, 1)):
        problem = problem_of(128 - start, start=start)
        (plan,) = (p for p in candidate_plans(chosen(block=block), problem) if isinstance(p, OrderedPlan))
        assert isinstance(plan.tiles, TileRanges)
        assert plan.kind == "TilePlan"
        assert (plan.order.filling is None) == (len(plan.order.queries) == 1) == (queries == 1)
        expected = DensePlan(chosen(block=block)).expand(problem)
        assert torch.equal(plan.expand(problem), expected)
        assert plan.counted_pairs(problem) == int(expected.sum())
        assert sum(part.num_tiles for part in plan.parts()) == plan.tiles.num_tiles
    planner._cache.clear()


def test_a_choice_within_the_limit_has_one_table():
    plan = chosen_plan(chosen(), problem_of(128), (16, 16))
    assert plan.num_tiles == 2 * 36
    order = RowOrder.of((Run(0, 1, 100),), (Run(0, 1, 128),), "cpu")
    apart = chosen_plan(chosen(), problem_of(100, start=28), (16, 16))
    assert apart.order.queries != order.queries
    assert next(apart.parts()) is apart.tiles


def test_parts_are_not_kept_and_plans_keep_no_tensor_alive(monkeypatch):
    monkeypatch.setattr(tiles, "TABLE_BYTES", 20 * 256)
    problem = problem_of(128)
    ranges = tile_ranges(chosen(), problem, (16, 16))
    seen = [weakref.ref(part) for part in ranges.parts()]
    held = weakref.ref(problem.q)
    assert shapes_of(problem).q.shape == problem.q.shape
    assert shapes_of(problem).query_positions == problem.query_positions
    del problem
    gc.collect()
    assert held() is None
    assert not any(part() for part in seen)


def test_counts_above_what_a_table_holds():
    layout = torch.full((4, 4), 1 << 31)
    problem = problem_of(4)
    for pattern in (BlockSparse(1, layout) & Causal(), BlockSparse(1, layout)):  # read, and known by bounds
        assert tile_plan(pattern, problem, (4, 4)) is None
        with pytest.raises(InvalidInput, match="expected counts up to 2147483647"):
            list(tile_ranges(pattern, problem, (4, 4)).parts())


def test_explain_names_the_parts_and_reads_no_table(monkeypatch):
    monkeypatch.setattr(tiles, "TABLE_BYTES", 20 * 256)
    monkeypatch.setattr(planner, "HELD_PAIRS", 0)
    monkeypatch.setattr("dilated_attention_pytorch.flops.EXACT_PAIRS", 0)
    monkeypatch.setattr(TileRanges, "parts", lambda _: pytest.fail("tables were made"))
    planner._cache.clear()
    q = torch.zeros(1, 128, 2, 8)
    found = explain(q, q, q, chosen(), backend="sdpa")
    assert "tables made in 6 parts" in found.plans[0]
    assert (found.pairs, found.pairs_are_exact) == (2 * 128 * 128, False)
    planner._cache.clear()
