"""The probe of the last queries against loops, its divergence test, and the lines it finds."""

import math

import pytest
import torch
from naive_blocks import SIZES

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Causal
from dilated_attention_pytorch.selection import LastQueries, MeanPooled, Selector, TopBlocks
from dilated_attention_pytorch.selection.last_queries import divergence
from dilated_attention_pytorch.selection.mass import block_shares


@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", SIZES)
def test_the_score_is_that_of_loops(name, tau, monkeypatch):
    monkeypatch.setattr("dilated_attention_pytorch.selection.last_queries._PAIRS", 300)  # several parts
    sizes = SIZES[name]
    q, k, _ = sizes.tensors()
    blocks = sizes.read(0.7)
    found, mean = LastQueries(3, tau)(blocks).exp(), MeanPooled()(blocks)
    may_open = blocks.open_blocks.expand(2, sizes.heads[0], -1, -1)
    for b, h, i in torch.ones(found.shape[:3]).nonzero().tolist():
        columns = may_open[b, h, i].nonzero().flatten().tolist()
        keys = [j for c in columns for j in sizes.keys_of(b, c)]
        if not keys:
            continue
        tried = torch.zeros(len(sizes.columns))
        rows = sizes.judged_by(b, sizes.rows[i])[-3:]
        for n in rows:
            share = torch.softmax(0.7 * k[b, keys, h // (sizes.heads[0] // sizes.heads[1])] @ q[b, n, h], 0)
            for j, x in zip(keys, share):
                tried[j // sizes.block] += x / len(rows)
        pooled = torch.zeros(len(sizes.columns))
        pooled[columns] = torch.softmax(mean[b, h, i, columns], 0)
        middle = (tried + pooled) / 2
        apart = sum(
            0.5 * x * math.log(x / m) for y in (tried, pooled) for x, m in zip(y.tolist(), middle.tolist()) if x
        )
        wanted = pooled
        if math.sqrt(max(apart, 0.0)) >= tau:
            moved = torch.tensor([0.0, *tried[:-1].tolist()])
            wanted = tried if sizes.reads_own or i == 0 else torch.maximum(tried, moved)
        torch.testing.assert_close(found[b, h, i, columns], wanted[columns], rtol=1e-4, atol=1e-6)


def test_a_slash_is_followed_to_the_next_block():
    """Each query looks four blocks back; the probe stands a block earlier, and its line is moved on."""
    block, n = 8, 96
    names = torch.randn(n // block, 16)
    names = 4.0 * names / names.norm(dim=-1, keepdim=True)
    k = names.repeat_interleave(block, 0).view(1, n, 1, 16)
    q = names.roll(4, 0).repeat_interleave(block, 0).view(1, n, 1, 16)
    layout = Selector(LastQueries(tau=0.0), TopBlocks(), block, 0, 0)(q, k, 3, Causal(), scale=3.0).layout[0, 0]
    for row in range(5, n // block):
        assert layout[row].nonzero().flatten().tolist() == [row - 5, row - 4, row]


def test_divergence_is_symmetric_and_bounded():
    p, q = torch.rand(50, 9).softmax(-1), torch.rand(50, 9).mul(5).softmax(-1)
    middle = ((p + q) / 2).log()
    wanted = (p * (p.log() - middle)).sum(-1) / 2 + (q * (q.log() - middle)).sum(-1) / 2
    torch.testing.assert_close(divergence(p, q), wanted)
    torch.testing.assert_close(divergence(q, p), wanted)
    assert divergence(torch.eye(2), torch.eye(2).flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    assert divergence(p, p).tolist() == [0.0] * 50


def test_shares_of_blocks_are_a_softmax():
    logits, visible = torch.randn(6, 4, 5), torch.rand(6, 4, 5) < 0.7
    visible[2] = False
    weight = logits.exp() * visible
    wanted = weight.sum(-1) / weight.sum((-2, -1)).clamp(min=1e-30)[:, None]
    torch.testing.assert_close(block_shares(logits, visible), wanted)
    whole = torch.tensor([True, False, True, True])[:, None]
    logits[:, 1] = torch.nan
    assert torch.equal(block_shares(logits, whole), block_shares(logits, whole.expand(4, 5)))


@pytest.mark.parametrize("options", [{"queries": 0}, {"queries": True}, {"tau": -0.1}, {"tau": math.nan}, {"tau": 2.0}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidInput, match=r"LastQueries: expected .* Got"):
        LastQueries(**options)
