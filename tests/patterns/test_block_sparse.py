"""BlockSparse: counts from a table, bounds that hold, and errors that say what to do."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, InvalidInput, attend, reference_attention
from dilated_attention_pytorch.patterns import BlockSparse, pattern_from_text
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.plans import candidate_plans, tile_plan
from dilated_attention_pytorch.plans.tiles import TilePlan
from dilated_attention_pytorch.problem import make_problem


def _table(*shape: int, high: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (3, 2, 5, 4), (3, 1, 5, 4), (1, 2, 5, 4)], ids=str)
def test_counts_are_the_cells_of_the_table(shape):
    table = _table(*shape)
    mask = BlockSparse((2, 3), table).to_mask(2, 9, 11, query_start=0)
    expected = table.expand(*shape[:-3], 2, 5, 4) if len(shape) > 2 else table.expand(2, 5, 4)
    expected = expected.repeat_interleave(2, -2).repeat_interleave(3, -1)[..., :9, :11]
    assert torch.equal(mask, expected)


def test_beyond_the_table_nothing_is_seen():
    assert BlockSparse(2, torch.ones(1, 1, dtype=torch.bool)).to_mask(1, 4).sum() == 4


@pytest.mark.parametrize("shape", [(6, 7), (2, 6, 7), (2, 2, 6, 7)], ids=str)
@pytest.mark.parametrize("high", [2, 4])
def test_bounds_hold_for_every_rectangle(shape, high):
    pattern = BlockSparse((3, 2), _table(*shape, high=high, seed=1))
    mask = pattern.to_mask(2, 18, 14, query_start=0)
    mask = mask if mask.dim() == 4 else mask[None]
    edges = torch.tensor(
        [[a, b, c, d] for a in range(0, 18, 5) for b in range(a, 18, 4) for c in range(14) for d in (c, 13)]
    )
    top, bottom, left, right = edges.unbind(1)
    step = torch.ones_like(top)
    for head in range(2):
        low, high_bound = pattern.count_bounds(
            torch.full_like(top, head), 2, Block(top, bottom, step), Block(left, right, step)
        )
        for sample in range(mask.shape[0]):
            for i, (a, b, c, d) in enumerate(edges.tolist()):
                found = mask[sample, head, a : b + 1, c : d + 1]
                bounds = [x.expand(mask.shape[0], 1, 1, len(edges))[sample, 0, 0, i] for x in (low, high_bound)]
                assert bounds[0] <= found.min()
                assert found.max() <= bounds[1]


def test_uniform_rectangles_are_known_to_be_full():
    pattern = BlockSparse(2, torch.full((8, 8), 3))
    low, high = pattern.count_bounds(
        torch.zeros(1), 1, *[Block(torch.tensor([0]), torch.tensor([15]), torch.ones(1))] * 2
    )
    assert low.item() == high.item() == 3


def test_a_table_becomes_full_tiles_without_reading_pairs(monkeypatch):
    layout = _table(8, 8, high=2).bool()
    q = torch.zeros(1, 1024, 2, 8)
    problem = make_problem(q, q, q, scale=1.0, query_start=0)
    plan = tile_plan(BlockSparse(128, layout), problem, (128, 128))
    assert plan is not None
    assert plan.num_tiles == int(layout.sum())
    assert plan.counts.shape[0] == 0
    assert isinstance(candidate_plans(BlockSparse(128, layout), problem)[0], TilePlan)


def test_text_and_tables_rebuild_the_pattern():
    pattern = BlockSparse((2, 4), _table(3, 2)) & Causal()
    again = pattern_from_text(pattern.text(), pattern.tables)
    assert torch.equal(again.to_mask(1, 6, 8), pattern.to_mask(1, 6, 8))


@pytest.mark.parametrize("combine", ["alone", "causal", "documents", "sum"])
def test_attention_with_gradients_is_the_reference(combine):
    table = BlockSparse(16, _table(2, 3, 5, 5, high=2, seed=4).bool())
    pattern = {
        "alone": table,
        "causal": table & Causal(),
        "documents": Documents([30, 50]).of(table) & Causal(),
        "sum": table + BlockSparse(8, _table(10, 10, seed=5)),
    }[combine]
    q, k, v = (torch.randn(2, 80, 3, 16, requires_grad=True) for _ in range(3))
    out, lse = attend(q, k, v, pattern, return_lse=True)
    expected, expected_lse = reference_attention(q, k, v, pattern)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(out)
    for mine, other in zip(*(torch.autograd.grad((x * seed).sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockSparse(0, torch.ones(1, 1).bool()), "block_size of at least 1"),
        (lambda: BlockSparse(2, torch.ones(1, 1)), "bool or integer"),
        (lambda: BlockSparse(2, torch.ones(4).bool()), r"\(Q, K\)"),
        (lambda: BlockSparse(2, [[1]]), "to be a tensor"),
    ],
)
def test_tables_that_are_none(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (torch.ones(3, 4).bool(), "need 4 rows, the layout has 3"),
        (torch.ones(4, 3).bool(), "need 4 columns, the layout has 3"),
        (torch.ones(3, 4, 4).bool(), "for 3 heads, q has 2"),
        (torch.ones(5, 1, 4, 4).bool(), "for 5 samples, q has 1"),
        (-torch.ones(4, 4).long(), "counts >= 0"),
    ],
)
def test_tables_that_do_not_fit(layout, words):
    q = torch.randn(1, 100, 2, 8)
    with pytest.raises(InvalidInput, match=words):
        attend(q, q, q, BlockSparse(32, layout))
