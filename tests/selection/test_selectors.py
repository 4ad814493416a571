"""Selectors: what is chosen, causality through the choice, padding, budgets, and SelectedTiles as a pattern."""

import math

import pytest
import torch
from naive_blocks import SIZES, Sizes

from dilated_attention_pytorch.attention import attend
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.explanation import explain
from dilated_attention_pytorch.patterns import BlockSparse, Causal, Dilated, Documents, Full, Window
from dilated_attention_pytorch.patterns.base import pattern_from_text
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan, candidate_plans
from dilated_attention_pytorch.plans.planner import tile_size
from dilated_attention_pytorch.problem import positions_tensor
from dilated_attention_pytorch.reference import reference_attention
from dilated_attention_pytorch.selection import (
    Antidiagonal,
    LastQueries,
    Mass,
    MeanPooled,
    MinMax,
    Oracle,
    SelectedTiles,
    Selector,
    Threshold,
    TopBlocks,
)
from dilated_attention_pytorch.selection.blocks import blocks_problem
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import ContractReport, check_case

SCORES = {"mean": MeanPooled(), "minmax": MinMax(), "antidiagonal": Antidiagonal(4), "last": LastQueries(3)}
RULES = {
    "top": (TopBlocks(), 3),
    "share": (TopBlocks(), 0.6),
    "mass": (Mass(0.7), None),
    "threshold": (Threshold(0.2), 4),
}


def tensors(sizes: Sizes):
    q, k, mask = sizes.tensors()
    return q, k, torch.randn(*k.shape[:3], 5), {"key_padding_mask": mask, "query_start": sizes.start}


