"""Law 5 where one choice has small tables of tiles and another has large ones: no row may tell which it was."""

import pytest
import torch

from dilated_attention_pytorch import Causal, attend
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.patterns import BlockSparse
from dilated_attention_pytorch.plans import (
    DensePlan,
    OrderedPlan,
    TilePlan,
    TileRanges,
    candidate_plans,
    planner,
    tiles,
)
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.reference import reference_attention
from dilated_attention_pytorch.selection import Antidiagonal, Mass, SelectedTiles, Selector, attend_with_coarse
from dilated_attention_pytorch.selection.dilation import DilatedBlocks
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import ContractReport, check_case

BACKEND_NAMES = ["auto", "dense", "sdpa", "native", "flex"]
LENGTH = 200


@pytest.fixture
def limit(monkeypatch):
    """Sets how large tables may be, by the name of the constant; short problems get tables first, too."""
    monkeypatch.setattr(planner, "HELD_PAIRS", 0)

    def set_to(name, value):
        monkeypatch.setattr(tiles, name, value)
        planner._cache.clear()

    planner._cache.clear()
    yield set_to
    planner._cache.clear()


def usable(name):
    reason = next((b.import_error() for b in BACKENDS if b.name == name), None)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def scattered(most=1, length=LENGTH + 40):
    """Keys seen up to ``most`` times, as drawn: no two tiles are alike."""
    return BlockSparse(1, torch.randint(0, most + 1, (length, length), generator=torch.Generator().manual_seed(1)))


