"""The truth itself, against numbers computed by hand, Python loops, and the paper's own way of merging branches."""

import math

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, Full, Relative, Softcap, Window, longnet, reference_attention
from dilated_attention_pytorch.dropout import dropout_factors


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_two_tokens_by_hand():
    q = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    k = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    v = torch.tensor([8.0, 4.0]).view(1, 2, 1, 1)
    out, lse = reference_attention(q, k, v, Full(), scale=1.0)
    assert out.flatten().tolist() == pytest.approx([6.0, (8 + 3 * 4) / 4])  # weights 1:1 and 1:3
    assert lse.exp().flatten().tolist() == pytest.approx([2.0, 4.0])
    out, lse = reference_attention(q, k, v, Full() + Causal(), scale=1.0)  # the past counts twice
    assert out.flatten().tolist() == pytest.approx([(2 * 8 + 4) / 3, (2 * 8 + 6 * 4) / 8])
    assert lse.exp().flatten().tolist() == pytest.approx([3.0, 8.0])


def loops(q, k, v, counts, scale, bias=None):
    """The definition of DESIGN section 1, number by number."""
    b, nq, h, _ = q.shape
    out, lse = torch.zeros(b, nq, h, v.shape[3], dtype=torch.float64), torch.full((b, h, nq), -math.inf).double()
    for sample in range(b):
        for head in range(h):
            kv = head // (h // k.shape[2])
            for i in range(nq):
                terms = []
                for j in range(k.shape[1]):
                    s = scale * float(q[sample, i, head] @ k[sample, j, kv])
                    s += 0.0 if bias is None else float(bias[sample, head, i, j])
                    terms.append(int(counts[head, i, j]) * math.exp(s))
                total = math.fsum(terms)
                if total > 0:
                    lse[sample, head, i] = math.log(total)
                    for j, term in enumerate(terms):
                        out[sample, i, head] += term / total * v[sample, j, kv]
    return out, lse


@pytest.mark.parametrize("pattern", [Full(), Window(2) & Causal(), longnet([3, 6], [1, 2]), Dilated(4, 3)])
def test_loops_over_the_definition(pattern):
    q, k, v = randn(2, 7, 4, 3), randn(2, 9, 2, 3), randn(2, 9, 2, 5)
    bias = randn(2, 4, 7, 9)
    bias[0, 0, 0] = -math.inf
    out, lse = reference_attention(q, k, v, pattern, bias=bias)
    expected = loops(q, k, v, pattern.to_mask(4, 7, 9), 3**-0.5, bias)
    torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-12)
    assert lse[0, 0, 0] == -math.inf


def test_default_scale_and_padding():
    q = randn(2, 6, 1, 16)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    out, lse = reference_attention(q, q, q, Full(), key_padding_mask=mask)
    alone = reference_attention(q[1:], q[1:, :4], q[1:, :4], Full(), scale=0.25, query_start=0)
    torch.testing.assert_close((out[1:], lse[1:]), alone)


def paper(q, k, v, lengths, rates, causal):
    """Equations 5-10: sparsify each segment, attend, scatter, then weigh branches by softmax denominators."""
    b, n, h, d = q.shape
    outs, sums = [], []
    for w, r in zip(lengths, rates):
        o, s = torch.zeros(b, n, h, v.shape[3], dtype=torch.float64), torch.zeros(b, n, h, dtype=torch.float64)
        for head in range(h):
            for start in range(0, n, w):
                rows = torch.arange(start + head % r, min(start + w, n), r)
                if len(rows) == 0:
                    continue
                logits = q[:, rows, head] @ k[:, rows, head].transpose(1, 2) / math.sqrt(d)
                if causal:
                    logits = logits.masked_fill(torch.ones(len(rows), len(rows)).triu(1).bool(), -math.inf)
                o[:, rows, head] = torch.softmax(logits, -1) @ v[:, rows, head]
                s[:, rows, head] = logits.exp().sum(-1)
        outs.append(o)
        sums.append(s)
    total = sum(sums)  # alpha_i = s_i / sum_j s_j
    alphas = [torch.where(total > 0, s / torch.where(total > 0, total, 1.0), 0.0) for s in sums]
    return sum(a[..., None] * o for a, o in zip(alphas, outs)), total.log().transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "rates"), [((4, 8, 16), (1, 2, 4)), ((5, 12), (2, 3)), ((6, 10, 9), (1, 3, 2))])
