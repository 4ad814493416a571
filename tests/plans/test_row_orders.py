"""Orders of rows: each row stands in them once, counts stay what they are, and dilated patterns become block-dense."""

from dataclasses import replace
from random import Random

import pytest
import torch

from dilated_attention_pytorch.patterns import BlockSparse, Causal, Dilated, Documents, Full, Window, longnet
from dilated_attention_pytorch.plans import StridedPlan, TilePlan, candidate_plans, tile_plan
from dilated_attention_pytorch.plans.base import DensePlan
from dilated_attention_pytorch.plans.orders import (
    OrderedPlan,
    RowOrder,
    block_rows,
    ordered_plan,
    residue_order,
    rows_apart,
)
from dilated_attention_pytorch.plans.tiles import visited_tiles
from dilated_attention_pytorch.problem import Problem, Run, make_problem, positions_tensor
from dilated_attention_pytorch.selection import DilatedBlocks
from dilated_attention_pytorch.testing.cases import CASES, random_case


def problem_of(n: int, nk: int | None = None, start: int = 0, heads: int = 2, batch: int = 1) -> Problem:
    nk = n if nk is None else nk
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, n, heads, 4, generator=generator)
    k, v = (torch.randn(batch, nk, heads, 4, generator=generator) for _ in range(2))
    return make_problem(q, k, v, scale=1.0, query_start=start)


DENSER = {
    "one_rate": Dilated(64, 4),
    "three_rates": longnet([32, 64, 128], [1, 2, 4]),
    "causal": longnet([32, 64, 128], [1, 2, 4]) & Causal(),
    "rates_2_and_3": longnet([60, 120], [2, 3]),
    "rate_not_dividing": Dilated(50, 4),
    "documents": Documents([70, 3, 55]).of(Dilated(64, 4)),
    "product_of_grids": Dilated(64, 2) & Dilated(96, 4),
}


@pytest.mark.parametrize("name", DENSER)
def test_ordered_plans_are_denser_and_hold_the_same_counts(name):
    problem, pattern = problem_of(128), DENSER[name]
    plan = ordered_plan(pattern, problem, (8, 8))
    assert isinstance(plan, OrderedPlan)
    assert isinstance(plan.tiles, TilePlan)
    assert torch.equal(plan.expand(problem), DensePlan(pattern).expand(problem))
    rows = tile_plan(pattern, problem, (8, 8))
    assert plan.tiles.num_tiles < 0.75 * rows.num_tiles
    assert plan.issued_pairs(problem) < 0.75 * rows.issued_pairs(problem)
    assert plan.describe(problem).endswith("rows by residue")


def test_a_branch_at_rate_8_leaves_one_tile_in_64():
    problem, pattern = problem_of(1024, heads=1), Dilated(1024, 8)
    rows, plan = tile_plan(pattern, problem, (16, 16)), ordered_plan(pattern, problem, (16, 16))
    assert (rows.density, plan.tiles.density) == (1.0, 1 / 64)
    assert int(plan.tiles.kv_num.sum()) == 0, "each tile that is left is full"
    assert visited_tiles(pattern, problem, (16, 16)) == rows.num_tiles


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(9), longnet([8], [1]), Documents([60, 68])])
def test_nothing_is_moved_where_no_order_helps(pattern):
    assert residue_order(pattern, problem_of(128), (8, 8)) is None
    assert ordered_plan(pattern, problem_of(128), (8, 8)) is None


def test_rows_that_stand_apart_keep_their_order():
    problem = problem_of(128)
    apart = RowOrder.of((Run(0, 2, 64), Run(1, 2, 64)), (Run(0, 1, 128),), "cpu").placed(problem)
    assert residue_order(Dilated(64, 4), apart, (8, 8)) is None


def test_samples_packed_differently_keep_their_order():
    packed = Documents([[70, 58], [1, 127]]).of(Dilated(64, 4))
    assert residue_order(packed, problem_of(128, batch=2), (8, 8)) is None
    assert residue_order(Dilated(127, 63) & Window(100), problem_of(10_000_0), (128, 128)) is None, "too many runs"


@pytest.mark.parametrize(("n", "nk", "start"), [(128, 128, 0), (100, 128, 28), (61, 128, 40), (70, 100, 30)])
def test_every_row_stands_once(n, nk, start):
    for pattern in (Dilated(32, 4), Dilated(30, 4), Documents([40, 90, 60]).of(Dilated(32, 4))):
        order = residue_order(pattern, problem_of(n, nk, start), (4, 4))
        assert order is not None
        assert order.query_rows.sort().values.tolist() == list(range(n))
        assert order.key_rows.sort().values.tolist() == list(range(nk))
        assert torch.equal(positions_tensor(order.queries), order.query_rows)
        assert torch.equal(positions_tensor(order.keys), order.key_rows)