def table(block, later):
    """Chosen blocks up to row ``LENGTH`` of the queries: the first half as drawn, the rest all or their own alone."""
    size = -(-(LENGTH + 40) // block)
    drawn = torch.rand(2, size, size, generator=torch.Generator().manual_seed(3)) < 0.5
    rest = torch.ones(size, size, dtype=torch.bool) if later == "all" else torch.eye(size, dtype=torch.bool)
    drawn[:, size // 2 :] = rest[size // 2 :]
    return drawn | torch.eye(size, dtype=torch.bool)


def pooled(later):
    counts = torch.randint(1, 33, (8, 256), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return table(32, later).repeat_interleave(32, -1) * counts


def rates(later):
    return torch.cat([torch.tensor([1, 2, 1, 2]), torch.full((4,), 2 if later == "all" else 1)])


# The pattern of a choice by what its later blocks chose, where queries start, and the first row that differs.
CHOICES = {
    "whole tiles": (lambda later: SelectedTiles(BlockSparse(32, table(32, later)), scattered(2) & Causal()), 0, 96),
    "repeated rows": (lambda later: SelectedTiles(BlockSparse(24, table(24, later)), scattered() & Causal()), 7, 113),
    "keys by residue": (lambda later: DilatedBlocks(32, 128, rates(later), 2) & scattered() & Causal(), 0, 128),
    "pooled keys": (lambda later: SelectedTiles(BlockSparse((32, 1), pooled(later)), Causal()), 0, 96),
}


def tables_of(pattern, problem):
    (plan,) = (p for p in candidate_plans(pattern, problem) if not isinstance(p, DensePlan))
    return plan.tiles if isinstance(plan, OrderedPlan) else plan


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_the_same_where_a_later_choice_passes_the_limit(name, backend, limit):
    usable(backend)
    choice, start, cut = CHOICES[name]
    q, k = (torch.randn(1, n, 2, 8) for n in (LENGTH, LENGTH + start))
    later_q, later_k = q.clone(), k.clone()
    later_q[:, cut:], later_k[:, start + cut :] = 3.0, -later_k[:, start + cut :]
    few, all_of_them = choice("few"), choice("all")
    small = tables_of(few, make_problem(q, k, k, scale=1.0, query_start=start))
    limit("TABLE_BYTES", small.counts.nbytes)
    kinds = [type(tables_of(p, make_problem(q, k, k, scale=1.0, query_start=start))) for p in (few, all_of_them)]
    assert kinds[0] is type(small) is not TileRanges
    assert kinds[1] is TileRanges
    out, lse = attend(q, k, k, few, query_start=start, backend=backend, return_lse=True)
    other, other_lse = attend(
        later_q, later_k, later_k, all_of_them, query_start=start, backend=backend, return_lse=True
    )
    assert torch.equal(other[:, :cut], out[:, :cut])
    assert torch.equal(other_lse[..., :cut], lse[..., :cut])
    expected, _ = reference_attention(later_q, later_k, later_k, all_of_them, query_start=start)
    torch.testing.assert_close(other, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_earlier_rows_are_the_same_past_the_limit(backend, dtype, limit):
    """And those of keys, which are summed over the parts of the tables, are the definition's."""
    usable(backend)
    n, cut, dout = 1100, 600, torch.zeros(1, 1100, 1, 8)
    dout[:, :cut] = torch.randn(1, cut, 1, 8)
    layout = torch.rand(18, 18, generator=torch.Generator().manual_seed(0)) < 0.4
    pattern = SelectedTiles(BlockSparse(64, layout | torch.eye(18, dtype=torch.bool)), scattered(length=n) & Causal())
    q, k, v = torch.randn(3, 1, n, 1, 8).to(dtype)

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, pattern, backend=backend, return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), leaves, (dout.to(dtype), dout[..., 0].transpose(1, 2)))

    whole = gradients()
    limit("TABLE_BYTES", 12 * 64 * 64)
    plan = tables_of(pattern, make_problem(q, k, v, scale=1.0, query_start=0))
    assert isinstance(plan, TileRanges)
    assert len(plan.ranges) > 4
    parts = gradients()
    for one, other in zip(whole[:3], parts[:3]):  # native's backward cuts 1100 rows in two
        assert torch.equal(one, other)
    for one, other in zip(whole[3:], parts[3:]):
        assert other.dtype == dtype
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def test_reading_too_many_pairs_changes_no_row_either(limit):
    pattern = CHOICES["whole tiles"][0]("all")
    q = torch.randn(1, LENGTH, 2, 8)
    before = {name: attend(q, q, q, pattern, backend=name) for name in ("auto", "sdpa")}
    limit("PARTIAL_PAIRS", 1)
    assert isinstance(tables_of(pattern, make_problem(q, q, q, scale=1.0, query_start=0)), TileRanges)
    for name, out in before.items():
        assert torch.equal(attend(q, q, q, pattern, backend=name), out)


@pytest.mark.parametrize("backend", BACKEND_NAMES[1:])
@pytest.mark.usefixtures("limit")
def test_counts_that_no_byte_holds_change_no_row(backend):
    usable(backend)
    counts = table(32, "few").int()
    more = counts.clone()
    more[:, 5:] *= 300
    inner = scattered() & Causal()
    q = torch.randn(1, LENGTH, 2, 8)
    outs = [attend(q, q, q, SelectedTiles(BlockSparse(32, x), inner), backend=backend) for x in (counts, more)]
    assert torch.equal(outs[0][:, :160], outs[1][:, :160])
    expected, _ = reference_attention(q, q, q, SelectedTiles(BlockSparse(32, more), inner))
    torch.testing.assert_close(outs[1], expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKEND_NAMES[2:])
def test_counts_that_no_byte_holds_pass_the_contract(backend):
    usable(backend)
    pattern = SelectedTiles(BlockSparse(16, torch.tensor([[200, 0], [3, 300]])), scattered(2) & Causal())
    case, report = Case("wide", pattern, query_length=32), ContractReport()
    check_case(next(b for b in BACKENDS if b.name == backend), case, torch.float32, "cpu", report)
    assert report.checked > 0
    assert not report.refused


@pytest.mark.parametrize("backend", ["sdpa", "native"])
@pytest.mark.parametrize("coarse", [False, True])
def test_causal_stays_causal_past_the_limit(coarse, backend, limit):
    """Through a selector whose density goes from a few blocks to nearly all of them with the later tokens."""
    usable(backend)
    selector, cut = Selector(Antidiagonal(4), Mass(0.9), 16), 100
    q, k = torch.randn(1, LENGTH, 2, 8), torch.randn(1, LENGTH, 2, 8)
    outs, kinds = [], set()
    limit("TABLE_BYTES", 30000)
    for size in (0.0, 1.0, 9.0):
        later = torch.cat((q[:, :cut], size * torch.randn(1, LENGTH - cut, 2, 8)), 1)
        chosen = selector(later, k, None, scattered() & Causal())
        kinds.add(type(tables_of(chosen, make_problem(q, k, k, scale=1.0, query_start=0))))
        computed = attend_with_coarse if coarse else attend
        outs.append(computed(later, k, k, chosen, backend=backend)[:, :cut])
    assert kinds == {TilePlan, TileRanges}
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
