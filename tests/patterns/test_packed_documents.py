"""Packed documents: a sample in a pack equals the sample alone, whatever the tables look like."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, InvalidInput, Window, attend, longnet

INNER = longnet([4, 8], [1, 2]) & Causal()


def block_diagonal(lengths, total, inner, heads):
    expected = torch.zeros(heads, total, total, dtype=torch.int64)
    start = 0
    for n in lengths:
        expected[:, start : start + n, start : start + n] = inner.to_mask(heads, n)
        start += n
    return expected


@pytest.mark.parametrize("lengths", [[5, 9], [14], [0, 5, 0, 0, 9, 0], [1] * 14, [3, 4], [20]])
@pytest.mark.parametrize("inner", [INNER, Window(3), longnet([6], [4])], ids=["longnet", "window", "dilated"])
def test_of_restarts_positions(lengths, inner):
    clipped, room = [], 14
    for n in lengths:
        clipped.append(min(n, room))
        room -= clipped[-1]
    expected = block_diagonal(clipped, 14, inner, 2)
    assert torch.equal(Documents(lengths).of(inner).to_mask(2, 14), expected)


def test_and_only_cuts_links():
    whole, cut = INNER.to_mask(2, 14), (Documents([5, 9]) & INNER).to_mask(2, 14)
    links = block_diagonal([5, 9], 14, Documents([14]), 2)
    assert torch.equal(cut, whole * links)
    assert not torch.equal(cut, Documents([5, 9]).of(INNER).to_mask(2, 14))


def test_rows_past_the_last_document_see_nothing():
    mask = Documents([2, 3]).to_mask(1, 8)[0]
    assert mask[5:].sum() == 0
    assert mask[:, 5:].sum() == 0
    assert mask[:5].sum() == 4 + 9
    x = torch.randn(1, 8, 2, 8, requires_grad=True)
    out, lse = attend(x, x, x, Documents([2, 3]).of(Causal()), return_lse=True)
    assert bool((out[:, 5:] == 0).all())
    assert bool((lse[..., 5:] == -torch.inf).all())
    out.sum().backward()
    assert bool((x.grad[:, 5:] == 0).all())


def test_batched_tables_are_one_list_per_sample():
    tables = [[5, 9, 0], [1, 2, 11]]
    mask = Documents(tables).of(INNER).to_mask(2, 14)
    assert mask.shape == (2, 2, 14, 14)
    for sample, lengths in zip(mask, tables):
        assert torch.equal(sample, block_diagonal(lengths, 14, INNER, 2))


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@pytest.mark.parametrize("tables", [[5, 0, 9], [[5, 9, 0], [1, 2, 11]]], ids=["shared", "batched"])
def test_a_packed_sample_equals_the_sample_alone(tables, backend):
    x, g = torch.randn(2, 14, 2, 8, requires_grad=True), torch.randn(2, 14, 2, 8)
    out = attend(x, x, x, Documents(tables).of(INNER), backend=backend)
    (dx,) = torch.autograd.grad(out, x, g)
    for b in range(2):
        lengths, start = tables[b] if isinstance(tables[0], list) else tables, 0
        for n in lengths:
            rows = slice(start, start + n)
            alone = x.detach()[b : b + 1, rows].clone().requires_grad_()
            expected = attend(alone, alone, alone, INNER, backend=backend)
            (grad,) = torch.autograd.grad(expected, alone, g[b : b + 1, rows])
            torch.testing.assert_close(out[b : b + 1, rows], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dx[b : b + 1, rows], grad, rtol=1e-5, atol=1e-5)
            start += n


def test_from_cu_seqlens_is_flash_attns_convention():
    pattern = Documents.from_cu_seqlens(torch.tensor([0, 5, 5, 14], dtype=torch.int32))
    assert pattern.lengths.tolist() == [5, 0, 9]
    assert pattern.lengths.dtype == torch.int64
    assert torch.equal(pattern.to_mask(1, 14), Documents([5, 0, 9]).to_mask(1, 14))


def test_nested_documents_restart_twice():
    nested = Documents([6, 8]).of(Documents([4, 2]).of(Causal()))
    inner = Documents([4, 2]).of(Causal())
    assert torch.equal(nested.to_mask(1, 14), block_diagonal([6, 8], 14, inner, 1))
    x = torch.randn(1, 14, 1, 4)
    assert attend(x, x, x, nested).shape == x.shape


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Documents([1.5]), "integer lengths"),
        (lambda: Documents([]), "at least one"),
        (lambda: Documents([True]), "integer lengths"),
        (lambda: Documents(torch.ones(1, 1, 1, dtype=torch.int64)), "shape"),
        (lambda: Documents.from_cu_seqlens([0]), "cu_seqlens"),
        (lambda: Documents.from_cu_seqlens([[0, 1], [0, 2]]), "cu_seqlens"),
    ],
)
def test_bad_tables_say_what_was_expected(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_tables_must_fit_the_batch_and_be_positive():
    x = torch.zeros(3, 4, 1, 2)
    with pytest.raises(InvalidInput, match="2 samples"):
        attend(x, x, x, Documents([[4], [4]]).of(Causal()))
    with pytest.raises(InvalidInput, match=">= 0"):
        attend(x, x, x, Documents([5, -1]))
    assert attend(x, x, x, Documents([[4]]).of(Causal())).shape == x.shape