def test_applied_moves_tensors_and_bias_with_their_positions():
    problem = problem_of(6, 8, start=2)
    order = RowOrder.of((Run(0, 2, 3), Run(1, 2, 3)), (Run(4, 1, 4), Run(0, 1, 4)), "cpu")
    for bias in (torch.randn(6, 8), torch.randn(1, 2, 1, 8), torch.randn(8), torch.randn(6, 1)):
        moved = order.applied(make_problem(problem.q, problem.k, problem.v, scale=1.0, query_start=2, bias=bias))
        assert positions_tensor(moved.query_positions).tolist() == [2, 4, 6, 3, 5, 7]
        assert positions_tensor(moved.key_positions).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
        assert torch.equal(order.restored_queries(moved.q, 1), problem.q)
        assert torch.equal(order.restored_keys(moved.v, 1), problem.v)
        assert torch.equal(order.ordered_queries(problem.q, 1), moved.q)
        q, k = (x.tolist() for x in (order.query_rows, order.key_rows))
        full = bias.expand(1, 2, 6, 8)
        assert torch.equal(moved.bias.expand(1, 2, 6, 8), full[:, :, q][..., k])


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_keep_their_counts(seed):
    case = random_case(Random(seed))
    problem = case.problem(torch.float32)
    plan = ordered_plan(case.pattern, problem, (4, 4))
    if plan is not None:
        assert torch.equal(plan.expand(problem), DensePlan(case.pattern).expand(problem))


def test_orders_are_found_among_the_contracts_cases():
    found = sum(residue_order(c.pattern, c.problem(torch.float32), (2, 2)) is not None for c in CASES[:50])
    assert found > 8


def test_tables_asked_for_come_in_the_denser_order_first():
    problem, pattern = problem_of(2048, heads=1), Dilated(2048, 4)
    kinds = [type(plan) for plan in candidate_plans(pattern, problem, tiles=True)]
    assert kinds == [StridedPlan, DensePlan, OrderedPlan, TilePlan]
    longer = problem_of(16384, heads=1)  # in row order too many tiles to be read
    kinds = [type(plan) for plan in candidate_plans(Dilated(16384, 4), longer, tiles=True)]
    assert kinds == [StridedPlan, DensePlan, OrderedPlan]
    assert [type(plan) for plan in candidate_plans(Causal(), problem, tiles=True)][-1] is TilePlan


@pytest.mark.parametrize("pattern", [longnet([128, 256, 512], [2, 4, 8]), Dilated(512, 4)], ids=["longnet", "one_rate"])
def test_chosen_blocks_do_not_decide_on_the_order(pattern):
    found = set()
    for share in (0.02, 0.1, 0.5, 1.0):
        layout = (torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < share) | torch.eye(32).bool()
        order = residue_order(BlockSparse(16, layout) & (pattern & Causal()), problem_of(512), (16, 16))
        found.add(None if order is None else (order.queries, order.keys))
    assert len(found) == 1


def test_rows_that_fill_tiles_repeat_the_row_before_them_and_are_left_out():
    problem = problem_of(12, 30, start=0)
    problem = replace(problem, query_positions=(Run(5, 1, 7), Run(20, 2, 5)))
    runs = rows_apart(problem.query_positions, 8, 4)
    assert runs == (Run(0, 1, 3), Run(2, 0, 1), Run(3, 1, 6), Run(8, 0, 2), Run(9, 1, 3))
    order = RowOrder.of(runs, (Run(0, 1, 30),), "cpu")
    moved = order.applied(problem)
    at = [5, 6, 7, 7, 8, 9, 10, 11, 20, 22, 22, 22, 24, 26, 28]
    assert positions_tensor(moved.query_positions).tolist() == at
    assert moved.k is problem.k, "keys stay where they are, uncopied"
    assert torch.equal(order.restored_queries(moved.q, 1), problem.q)
    gradients = order.ordered_gradients(problem.q, 1)
    assert [i for i, row in enumerate(gradients[0, :, 0]) if bool((row == 0).all())] == [3, 10, 11]
    assert torch.equal(order.restored_queries(gradients, 1), problem.q)
    assert rows_apart((Run(8, 1, 30),), 8, 4) is None, "tiles end where blocks do"
    assert rows_apart((Run(9, 1, 6),), 8, 4) is None, "one block"
    assert block_rows(problem.query_positions, 8).tolist() == [3, 4, 2, 3]


def test_of_rows_in_several_runs_only_keys_in_one_are_moved():
    """Where a choice names the classes of its keys, the rows of a shard may stand anywhere."""
    pattern = DilatedBlocks(16, 256, torch.tensor([[1, 2, 4, 2]]), 4) & Causal()
    problem = problem_of(40, 64)
    problem = replace(problem, query_positions=(Run(3, 1, 20), Run(40, 1, 20)))
    (plan,) = (p for p in candidate_plans(pattern, problem) if not isinstance(p, DensePlan))
    assert isinstance(plan, OrderedPlan)
    assert plan.order.moves_keys
    assert plan.kind == "OrderedPlan"
    assert plan.describe(problem).endswith("rows by residue, chosen blocks apart")
    expected = DensePlan(pattern).expand(problem)
    assert torch.equal(plan.expand(problem), expected)
    assert plan.counted_pairs(problem) == int(expected.sum())
