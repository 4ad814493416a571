"""Partial results over disjoint keys, merged, are the whole."""

import math
from itertools import pairwise

import pytest
import torch

from dilated_attention_pytorch import Causal, Full, InvalidInput, longnet, merge, reference_attention
from dilated_attention_pytorch.merging import merge_into


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 9), (3, 3, 7)])
def test_keys_cut_anywhere(cuts):
    q, k, v = randn(2, 4, 2, 3), randn(2, 11, 2, 3), randn(2, 11, 2, 5)
    places = (0, *cuts, 11)
    parts = [reference_attention(q, k[:, a:b], v[:, a:b], Full(), query_start=0) for a, b in pairwise(places)]
    torch.testing.assert_close(merge(*parts), reference_attention(q, k, v, Full()))


def test_branches_merge_to_their_sum_also_in_gradients():
    x = [randn(1, 12, 2, 3).requires_grad_() for _ in range(3)]
    a, b = longnet([4], [1]) & Causal(), longnet([12], [3]) & Causal()
    merged = merge(reference_attention(*x, a), reference_attention(*x, b))
    whole = reference_attention(*x, a + b)
    torch.testing.assert_close(merged, whole)
    given = (randn(*whole[0].shape), randn(*whole[1].shape))
    torch.testing.assert_close(torch.autograd.grad(merged, x, given), torch.autograd.grad(whole, x, given))


def test_order_and_grouping_do_not_matter():
    parts = [(randn(1, 3, 2, 4), 10 * randn(1, 2, 3)) for _ in range(3)]
    torch.testing.assert_close(merge(*parts), merge(*reversed(parts)))
    torch.testing.assert_close(merge(*parts), merge(merge(*parts[:2]), parts[2]))
    torch.testing.assert_close(merge(parts[0]), parts[0])


def test_a_part_that_saw_nothing_adds_nothing():
    out, lse = randn(1, 3, 1, 2).requires_grad_(), randn(1, 1, 3).requires_grad_()
    nothing = (torch.zeros_like(out), torch.full_like(lse, -math.inf))
    merged = merge((out, lse), nothing)
    torch.testing.assert_close(merged, (out, lse))
    grads = torch.autograd.grad(merged, (out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    torch.testing.assert_close(grads, (torch.ones_like(out), torch.ones_like(lse)))


def test_rows_that_no_part_saw():
    out, lse = torch.zeros(1, 2, 1, 2, requires_grad=True), torch.full((1, 1, 2), -math.inf, requires_grad=True)
    merged = merge((out, lse), (out, lse))
    assert bool((merged[0] == 0).all())
    assert bool((merged[1] == -math.inf).all())
    (grad,) = torch.autograd.grad(merged[0].sum() + torch.where(merged[1] > -1, merged[1], 0.0).sum(), lse)
    assert bool(grad.isfinite().all())


def test_large_numbers_do_not_overflow():
    one = (torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 1e4))
    two = (torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), 1e4))
    out, lse = merge(one, two)
    assert out.item() == 0.5
    assert lse.item() == pytest.approx(1e4 + math.log(2))
    out, _ = merge(one, (two[0], -two[1]))
    assert out.item() == 1.0


def test_half_outputs_stay_half():
    out, lse = merge(*[(torch.ones(1, 2, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 2))] * 2)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_bad_parts_say_what_was_expected():
    good = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2))
    with pytest.raises(InvalidInput, match="at least one"):
        merge()
    with pytest.raises(InvalidInput, match=r"\(B, H, N\)"):
        merge(good, (good[0], good[1].transpose(1, 2)))
    with pytest.raises(InvalidInput, match="one shape"):
        merge(good, (torch.zeros(1, 5, 3, 4), torch.zeros(1, 3, 5)))


def test_merge_into_is_merge_in_place():
    (out, lse), (part_out, part_lse) = [(randn(5, 7, 4), 5 * randn(5, 7)) for _ in range(2)]
    lse[0] = -math.inf
    out[0] = 0
    part_lse[1] += 200  # the part outweighs all that was there
    part_lse[2] -= 200
    expected = merge(*[(o.unsqueeze(2), x.unsqueeze(1)) for o, x in ((out, lse), (part_out, part_lse))])
    merge_into(out, lse, part_out, part_lse)
    torch.testing.assert_close(out, expected[0].squeeze(2))
    torch.testing.assert_close(lse, expected[1].squeeze(1))
    assert torch.equal(out[0], part_out[0])


def test_a_running_lse_in_float64_keeps_what_float32_rounds_away():
    parts = [(torch.randn(1, 50, 1, 4), 6 + torch.rand(1, 1, 50)) for _ in range(20)]
    exact_out, exact_lse = merge(*[(out.double(), lse.double()) for out, lse in parts])
    errors = {}
    for dtype in (torch.float64, torch.float32):
        out, lse = parts[0][0].transpose(1, 2).clone(), parts[0][1].to(dtype)
        for part_out, part_lse in parts[1:]:
            merge_into(out, lse, part_out.transpose(1, 2), part_lse)
        assert (out.dtype, lse.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(out.transpose(1, 2).double(), exact_out, rtol=0, atol=1e-6)
        errors[dtype] = float((lse - exact_lse).abs().max())
    assert errors[torch.float64] < 1e-12 < 1e-7 < errors[torch.float32]