def changed_after(i, sizes, tensors, change):
    """Copies of q, k, v in which all tokens after query i are changed."""
    copies = [x.clone() for x in tensors]
    for x, first in zip(copies, (i + 1, sizes.start + i + 1, sizes.start + i + 1)):
        x[:, first:] = change(x[:, first:])
    return copies


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", [x for x in SIZES if SIZES[x].pattern.is_causal and not SIZES[x].lookahead])
def test_causal_stays_causal_bit_for_bit(name, score):
    """Law 5: changing tokens after i leaves the choice for rows up to i, and these rows, as they are."""
    sizes = SIZES[name]
    q, k, v, where = tensors(sizes)
    choices = [
        (Selector(SCORES[score], rule, sizes.block), 1 if budget == 0.6 and len(sizes.columns) == 1 else budget)
        for rule, budget in RULES.values()
    ]
    chosen = [selector(q, k, budget, sizes.pattern, **where) for selector, budget in choices]
    outs = [attend(q, k, v, selected, **where) for selected in chosen]
    places = {0, sizes.block - 1, sizes.block, sizes.queries // 2, sizes.queries - 2} & set(range(sizes.queries))
    for n, i in enumerate(sorted(places)):
        row = (sizes.start + i) // sizes.block + 1
        for change in (lambda x: 4.0 - 3.0 * x, lambda x: x * torch.nan):
            later = changed_after(i, sizes, (q, k, v), change)
            again = [selector(*later[:2], budget, sizes.pattern, **where) for selector, budget in choices]
            for one, other in zip(chosen, again):
                assert torch.equal(one.layout[:, :, :row], other.layout[:, :, :row])
            if not later[2].isnan().any():
                out = attend(*later, again[n % len(again)], **where)
                assert torch.equal(out[:, : i + 1], outs[n % len(again)][:, : i + 1])


EVEN = [(500, 0, 128), (500, 64, 128), (450, 0, 96), (500, 0, 64)]
ODD = [(700, 50, 128), (300, 700, 96), (60, 980, 128), (520, 1, 100), (500, 0, 24)]
"""Queries, their start and blocks: tiles of at least 16 rows end where blocks do, and do not."""


@pytest.mark.parametrize("backend", ["sdpa", "native"])
@pytest.mark.parametrize(("queries", "start", "block"), EVEN + ODD)
def test_rows_are_summed_alike_whatever_later_blocks_chose(queries, start, block, backend):
    """Law 5 where tables of tiles are walked: a tile must not hold rows of two choices."""
    q, k = torch.randn(1, queries, 4, 16), torch.randn(1, queries + start, 4, 16)
    selector = Selector(MeanPooled(), TopBlocks(), block)
    selected = selector(q, k, 3, Causal())
    out, lse = attend(q, k, k, selected, backend=backend, return_lse=True)
    inside = [r for r in range(1, queries) if (start + r) % block in (0, block // 2, block - 5)]
    changed = [r for r in inside if start + r > 2 * block]
    different = 0
    for row in changed[-12:]:
        later_q, later_k = q.clone(), k.clone()
        later_q[:, row:] *= -1.0  # later blocks choose otherwise
        later_k[:, start + row :] *= -1.0
        again = selector(later_q, later_k, 3, Causal())
        different += not torch.equal(again.layout, selected.layout)
        other, other_lse = attend(later_q, later_k, later_k, again, backend=backend, return_lse=True)
        assert torch.equal(other[:, :row], out[:, :row])
        assert torch.equal(other_lse[..., :row], lse[..., :row])
    assert different > 0


@pytest.mark.parametrize(("queries", "start", "block"), EVEN + ODD)
def test_blocks_chosen_apart_share_no_tile(queries, start, block):
    q, k = torch.zeros(1, queries, 2, 8), torch.zeros(1, queries + start, 2, 8)
    rows = -(-(queries + start) // block)
    layout = torch.rand(rows, rows, generator=torch.Generator().manual_seed(0)) < 0.3
    selected = SelectedTiles(BlockSparse(block, layout), Causal())
    problem = blocks_problem(q, k, selected)
    plans = candidate_plans(selected, problem, tiles=True)
    tables = [plan for plan in plans if not isinstance(plan, DensePlan)]
    assert len(tables) == 1, "one order of rows, whatever was chosen"
    (plan,) = tables
    assert isinstance(plan, OrderedPlan) == ((queries, start, block) in ODD)
    assert plan.kind == "TilePlan", "as which it was measured"
    expected = DensePlan(selected).expand(problem)
    assert torch.equal(plan.expand(problem), expected)
    assert plan.counted_pairs(problem) == int(expected.sum())
    tiles, placed = (plan.tiles, plan.order.applied(problem)) if isinstance(plan, OrderedPlan) else (plan, problem)
    at = positions_tensor(placed.query_positions) // block
    for first in range(0, len(at), tiles.block_size[0]):
        assert len(at[first : first + tiles.block_size[0]].unique()) == 1
    assert len(at) < 1.6 * queries + 16, "rows that only fill tiles are few"


def test_tiles_of_a_choice():
    """They end where its blocks do, or few of them are filled up."""
    chosen = SelectedTiles(BlockSparse(96, torch.ones(30, 30, dtype=torch.bool)), Causal())
    for pattern in (chosen, chosen & Window(40), Causal() & chosen):
        rows = [tile_size(pattern, blocks_problem(*problem, pattern, query_start=s))[0] for *problem, s in PLACED]
        assert rows == [32, 32, 16, 32, 128]
    assert pattern_from_text(chosen.text(), chosen.tables).text() == chosen.text()


PLACED = [
    (torch.zeros(1, n, 1, 4), torch.zeros(1, 2000, 1, 4), start)
    for n, start in ((500, 0), (500, 64), (500, 80), (500, 81), (30, 100))
]


def test_lookahead_reads_the_blocks_own_rows_and_nothing_after():
    q, k = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8)
    other = q.clone()
    other[:, 32:40] *= -1.0
    for lookahead, changed in ((True, [4]), (False, [5])):
        selector = Selector(MeanPooled(), TopBlocks(), 8, lookahead=lookahead)
        rows = selector(q, k, 3, Causal()).layout != selector(other, k, 3, Causal()).layout
        assert rows.any(-1).any(1)[0].nonzero().flatten().tolist() == changed


@pytest.mark.parametrize("score", [*SCORES, "oracle"])
@pytest.mark.parametrize("pattern", [Causal(), Full(), Window(11), Dilated(16, 2) & Causal()])
def test_a_padded_sample_gets_the_choice_of_the_sample_alone(pattern, score):
    lengths, n, block = (40, 21, 12), 40, 8
    q, k = torch.randn(3, n, 4, 8), torch.randn(3, n, 2, 8)
    mask = torch.arange(n) >= torch.tensor(lengths).view(-1, 1)
    for rule, budget in RULES.values():
        selector = Selector({**SCORES, "oracle": Oracle()}[score], rule, block, lookahead=score == "oracle")
        together = selector(q, k, budget, pattern, key_padding_mask=mask)
        for b, length in enumerate(lengths):
            blocks = math.ceil(length / block)
            alone = selector(q[b : b + 1, :length], k[b : b + 1, :length], budget, pattern).layout
            assert torch.equal(together.layout[b : b + 1, :, :blocks, :blocks], alone)
            assert not together.layout[b, :, :blocks, blocks:].any()


def test_the_layout_covers_all_positions_and_rows_before_the_queries_are_empty():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 30, 2, 8)
    selected = Selector(MeanPooled(), TopBlocks(), 4, sink_blocks=2, local_blocks=2)(q, k, 6, Causal(), query_start=22)
    assert isinstance(selected, SelectedTiles)
    assert isinstance(selected.blocks, BlockSparse)
    assert selected.right == Causal()
    assert (selected.layout.shape, selected.layout.dtype) == ((2, 4, 7, 8), torch.uint8)
    assert not selected.layout[:, :, :5].any()
    assert selected.layout[:, :, 5:].sum(-1).tolist() == [[[6, 6]] * 4] * 2
    assert bool(selected.layout[:, :, 5, [0, 1, 4, 5]].all()), "sinks, the block before, its own"
    assert bool(selected.layout[:, :, 6, [0, 1, 5, 6]].all())
    assert not selected.layout[:, :, 5, 6:].any()
    assert selected.density == 12 / 56


def test_without_a_pattern_all_keys_are_open():
    q = torch.randn(1, 24, 1, 4)
    selected = Selector(MeanPooled(), TopBlocks(), 8)(q, q, 3)
    assert selected.right == Full()
    assert bool(selected.layout.all())


def test_budgets():
    q = torch.randn(1, 80, 2, 8)

    def numbers(budget, pattern, **options):
        layout = Selector(MeanPooled(), TopBlocks(), 8, **options)(q, q, budget, pattern).layout
        return layout[0, 0].sum(-1).tolist()

    assert numbers(4, Causal()) == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert numbers(0.3, Causal()) == [1, 2, 2, 2, 2, 2, 3, 3, 3, 3], "always-on blocks may pass the budget"
    assert numbers(0.3, Causal(), sink_blocks=0) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert numbers(0.3, Full()) == [3] * 10
    assert numbers(1.0, Full()) == [10] * 10
    assert numbers(99, Full()) == [10] * 10
    assert numbers(1, Causal(), sink_blocks=0) == [1] * 10
    assert numbers(99, Window(2)) == [2, 3, 3, 3, 3, 3, 3, 3, 3, 2], "more than the pattern sees are not taken"


def test_with_the_whole_budget_nothing_is_lost():
    for name in ("causal_padded", "causal_placed", "full_padded", "window", "causal_dilated", "documents"):
        sizes = SIZES[name]
        q, k, v, where = tensors(sizes)
        selected = Selector(MeanPooled(), TopBlocks(), sizes.block)(q, k, 1.0, sizes.pattern, **where)
        whole, _ = reference_attention(q, k, v, sizes.pattern, **where)
        torch.testing.assert_close(reference_attention(q, k, v, selected, **where)[0], whole)


def test_the_best_block_is_found():
    """One block of keys points where the queries point; every score finds it."""
    q = torch.ones(1, 64, 1, 8)
    k = torch.randn(1, 64, 1, 8) * 0.1
    k[:, 24:32] += 1.0
    for score in (*SCORES.values(), Oracle()):
        for lookahead in {isinstance(score, Oracle), True}:
            selector = Selector(score, TopBlocks(), 8, 0, 0, lookahead)
            assert bool(selector(q, k, 2, Causal()).layout[0, 0, 4:, 3].all())
            assert selector(q, k, 2, Causal()).layout[0, 0, 7].nonzero().flatten().tolist() == [3, 7]


def test_scale_is_that_of_attention():
    q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    selector = Selector(MeanPooled(), Mass(0.5), 8)
    assert torch.equal(selector(q, k).layout, selector(q, k, scale=0.25).layout)
    assert selector(q, k, scale=9.0).density < selector(q, k).density


def test_scores_in_parts_choose_the_same(monkeypatch):
    q, k = torch.randn(2, 70, 2, 8), torch.randn(2, 70, 2, 8)
    for score in SCORES.values():
        selector = Selector(score, TopBlocks(), 8)
        whole = selector(q, k, 4, Causal()).layout
        with monkeypatch.context() as patched:
            patched.setattr("dilated_attention_pytorch.selection.selector._CELLS", 80)
            assert torch.equal(selector(q, k, 4, Causal()).layout, whole)


def test_half_types_autocast_and_strides():
    q, k = (torch.randn(2, 8, 48, 4).permute(0, 2, 3, 1) for _ in range(2))  # head dim is not the last in memory
    for score in SCORES.values():
        selector = Selector(score, TopBlocks(), 8)
        wanted = selector(q.contiguous(), k.contiguous(), 3, Causal()).layout
        assert torch.equal(selector(q, k, 3, Causal()).layout, wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(selector(q, k, 3, Causal()).layout, wanted)
        for dtype in (torch.bfloat16, torch.float16):
            half = selector(q.to(dtype), k.to(dtype), 3, Causal()).layout
            assert torch.equal(half, selector(q.to(dtype).float(), k.to(dtype).float(), 3, Causal()).layout)


def test_no_tokens():
    selector = Selector(MeanPooled(), TopBlocks(), 4)
    q, k = torch.randn(2, 3, 2, 4), torch.randn(2, 9, 2, 4)
    assert selector(q[:, :0], k, 1, query_start=5).layout.shape == (2, 2, 1, 3)
    assert not selector(q, k[:, :0], 1, query_start=0).layout.any()
    assert attend(q, k[:, :0], k[:, :0], selector(q, k[:, :0], 1, query_start=0), query_start=0).abs().sum() == 0


@pytest.mark.parametrize("pattern", [Causal(), Full(), Documents([14, 26]).of(Causal())])
def test_gradients_are_those_of_the_chosen_blocks(pattern):
    q, k, v = (torch.randn(2, 40, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    selected = Selector(MinMax(), TopBlocks(), 8)(q, k, 2, pattern)
    assert not selected.layout.requires_grad
    (out, lse), (wanted_out, wanted_lse) = (
        attend(q, k, v, selected, return_lse=True),
        reference_attention(q, k, v, selected),
    )
    torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    wanted = torch.autograd.grad((wanted_out, wanted_lse), (q, k, v), (dout, dlse))
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("block", [16, 24])
@pytest.mark.parametrize("name", ["dense", "sdpa", "native", "flex"])
def test_a_choice_passes_the_contract_as_a_fixed_plan(name, block):
    """In blocks of 24, from an odd place on, rows are repeated to fill tiles: they must add nothing to any gradient."""
    backend = next(x for x in BACKENDS if x.name == name)
    n, start = (45, None) if block == 16 else (40, 5)
    q, k = torch.randn(2, n, 4, 8), torch.randn(2, 45, 2, 8)
    selected = Selector(MinMax(), TopBlocks(), block)(q, k, 2, Causal(), query_start=start)
    case = Case("chosen", selected, query_length=n, key_length=45, kv_heads=2, query_start=start, visible=(45, 30))
    plans = candidate_plans(selected, case.problem(torch.float32), tiles=True)
    assert any(isinstance(plan, OrderedPlan) for plan in plans) == (block == 24)
    report = ContractReport()
    check_case(backend, case, torch.float32, "cpu", report)
    assert report.checked > 0, f"{name} refuses a choice: {report.refused}"
    assert name in explain(q, k, k, selected, query_start=start).backends


def test_tiny_blocks_chosen_apart_get_no_tables_whatever_was_chosen():
    q = torch.randn(1, 60, 1, 4)
    for budget in (1, 15):
        chosen = Selector(MeanPooled(), TopBlocks(), 4)(q, q, budget, Causal())
        assert [type(p) for p in candidate_plans(chosen, blocks_problem(q, q, chosen), tiles=True)] == [DensePlan]
    last = blocks_problem(q[:, 57:], q, chosen)
    assert len(candidate_plans(chosen, last, tiles=True)) == 2, "rows of one block share a tile"


def test_overlap_is_the_share_of_common_blocks():
    a, b = (SelectedTiles(BlockSparse(2, torch.tensor(x)), Causal()) for x in ([[1, 0], [1, 1]], [[2, 0], [0, 1]]))
    empty = SelectedTiles(BlockSparse(2, torch.tensor([[0, 0], [0, 0]])), Causal())
    assert (a.overlap(b), b.overlap(a), a.overlap(a), a.overlap(empty), empty.overlap(empty)) == (2 / 3, 2 / 3, 1, 0, 1)
    for other in (BlockSparse(4, a.layout), BlockSparse(2, torch.ones(1, 2, 2, dtype=torch.bool))):
        with pytest.raises(InvalidInput, match="overlap: expected tables of one shape and block size"):
            a.overlap(SelectedTiles(other, Causal()))


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, "half", 0.2])
def test_budgets_that_are_none(budget):
    q = torch.randn(1, 32, 1, 4)
    with pytest.raises(InvalidInput, match="budget"):
        Selector(MeanPooled(), TopBlocks(), 8)(q, q, budget)


def test_messages_say_what_to_do():
    q = torch.randn(1, 32, 1, 4)
    with pytest.raises(InvalidInput, match=r"TopBlocks needs a budget: a share in \(0, 1\] or a number of blocks"):
        Selector(MeanPooled(), TopBlocks(), 8)(q, q)
    with pytest.raises(InvalidInput, match=r"0.2 of 4 blocks is below one block; the least is 0.25. Take a smaller"):
        Selector(MeanPooled(), TopBlocks(), 8)(q, q, 0.2)
    for options in ({"block_size": 0}, {"block_size": 2.0}, {"sink_blocks": -1}, {"local_blocks": True}):
        with pytest.raises(InvalidInput, match=f"Selector: expected {next(iter(options))} of at least"):
            Selector(MeanPooled(), TopBlocks(), **options)
    with pytest.raises(InvalidInput, match="Got TopBlocks and MeanPooled"):
        Selector(TopBlocks(), MeanPooled())
    left = torch.arange(32)[None] < 4
    with pytest.raises(InvalidInput, match="padding must be on the right"):
        Selector(MeanPooled(), TopBlocks(), 8)(q, q, 1, key_padding_mask=left)
    with pytest.raises(InvalidInput, match="need 2 rows"):
        Selector(MeanPooled(), TopBlocks(), 8)(q, q, 1, BlockSparse(16, torch.ones(1, 2, dtype=torch.bool)))
