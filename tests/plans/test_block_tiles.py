"""Tables of block patterns: found from cells, read from a handful of tiles, with exactly the counts of the pattern."""

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, Documents, Window
from dilated_attention_pytorch.patterns import BlockSparse, global_local, random_blocks
from dilated_attention_pytorch.patterns.base import And, Block, Sum
from dilated_attention_pytorch.patterns.documents import Packed
from dilated_attention_pytorch.plans import DensePlan, orders, tile_plan, tile_search
from dilated_attention_pytorch.problem import Run, make_problem


def problem_of(n, *, heads=2, batch=1, visible=None):
    x = torch.zeros(1).expand(batch, n, heads, 1)
    mask = None if visible is None else torch.arange(n) >= torch.tensor(visible)[:, None]
    return make_problem(x, x, x, scale=1.0, query_start=0, key_padding_mask=mask)


def counts_table(*shape, most=2):
    return torch.randint(0, most + 1, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def read(monkeypatch):
    """How many tiles were read pair by pair."""
    numbers = []
    counts = tile_search.Reader.counts

    def counted(self, chosen, block_size):
        numbers.append(len(chosen.q))
        return counts(self, chosen, block_size)

    monkeypatch.setattr(tile_search.Reader, "counts", counted)
    return numbers


BLOCKS = BlockSparse((6, 5), counts_table(2, 11, 14))
KINDS = {
    "alone": BLOCKS,
    "causal": BLOCKS & Causal(),
    "window": Window(9) & (BLOCKS & Causal()),
    "documents": Documents([11, 0, 30, 20]) & BLOCKS,
    "documents_of": Documents([11, 0, 30, 20]).of(BLOCKS & Causal()),
    "documents_of_each": Documents([[11, 0, 30, 20], [40, 2, 3, 0]]).of(BLOCKS + Window(3)),
    "two": BLOCKS & BlockSparse(4, counts_table(2, 2, 17, 17)),
    "sum": (BLOCKS & Causal()) + Dilated(16, 4),
    "small": BlockSparse(1, counts_table(64, 64)),
}


@pytest.mark.parametrize("rows", ["whole", "mixed"])
@pytest.mark.parametrize("name", KINDS)
def test_tables_hold_the_counts(name, rows):
    problem = problem_of(61, batch=2, visible=(61, 40))
    if rows == "mixed":  # a shard of a ring, say: positions go up and down, and leave some out
        at = (Run(30, 2, 16), Run(1, 3, 10), Run(9, 1, 2))
        problem = replace(problem_of(28, batch=2), query_positions=at, key_positions=at[::-1])
    expected = DensePlan(KINDS[name]).expand(problem)
    for size in ((12, 5), (4, 8), (16, 16), (128, 64)):
        plan = tile_plan(KINDS[name], problem, size)
        assert torch.equal(plan.expand(problem), expected), size
        assert plan.counted_pairs(problem) == int(expected.sum())


def test_shared_tables_serve_heads_and_samples_that_differ_otherwise():
    shared = BlockSparse(8, counts_table(1, 1, 8, 8))
    for pattern in (shared & Dilated(16, 2), shared & Documents([[30, 34], [64, 0]])):
        problem = problem_of(64, heads=3, batch=2)
        assert torch.equal(tile_plan(pattern, problem, (8, 8)).expand(problem), DensePlan(pattern).expand(problem))


def test_causal_blocks_are_read_from_two_tiles(read):
    problem = problem_of(4096, heads=4, batch=2)
    layout = torch.stack([random_blocks(4096, density=0.2, num_heads=4, seed=s).layout for s in (0, 1)])
    plan = tile_plan(BlockSparse(128, layout) & Causal(), problem)
    assert read == [2], "both halves of a diagonal block, alike for all samples, heads and rows"
    assert plan.counts.shape == (2, 128, 64)
    below = layout[:, :, torch.ones(32, 32).tril(-1) > 0].sum()
    assert plan.num_tiles == 2 * int(below) + 2 * 32 * 4 * 2
    assert int(plan.kv_num.sum()) == 2 * 32 * 4 * 2


def test_blocks_that_do_not_match_tiles_are_read_once_for_each_arrangement(read):
    pattern = random_blocks(3072, block_size=96, density=0.1, num_heads=4)
    plan = tile_plan(pattern, problem_of(3072, heads=4))
    assert plan.num_tiles > 600
    # 3 places of query blocks and 3 of key blocks in tiles; 2 x 1 or 2 x 2 cells, not all 0
    assert read[0] <= 9 * 15
    problem = problem_of(3072, heads=4)
    head = replace(problem, q=problem.q[:, :500], query_positions=(Run(1111, 1, 500),))
    assert torch.equal(tile_plan(pattern, head).expand(head), DensePlan(pattern).expand(head))


def test_packed_blocks_skip_what_lies_in_another_document(read):
    packed = Documents([250, 512, 262]).of(random_blocks(512, block_size=32, density=0.3, num_heads=2) & Causal())
    problem = problem_of(1024)
    plan, expected = tile_plan(packed, problem, (32, 16)), DensePlan(packed).expand(problem)
    assert torch.equal(plan.expand(problem), expected)
    needed = expected.unflatten(3, (-1, 16)).unflatten(2, (-1, 32)).amax((3, 5)) > 0
    assert plan.num_tiles == int(needed.sum())
    assert sum(read) < plan.num_tiles / 4


def test_bounds_of_tiles_that_cross_documents_hold_and_are_near():
    packed = Documents([5, 9, 0, 6]).of(BlockSparse(3, counts_table(3, 3)) & Causal())
    mask = packed.to_mask(1, 20)[0]
    low = torch.arange(0, 20, 4)
    block = Block(low, low + 3, torch.ones_like(low))
    least, most = packed.count_bounds(
        torch.zeros(1, 1), 1, *(Block(*(x.view(s) for x in block)) for s in ((-1, 1), (1, -1)))
    )
    cells = mask.unflatten(1, (5, 4)).unflatten(0, (5, 4))
    assert bool((least <= cells.amin((1, 3))).all())
    assert bool((most >= cells.amax((1, 3))).all())
    assert bool((most[low[:, None] + 3 < low] == 0).all())
    assert most[0, 0] == packed.inner.to_mask(1, 4).max(), "one document: its own bounds"


def test_long_tables_look_at_no_more_than_they_keep(monkeypatch):
    looked = []
    bounds = BlockSparse.count_bounds

    def counted(self, head, num_heads, q, k):
        looked.append(q.low.numel() * k.low.numel() // max(1, len(q.low)))
        return bounds(self, head, num_heads, q, k)

    monkeypatch.setattr(BlockSparse, "count_bounds", counted)
    pattern = random_blocks(1 << 19, density=0.01)
    plan = tile_plan(pattern & Causal(), problem_of(1 << 19, heads=1))
    assert plan.counts.shape[0] == 2
    assert plan.num_tiles > 100_000
    assert sum(looked) < 3 * pattern.layout.count_nonzero() * 2, "all tiles would be 100 times as many"


def test_nothing_is_counted_for_an_order_when_no_part_has_a_grid(monkeypatch):
    monkeypatch.setattr(orders, "visited_tiles", lambda *_: pytest.fail("tiles were counted"))
    pattern = global_local(4096, window=200) & Causal()
    assert orders.residue_order(pattern, problem_of(4096)) is None


def test_of_sample_drops_the_batch_of_tables():
    lengths = torch.tensor([[11, 50], [40, 21]])
    table = BlockSparse(8, counts_table(2, 2, 8, 8))
    documents = Documents(lengths)
    for pattern in (documents, documents.of(table), documents.of(Causal()), table & Causal(), table + documents):
        whole = pattern.to_mask(2, 61)
        for b in range(2):
            alone = pattern.of_sample(b)
            assert not alone.varies_by_sample
            assert type(alone) is type(pattern)
            assert torch.equal(alone.to_mask(2, 61), whole[b])
    assert {Packed, And, Sum} == {type(p) for p in (documents.of(table), table & Causal(), table + table)}
    shared = BlockSparse(8, counts_table(1, 2, 8, 8))
    assert torch.equal(shared.of_sample(3).layout, shared.layout[0])


def test_seen_is_where_blocks_of_rows_meet_cells_that_are_not_empty():
    table = counts_table(2, 9, 7, most=1)
    pattern = BlockSparse((4, 6), table)
    mask = pattern.to_mask(2, 40, 48, query_start=0) > 0  # rows and columns past the table too
    for rows, columns in ((4, 6), (1, 3), (8, 16), (40, 12), (5, 48)):
        q, k = (
            Block(low, low + size - 1, torch.ones_like(low))
            for low, size in ((torch.arange(0, 40, rows), rows), (torch.arange(0, 48, columns), columns))
        )
        expected = mask.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).amax((2, 4))
        assert torch.equal(pattern.seen(q, k), expected), (rows, columns)