@pytest.mark.parametrize("n", [4, 19, 32])
def test_merging_by_denominators_is_the_sum_of_counts(lengths, rates, causal, n):
    x = [randn(1, n, 4, 3).requires_grad_() for _ in range(3)]
    pattern = longnet(lengths, rates) & Causal() if causal else longnet(lengths, rates)
    mine, theirs = reference_attention(*x, pattern), paper(*x, lengths, rates, causal)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    g = randn(1, n, 4, 3)
    torch.testing.assert_close(
        torch.autograd.grad(mine[0], x, g), torch.autograd.grad(theirs[0], x, g), rtol=1e-10, atol=1e-10
    )


def test_a_union_would_be_something_else():
    x = randn(1, 16, 1, 4)
    out, _ = reference_attention(x, x, x, longnet([4, 8], [1, 1]))
    union, _ = reference_attention(x, x, x, Dilated(8, 1))
    assert (out - union).abs().max() > 0.01


def test_rows_without_keys_and_their_gradients():
    x = [randn(1, 6, 2, 4).requires_grad_() for _ in range(3)]
    out, lse = reference_attention(*x, Dilated(3, 3))  # head 0: row 0, head 1: row 1 of each segment
    seen = torch.tensor([[True, False, False] * 2, [False, True, False] * 2])
    assert torch.equal(lse[0] > -math.inf, seen)
    assert bool((out[0].transpose(0, 1)[~seen] == 0).all())
    for g in torch.autograd.grad((out, lse), x, (randn(*out.shape), randn(*lse.shape))):
        assert bool((g[0].transpose(0, 1)[~seen] == 0).all())
        assert bool(g.isfinite().all())


def test_gradients_are_the_definitions():
    x = [randn(1, 5, 2, 3).requires_grad_() for _ in range(3)]
    bias = randn(5, 5).requires_grad_()
    rule = Softcap(2.0)
    pattern = longnet([2, 4], [1, 2])
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: reference_attention(q, k, v, pattern, bias=b, score=rule), (*x, bias)
    )


def test_score_rules_by_hand():
    q, k, v = randn(1, 4, 2, 3), randn(1, 4, 2, 3), randn(1, 4, 2, 3)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(3)
    distance = torch.arange(4)[:, None] - torch.arange(4)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    biased = logits - slopes[:, None, None] * distance.abs()
    expected = torch.einsum("bhij,bjhd->bihd", torch.softmax(biased, -1), v)
    found = reference_attention(q, k, v, Full(), score=Relative(slopes=slopes))
    torch.testing.assert_close(found, (expected, biased.logsumexp(-1)))
    capped = 1.5 * torch.tanh(logits / 1.5)
    found = reference_attention(q, k, v, Full(), score=Softcap(1.5))
    torch.testing.assert_close(found[1], capped.logsumexp(-1))


def test_dropout_multiplies_weights_and_not_denominators():
    x, seed = randn(2, 6, 2, 3), torch.tensor([77])
    out, lse = reference_attention(x, x, x, Full() + Causal(), dropout_p=0.4, seed=seed)
    logits = torch.einsum("bihd,bjhd->bhij", x, x) / math.sqrt(3) + (Full() + Causal()).to_mask(2, 6).double().log()
    row = torch.arange(4).view(2, 2, 1, 1)
    keep = dropout_factors(seed, 0.4, row, torch.arange(6).view(6, 1), torch.arange(6))
    assert set(keep.unique().tolist()) == {0.0, 1 / 0.6}
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", keep * torch.softmax(logits, -1), x))
