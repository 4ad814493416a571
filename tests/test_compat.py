"""torchscale's departures, against its dataflow written out: pad, gather, attend per branch, scatter, mix detached."""

import math

import pytest
import torch

from dilated_attention_pytorch import (
    Causal,
    Dilated,
    InvalidInput,
    TorchscaleCompat,
    Window,
    attend,
    longnet,
    longnet_attention,
    reference_attention,
)
from dilated_attention_pytorch.compat import branch_patterns

SHAPES = [
    ((4, 8, 16), (1, 2, 4), 4, 16),
    ((4, 8, 16), (1, 2, 4), 4, 23),  # the last segment is filled up
    ((5, 12), (2, 3), 3, 17),  # rates that do not divide segments, nor heads
    ((6, 100), (4, 3), 6, 21),  # a segment longer than the sequence
]


def dataflow(q, k, v, lengths, rates, *, causal=False, zero_keys=True, detach=True):
    """Every head's rows of every segment, padded with zero rows to a whole grid, as dense problems; out and lse."""
    b, n, h, d = q.shape
    outs, lses = [], []
    for length, r in zip(lengths, rates):
        w = min(length, n)
        segments, grid = -(-n // w), -(-w // r)
        block = -(-h // r)
        out = torch.zeros(b, n, h, v.shape[3], dtype=q.dtype)
        lse = torch.full((b, h, n), -math.inf, dtype=q.dtype)
        for head in range(h):
            place = head // block
            for segment in range(segments):
                start = segment * w
                rows = [start + place + m * r for m in range(grid)]
                real = [x for x in rows if x < min(start + w, n)]
                if not real:
                    continue
                appended = (len(rows) - len(real)) if zero_keys else 0
                keys, values = (torch.cat([x[:, real, head], x.new_zeros(b, appended, x.shape[3])], 1) for x in (k, v))
                logits = q[:, real, head] @ keys.transpose(1, 2) / math.sqrt(d)
                if causal:
                    logits = logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -math.inf)
                out[:, real, head] = torch.softmax(logits, -1) @ values
                lse[:, head, real] = torch.logsumexp(logits, -1)
        outs.append(out)
        lses.append(lse)
    total = torch.stack(lses).logsumexp(0)
    weights = [
        torch.where(total > -math.inf, (x - torch.where(total > -math.inf, total, 0.0)).exp(), 0.0) for x in lses
    ]
    weights = [x.detach() if detach else x for x in weights]
    return sum(x.transpose(1, 2).unsqueeze(-1) * o for x, o in zip(weights, outs)), total


def inputs(h, n):
    return [torch.randn(2, n, h, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("zero_keys", "detach"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("lengths", "rates", "h", "n"), SHAPES)
def test_equals_the_dataflow(lengths, rates, h, n, zero_keys, detach, causal, backend):
    x, g = inputs(h, n), torch.randn(2, n, h, 4, dtype=torch.float64)
    mine = longnet_attention(
        *x,
        lengths,
        rates,
        is_causal=causal,
        head_offset="torchscale",
        compat=TorchscaleCompat(zero_keys, detach),
        backend=backend,
        return_lse=True,
    )
    expected = dataflow(*x, lengths, rates, causal=causal, zero_keys=zero_keys, detach=detach)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(mine[0], x, g), torch.autograd.grad(expected[0], x, g), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("lengths", "rates", "h", "n"), SHAPES)
def test_the_reference_reproduces_it_too(lengths, rates, h, n):
    x, g = inputs(h, n), torch.randn(2, n, h, 4, dtype=torch.float64)
    pattern = longnet(lengths, rates, head_offset="torchscale")
    mine = reference_attention(*x, pattern, compat=TorchscaleCompat(True, True))
    expected = dataflow(*x, lengths, rates)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(mine[0], x, g), torch.autograd.grad(expected[0], x, g))


def test_each_departure_departs():
    x, pattern = inputs(4, 23), longnet([4, 8, 16], [1, 2, 4], head_offset="torchscale")
    plain = attend(*x, pattern)
    zeros = attend(*x, pattern, compat=TorchscaleCompat(zero_keys=True))
    assert (zeros - plain).abs().max() > 0.01
    detached = attend(*x, pattern, compat=TorchscaleCompat(detach_mixing=True))
    torch.testing.assert_close(detached, plain)
    given = torch.randn_like(plain)
    dq, other = (torch.autograd.grad(out, x[0], given)[0] for out in (plain, detached))
    assert 0.05 < float((dq - other).norm() / dq.norm()) < 1.0


def test_the_lse_gradient_through_zero_keys():
    x, pattern = inputs(4, 23), longnet([4, 8, 16], [1, 2, 4], head_offset="torchscale")
    compat = TorchscaleCompat(zero_keys=True)
    mine, expected = (
        attend(*x, pattern, compat=compat, return_lse=True),
        reference_attention(*x, pattern, compat=compat),
    )
    given = (torch.randn_like(mine[0]), torch.randn_like(mine[1]))
    torch.testing.assert_close(torch.autograd.grad(mine, x[:2], given), torch.autograd.grad(expected, x[:2], given))


def test_detach_mixing_refuses_a_gradient_of_lse():
    x = inputs(2, 8)
    out, lse = attend(*x, longnet([4], [1]), compat=TorchscaleCompat(detach_mixing=True), return_lse=True)
    with pytest.raises(InvalidInput, match="do not differentiate lse"):
        (out.sum() + lse.sum()).backward()


def test_branch_patterns_are_causal_where_the_whole_is():
    branches = branch_patterns(longnet([4, 8], [1, 2]) & Causal())
    assert [b.text() for b in branches] == [(Dilated(4, 1) & Causal()).text(), (Dilated(8, 2) & Causal()).text()]
    with pytest.raises(InvalidInput, match="torchscale"):
        branch_patterns(longnet([4], [1]) & Window(3))
