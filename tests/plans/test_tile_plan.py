"""Tables of tiles: exactly the pattern's counts, full tiles known without reading them, empty regions never visited."""

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, Documents, Full, Window, longnet
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.patterns.base import UNBOUNDED, Block
from dilated_attention_pytorch.plans import DensePlan, TilePlan, candidate_plans, tile_plan, tiles
from dilated_attention_pytorch.problem import Run, make_problem
from dilated_attention_pytorch.testing import PATTERNS


def problem_of(n, *, heads=2, batch=1, visible=None, device="cpu", positions=None):
    x = torch.zeros(batch, n, heads, 1, device=device)
    mask = None if visible is None else torch.arange(n) >= torch.tensor(visible)[:, None]
    problem = make_problem(x, x, x, scale=1.0, query_start=0, key_padding_mask=mask)
    return problem if positions is None else replace(problem, query_positions=positions, key_positions=positions)


@pytest.mark.parametrize("block_size", [(128, 64), (8, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("name", PATTERNS)
def test_tables_hold_the_counts(name, block_size):
    problem = problem_of(37, heads=4, batch=2, visible=(37, 20))
    plan = tile_plan(PATTERNS[name], problem, block_size)
    assert torch.equal(plan.expand(problem), DensePlan(PATTERNS[name]).expand(problem))


@pytest.mark.parametrize("order", [(Run(2, 3, 40), Run(0, 3, 40), Run(1, 3, 39)), (Run(70, 1, 20), Run(5, 7, 9))])
@pytest.mark.parametrize("name", ["longnet_causal", "not_nesting", "documents_of", "product_of_grids"])
def test_rows_in_any_order(name, order):
    problem = problem_of(sum(run.length for run in order), heads=4, batch=2, positions=order)
    for block_size in ((16, 8), (7, 5)):
        plan = tile_plan(PATTERNS[name], problem, block_size)
        assert torch.equal(plan.expand(problem), DensePlan(PATTERNS[name]).expand(problem))


@pytest.mark.parametrize("name", ["causal", "documents_batched", "longnet"])
def test_the_transposed_tables_name_the_same_tiles(name):
    problem = problem_of(37, heads=4, batch=2, visible=(37, 20))
    plan = tile_plan(PATTERNS[name], problem, (8, 4))

    def named(num, idx, value, by_key):
        found = set()
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in num.shape)).tolist():
            line = idx[b, h, row, : num[b, h, row]].tolist()
            assert line == sorted(set(line))
            for place, column in enumerate(line):
                q, k = (column, row) if by_key else (row, column)
                found.add((b, h, q, k, int(value[b, h, row, place])))
        return found

    partial = named(plan.kv_num, plan.kv_idx, plan.kv_table, False)
    full = named(plan.full_num, plan.full_idx, plan.full_count, False)
    assert partial == named(plan.q_num, plan.q_idx, plan.q_table, True)
    assert full == named(plan.full_q_num, plan.full_q_idx, plan.full_q_count, True)
    assert partial
    assert plan.num_tiles == len(partial) + len(full)


def test_full_tiles_hold_their_count_and_equal_tiles_share_a_table():
    plan = tile_plan(Causal() + Causal(), problem_of(1024), (128, 128))
    assert plan.kv_num.shape == (1, 1, 8), "heads and samples that agree share one table"
    assert plan.kv_num.flatten().tolist() == [1] * 8
    assert plan.full_num.flatten().tolist() == list(range(8))
    assert set(plan.full_count[plan.full_count > 0].tolist()) == {2}
    assert plan.counts.shape == (1, 128, 128)
    assert torch.equal(plan.counts[0], 2 * torch.ones(128, 128, dtype=torch.uint8).tril())
    assert plan.density == 36 / 64
    assert "56.2 % of them" in plan.describe(problem_of(1024))
    assert plan.issued_pairs(problem_of(1024)) == 2 * 36 * 128 * 128


def test_rows_sorted_by_residue_make_a_dilated_pattern_block_dense():
    pattern, n = Dilated(1024, 4), 1024
    sorted_rows = tuple(Run(residue, 4, n // 4) for residue in range(4))
    before = tile_plan(pattern, problem_of(n, heads=1), (64, 64))
    after = tile_plan(pattern, problem_of(n, heads=1, positions=sorted_rows), (64, 64))
    assert before.density == 1.0
    assert after.density == 1 / 16
    assert after.kv_num.sum() == 0, "every tile left is full"


def test_a_long_window_is_found_without_visiting_all_tiles(monkeypatch):
    visited = []
    bounds = Window.count_bounds

    def counted(self, head, num_heads, q, k):
        visited.append(len(q.low))
        return bounds(self, head, num_heads, q, k)

    monkeypatch.setattr(Window, "count_bounds", counted)
    n = 1 << 20
    plan = tile_plan(Window(100), problem_of(n, device="meta"))
    assert plan.num_tiles < 4 * n / 64
    assert sum(visited) < 100 * plan.num_tiles, "all tiles would be 3,000 times as many"
    assert plan.counts.shape[0] < 12


@pytest.mark.parametrize("name", PATTERNS)
def test_bounds_and_period_hold(name):
    """Bounds hold every count of a block; moving by the period changes none."""
    pattern, heads, size = PATTERNS[name], 4, 3
    counts = pattern.to_mask(heads, 36)
    counts = counts if counts.dim() == 4 else counts[None]
    blocks = counts.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, H, Q, 3, K, 3)
    low = torch.arange(0, 36, size)
    head = torch.arange(heads).view(-1, 1, 1)
    q, k = (Block(x, x + size - 1, torch.ones_like(x)) for x in (low.view(-1, 1), low))
    least, most = pattern.count_bounds(head, heads, q, k)
    assert bool((torch.as_tensor(least) <= blocks.amin((3, 5))).all())
    assert bool((torch.as_tensor(most) >= blocks.amax((3, 5))).all())
    if not pattern.varies_by_head:
        assert torch.equal(counts, counts[:, :1].expand_as(counts))
    if pattern.period is not None:
        step = pattern.period
        longer = pattern.to_mask(heads, 36 + step)
        assert torch.equal(longer[..., step:, step:], pattern.to_mask(heads, 36))


def test_a_pattern_that_tells_nothing_but_its_counts():
    class Odd(Pattern):
        def count(self, head, num_heads, q, k):
            return ((q * k + head) % 3 == 0) * 1

        def text(self, first_table=0):
            return "Odd()"

        tables = ()

    assert Odd().count_bounds(torch.zeros(1), 1, None, None) == (0, UNBOUNDED)
    assert Odd().varies_by_head
    assert Odd().period is None
    problem = problem_of(50)
    plan = tile_plan(Odd(), problem, (16, 16))
    assert torch.equal(plan.expand(problem), DensePlan(Odd()).expand(problem))
    Pattern.kinds.pop("Odd")


def test_tables_that_would_be_too_large_are_not_made(monkeypatch):
    many = longnet([8], [1])
    for _ in range(8):
        many = many + many
    assert tile_plan(many, problem_of(8, heads=1), (8, 8)).full_count.max() == 256
    mixed = tile_plan(many & Causal(), problem_of(8, heads=1), (8, 8))
    assert mixed.counts.dtype == torch.int32, "256 does not fit in 8 bits"
    assert torch.equal(mixed.expand(problem_of(8, heads=1)), DensePlan(many & Causal()).expand(problem_of(8, heads=1)))
    pattern = Documents([40, 24]) & Dilated(16, 2)
    monkeypatch.setattr(tiles, "TABLE_BYTES", 64)
    assert tile_plan(pattern, problem_of(64), (16, 16)) is None
    monkeypatch.setattr(tiles, "PARTIAL_PAIRS", 64)
    assert tile_plan(pattern, problem_of(64), (16, 16)) is None
    assert not any(isinstance(plan, TilePlan) for plan in candidate_plans(pattern, problem_of(64), tiles=True))


def test_no_rows_or_no_keys():
    q, k = torch.zeros(1, 0, 2, 1), torch.zeros(1, 5, 2, 1)
    for a, b in ((q, k), (k, q)):
        problem = make_problem(a, b, b, scale=1.0, query_start=0)
        plan = tile_plan(Full(), problem)
        assert plan.num_tiles == 0
        assert plan.expand(problem).shape == (1, 2, a.shape[1], b.shape[1])


def test_tiles_are_made_on_request_or_where_nothing_else_is_fast():
    problem = problem_of(600, heads=4)
    assert not any(isinstance(p, TilePlan) for p in candidate_plans(Causal(), problem))
    assert any(isinstance(p, TilePlan) for p in candidate_plans(Causal(), problem, tiles=True))
    assert isinstance(candidate_plans(PATTERNS["product_of_grids"], problem)[0], TilePlan)
