"""A slice of the heads sees what these heads see of the whole: in counts, closed forms, plans, texts and backends."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dilated_attention_pytorch import (
    BlockSparse,
    Causal,
    Dilated,
    Documents,
    InvalidInput,
    Relative,
    Softcap,
    attend,
    longnet,
)
from dilated_attention_pytorch.attention import backward, forward
from dilated_attention_pytorch.backends import TritonBackend
from dilated_attention_pytorch.backends.triton.launches import branch_tables, layout_of
from dilated_attention_pytorch.compat import TorchscaleCompat
from dilated_attention_pytorch.patterns import SomeHeads, Window, pattern_from_text, some_heads
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.plans import StridedPlan, candidate_plans
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.selection import DilatedBlocks, SelectedTiles

HEADS, LENGTH = 6, 70
SLICES = [(0, 3), (3, 3), (2, 2), (5, 1), (0, 6)]


def table(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


PATTERNS = {
    "paper": longnet([8, 24, 64], [1, 3, 4]),
    "causal": longnet([8, 24, 64], [1, 2, 5]) & Causal(),
    "torchscale": longnet([8, 24, 64], [1, 2, 4], head_offset="torchscale"),
    "groups": longnet([8, 16, 32, 64], [1, 2, 4, 8], head_groups=True) & Causal(),
    "window": Dilated(32, 4) & Window(9),
    "blocks": BlockSparse(16, table(HEADS, 5, 5)) & Causal(),
    "blocks_by_sample": BlockSparse(16, table(2, HEADS, 5, 5)),
    "shared_blocks": BlockSparse(16, table(2, 1, 5, 5)) & Dilated(16, 3),
    "sum_of_kinds": Dilated(16, 3) + BlockSparse(16, table(HEADS, 5, 5).int() * 2),
    "documents": Documents([30, 0, 21, 19]).of(longnet([8, 24], [2, 3]) & Causal()),
    "blocks_in_documents": Documents([[30, 40], [70, 0]]).of(BlockSparse(16, table(HEADS, 5, 5))),
    "selected": SelectedTiles(BlockSparse(16, table(2, HEADS, 5, 5)), Dilated(32, 4) & Causal()),
    "rates": DilatedBlocks(16, 16, torch.tensor([1, 2, 4, 1, 2]).repeat(HEADS, 1), max_rate=4) & Causal(),
    "all_alike": Causal(),
}
EVERY = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def problem(heads, generator=None, dtype=torch.float64):
    q, k, v = (torch.randn(2, LENGTH, heads, 8, generator=generator, dtype=dtype) for _ in range(3))
    return make_problem(q, k, v, scale=0.3, query_start=0, needs_grad=True)


@EVERY
@pytest.mark.parametrize("wrap", [some_heads, lambda p, first, size, total: SomeHeads(p, first, total)])
def test_counts_are_the_slice_of_the_whole(pattern, wrap):
    whole = pattern.to_mask(HEADS, LENGTH)
    for first, size in SLICES:
        part = wrap(pattern, first, size, HEADS)
        mask = part.to_mask(size, LENGTH)
        assert torch.equal(mask, whole[..., first : first + size, :, :])
        again = pattern_from_text(part.text(), part.tables)
        assert again.text() == part.text()
        assert torch.equal(again.to_mask(size, LENGTH), mask)
        assert part.varies_by_sample == pattern.varies_by_sample
        assert torch.equal(part.of_sample(1).to_mask(size, LENGTH), mask[1] if mask.dim() == 4 else mask)
        assert (part.is_causal, part.period) == (pattern.is_causal, pattern.period)


@EVERY
def test_every_plan_of_a_slice_has_its_counts(pattern):
    for first, size in SLICES[:4]:
        given = problem(size)
        part = some_heads(pattern, first, size, HEADS)
        part.check(given)
        expected = pattern.to_mask(HEADS, LENGTH)[..., first : first + size, :, :].expand(2, -1, -1, -1)
        plans = candidate_plans(part, given, tiles=True)
        known = any(isinstance(p, StridedPlan) for p in candidate_plans(pattern, problem(HEADS)))
        assert known == any(isinstance(p, StridedPlan) for p in plans)
        for plan in plans:
            assert torch.equal(plan.expand(given), expected), type(plan).__name__


@pytest.mark.parametrize("name", ["paper", "causal", "groups", "selected", "blocks", "documents"])
def test_a_wrapped_pattern_knows_the_bounds_of_its_blocks(name):
    part = SomeHeads(PATTERNS[name], 2, HEADS)
    at = torch.arange(0, LENGTH, 5)
    block = Block(at, (at + 4).clamp(max=LENGTH - 1), torch.ones_like(at))
    head = torch.arange(3).view(-1, 1, 1)
    q, k = Block(*(x.view(-1, 1) for x in block)), block
    low, high = (torch.as_tensor(x) for x in part.count_bounds(head, 3, q, k))
    mask = part.to_mask(3, LENGTH)
    cells = mask.view(*mask.shape[:-2], len(at), 5, len(at), 5).transpose(-3, -2)
    assert bool((low <= cells.amin((-1, -2))).all())
    assert bool((high >= cells.amax((-1, -2))).all())
    alike = part.signs(head, 3, q, k)
    expected = PATTERNS[name].signs(head + 2, HEADS, q, k)
    assert (alike is None) == (expected is None)
    assert alike is None or all(torch.equal(a, b) for a, b in zip(alike, expected))


@pytest.mark.parametrize("backend", ["dense", "sdpa", "native"])
@pytest.mark.parametrize("name", ["causal", "torchscale", "groups", "blocks", "sum_of_kinds", "documents", "selected"])
def test_attention_of_a_slice_is_the_slice_of_attention(name, backend):
    dtype = torch.float32 if backend == "native" else torch.float64
    tight = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-13}
    whole = problem(HEADS, torch.Generator().manual_seed(1), dtype)
    pattern = PATTERNS[name]
    out, lse = forward(whole, pattern, backend="dense")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = backward(whole, pattern, dout, dlse, out, lse, backend="dense")
    for first, size in ((2, 2), (3, 3)):
        heads = slice(first, first + size)
        q, k, v, dout_part = (x[:, :, heads].contiguous() for x in (whole.q, whole.k, whole.v, dout))
        given = make_problem(q, k, v, scale=0.3, query_start=0, needs_grad=True)
        part = some_heads(pattern, first, size, HEADS)
        got_out, got_lse = forward(given, part, backend=backend)
        torch.testing.assert_close(got_out, out[:, :, heads], **tight)
        torch.testing.assert_close(got_lse, lse[:, heads], **tight)
        got = backward(given, part, dout_part, dlse[:, heads].contiguous(), got_out, got_lse, backend=backend)
        for mine, all_heads in zip(got[:3], grads[:3]):
            torch.testing.assert_close(mine, all_heads[:, :, heads], **tight)


def test_forms_that_plans_know_stay_what_they_are():
    assert some_heads(longnet([8, 16], [1, 2]), 2, 2, 6) == longnet([8, 16], [1, 2])  # 2 is a multiple of both rates
    assert some_heads(Causal(), 1, 1, 6) == Causal()
    inner = some_heads(PATTERNS["selected"], 1, 2, HEADS)
    assert isinstance(inner, SelectedTiles)
    assert torch.equal(inner.layout, PATTERNS["selected"].layout[:, 1:3])
    assert some_heads(SomeHeads(Dilated(8, 4), 1, 9), 2, 3, 6) == SomeHeads(Dilated(8, 4), 3, 9)
    nested = SomeHeads(SomeHeads(Dilated(8, 4), 1, 9), 2, 6)
    (branch,) = nested.branches()
    assert branch.of_heads == (3, 9)
    assert torch.equal(nested.to_mask(3, 20), Dilated(8, 4).to_mask(9, 20)[3:6])


def test_the_tables_of_triton_number_heads_by_the_whole():
    pattern = longnet([16, 2], [2, 1000], head_groups=True)
    whole, columns = branch_tables(layout_of(problem(HEADS), pattern.branches()), (0, 1))
    for first, size in ((0, 3), (2, 2), (3, 3)):
        part = SomeHeads(pattern, first, HEADS)
        got, offsets = branch_tables(layout_of(problem(size), part.branches()), (0, 1))
        assert np.array_equal(got, whole)
        assert np.array_equal(offsets, columns[first : first + size])


def test_torchscale_zero_keys_of_a_slice():
    x = torch.randn(1, 50, 4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pattern, compat = longnet([16, 32], [2, 4], head_offset="torchscale"), TorchscaleCompat(zero_keys=True)
    part = some_heads(pattern, 1, 2, 4)
    expected = attend(x, x, x, pattern, compat=compat)[:, :, 1:3]
    y = x[:, :, 1:3]
    assert not torch.allclose(attend(y, y, y, part), expected)
    torch.testing.assert_close(attend(y, y, y, part, compat=compat), expected, rtol=0, atol=1e-13)


RULES = {
    "slopes": Relative(slopes=torch.linspace(0.5, 0.1, HEADS, dtype=torch.float64)),
    "table": Relative(table=torch.randn(HEADS, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)),
    "shared_table": Relative(table=torch.arange(9.0, dtype=torch.float64).view(1, 9)),
    "softcap": Softcap(0.7),
}


@pytest.mark.parametrize("name", [*RULES, None])
def test_score_rules_and_dropout_of_a_slice(name):
    score = None if name is None else RULES[name]
    whole = replace(problem(HEADS), score=score, dropout_p=0.4, seed=torch.tensor([7]))
    out, lse = forward(whole, Causal())
    q, k, v = (x[:, :, 2:5] for x in (whole.q, whole.k, whole.v))
    cut = None if score is None else score.of_heads(2, 3)
    part = replace(whole, q=q, k=k, v=v, score=cut, of_heads=(2, HEADS))
    got_out, got_lse = forward(part, Causal())
    torch.testing.assert_close(got_out, out[:, :, 2:5], rtol=0, atol=1e-13)
    torch.testing.assert_close(got_lse, lse[:, 2:5], rtol=0, atol=1e-13)
    assert not torch.allclose(forward(replace(part, of_heads=None), Causal())[0], got_out)
    plan = candidate_plans(Causal(), part)[0]
    assert any("slice of heads" in reason for reason in TritonBackend().reasons_against(part, plan))


def test_heads_that_do_not_exist_are_refused():
    with pytest.raises(InvalidInput, match="first=4, size=3"):
        some_heads(Causal(), 4, 3, 6)
    with pytest.raises(InvalidInput, match="layout is for 6 heads, q has 8"):
        some_heads(PATTERNS["blocks"], 0, 4, 8)
    with pytest.raises(InvalidInput, match="Got first=6"):
        SomeHeads(Causal(), 6, 6)
    with pytest.raises(InvalidInput, match="expected a pattern"):
        SomeHeads("Causal", 0, 6)
    with pytest.raises(InvalidInput, match="heads 4 to 6 of 6 do not exist"):
        SomeHeads(Dilated(8, 2), 4, 6).check(problem(3))
    with pytest.raises(InvalidInput, match="needs as many heads"):  # of all heads, not of the slice
        SomeHeads(longnet([8] * 7, [1] * 7, head_groups=True), 0, 6).check(problem(2))
    SomeHeads(longnet([8] * 6, [1] * 6, head_groups=True), 0, 6).check(problem(2))
