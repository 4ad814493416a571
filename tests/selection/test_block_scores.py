"""What selectors read, and each score, against loops over blocks."""

import math

import pytest
import torch
from naive_blocks import SIZES

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Causal, Full, Window
from dilated_attention_pytorch.selection import (
    Antidiagonal,
    BlockScore,
    MeanPooled,
    MinMax,
    Oracle,
    QueryBlocks,
    Selector,
    TokenBlocks,
    TopBlocks,
    block_mass,
    query_blocks,
)
from dilated_attention_pytorch.selection.blocks import blocks_problem

SCALE = 0.7


@pytest.mark.parametrize("name", SIZES)
def test_what_is_read_is_what_may_be_read(name):
    sizes = SIZES[name]
    q, k, _ = sizes.tensors()
    blocks = sizes.read()
    assert isinstance(blocks, QueryBlocks)
    assert isinstance(blocks.probes, TokenBlocks)
    assert (blocks.first_block, blocks.reads_own, blocks.block_size) == (sizes.first, sizes.reads_own, sizes.block)
    assert blocks.probe.shape[1] == len(sizes.rows)
    for b in range(2):
        for i, row in enumerate(sizes.rows):
            held = blocks.probe_held[b % len(blocks.probe_held), i]
            assert torch.equal(blocks.probe[b, i][held], q[b, sizes.judged_by(b, row)])
            assert not blocks.probe[b, i][~held].any()
            torch.testing.assert_close(blocks.probe_mean[b, i], q[b, sizes.judged_by(b, row)].mean(0))
        for column in sizes.columns:
            held, mine = blocks.keys_held[b % len(blocks.keys_held), column], k[b, sizes.keys_of(b, column)]
            assert torch.equal(blocks.keys[b, column][held], mine)
            if len(mine) > 0:
                torch.testing.assert_close(blocks.key_mean[b, column], mine.mean(0))
                assert torch.equal(blocks.key_blocks.least[b, column], mine.amin(0))
                assert torch.equal(blocks.key_blocks.greatest[b, column], mine.amax(0))
            else:
                assert not blocks.key_blocks.least[b, column].any()
                assert not blocks.key_blocks.greatest[b, column].any()


@pytest.mark.parametrize("name", SIZES)
def test_open_and_always_blocks(name):
    sizes = SIZES[name]
    blocks = sizes.read(sink_blocks=1, local_blocks=2)
    shape = (2, sizes.heads[0], len(sizes.rows), len(sizes.columns))
    may_open, always = blocks.open_blocks.expand(shape), blocks.always.expand(shape)
    counts = sizes.counts()
    tight = type(sizes.pattern) in (Full, Causal, Window)
    for i, row in enumerate(sizes.rows):
        mine = [n for n in range(sizes.queries) if (sizes.start + n) // sizes.block == row]
        for column in sizes.columns:
            theirs = [j for j in range(sizes.keys) if j // sizes.block == column]
            seen = counts[:, :, mine][..., theirs].flatten(2).any(-1)
            wanted = seen & (sizes.reads_own or column < row)
            kept = seen & (column == 0 or row - 2 < column <= row)
            for given, least in ((may_open, wanted), (always, kept)):
                assert not (least & ~given[:, :, i, column]).any()
                assert not tight or torch.equal(given[:, :, i, column], least)


def test_bounds_are_asked_in_parts(monkeypatch):
    whole = SIZES["causal_dilated"].read().open_blocks
    monkeypatch.setattr("dilated_attention_pytorch.selection.reading.BOUND_CELLS", 40)
    assert torch.equal(SIZES["causal_dilated"].read().open_blocks, whole)


def mean_pooled(q, k):
    return SCALE * q.mean(0) @ k.mean(0) + math.log(len(k))


def bound(q, k):
    ends = torch.stack([k.amin(0), k.amax(0)])
    per_query = [(SCALE * row * ends).amax(0).sum() for row in q]
    return torch.stack(per_query).mean() + math.log(len(k))


@pytest.mark.parametrize(("score", "naive"), [(MeanPooled(), mean_pooled), (MinMax(), bound)])
@pytest.mark.parametrize("name", SIZES)
def test_pooled_scores_are_those_of_loops(name, score, naive):
    sizes = SIZES[name]
    q, k, _ = sizes.tensors()
    found = score(sizes.read(SCALE))
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    for b, h, i, column in every(found):
        rows, keys = sizes.judged_by(b, sizes.rows[i]), sizes.keys_of(b, column)
        if keys:
            wanted = naive(q[b, rows, h], k[b, keys, h // (sizes.heads[0] // sizes.heads[1])])
            torch.testing.assert_close(found[b, h, i, column], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("name", SIZES)
def test_antidiagonal_sums_are_those_of_loops(name, stride, monkeypatch):
    monkeypatch.setattr("dilated_attention_pytorch.selection.scores._PAIRS", 200)  # several parts
    sizes = SIZES[name]
    _q, k, _ = sizes.tensors()
    blocks = sizes.read(SCALE)
    found, may_open = Antidiagonal(stride)(blocks).exp(), blocks.open_blocks
    for b, h, i, _ in every(found[..., :1]):
        allowed = may_open[b % len(may_open), h % may_open.shape[1], i]
        shares = []
        for u in range(0, sizes.block, stride):
            probe, held = blocks.probe[b, i, u : u + stride, h], blocks.probe_held[b % len(blocks.probe_held), i]
            if not held[u : u + stride].any():
                continue
            weights = torch.zeros(len(sizes.columns))
            for column in sizes.columns:
                for v in range(0, sizes.block, stride):
                    keys = list(range(column * sizes.block + v, column * sizes.block + v + stride))
                    there = [j for j in keys if j < sizes.length(b)]
                    if not allowed[column] or not there:
                        continue
                    pairs = [(n, j) for n, j in zip(range(stride), reversed(keys)) if held[u + n] and j in there]
                    kv_head = h // (sizes.heads[0] // sizes.heads[1])
                    logit = sum((probe[n] @ k[b, j, kv_head] for n, j in pairs), torch.zeros(()))
                    weights[column] += len(there) * torch.exp(SCALE * logit / max(1, len(pairs)))
            shares.append(weights / weights.sum().clamp(min=1e-30))
        wanted = torch.stack(shares).mean(0)
        torch.testing.assert_close(found[b, h, i][allowed], wanted[allowed], rtol=1e-4, atol=1e-6)


def every(scores):
    return torch.ones(scores.shape).nonzero().tolist()


def test_a_negative_scale_turns_the_bound_round():
    sizes = SIZES["full_padded"]
    q, k, _ = sizes.tensors()
    found = MinMax()(sizes.read(-SCALE))[0, 0, 0, 0]
    ends = torch.stack([k[0, :8, 0].amin(0), k[0, :8, 0].amax(0)])
    wanted = torch.stack([(-SCALE * row * ends).amax(0).sum() for row in q[0, :8, 0]]).mean() + math.log(8)
    torch.testing.assert_close(found, wanted)


def test_the_bound_is_never_below_the_mean_logit():
    blocks = SIZES["causal"].read()
    assert bool((MinMax()(blocks) >= MeanPooled()(blocks) - 1e-5).all())


def test_the_oracle_scores_by_exact_mass():
    sizes = SIZES["causal_lookahead"]
    q, k, mask = sizes.tensors()
    mass = block_mass(q, k, sizes.pattern, sizes.block, key_padding_mask=mask, scale=SCALE)
    torch.testing.assert_close(Oracle()(sizes.read(SCALE)).exp(), mass)


def test_half_types_are_scored_in_float32():
    q, k, _ = SIZES["causal"].tensors()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        problem = blocks_problem(q.to(dtype), k.to(dtype), Full())
        rounded = blocks_problem(q.to(dtype).float(), k.to(dtype).float(), Full())
        for score in (MeanPooled(), MinMax(), Antidiagonal(4), Oracle()):
            found, wanted = (score(query_blocks(p, Full(), 8)) for p in (problem, rounded))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_scores_refuse_what_they_cannot_judge():
    q, k, _ = SIZES["causal"].tensors()
    with pytest.raises(InvalidInput, match=r"multiple of stride \(16\). Got 24; try Antidiagonal\(stride=12\)"):
        Selector(Antidiagonal(), TopBlocks(), block_size=24)(q, k, 1)
    with pytest.raises(InvalidInput, match=r"Oracle: .* expected Selector\(..., lookahead=True\)"):
        Selector(Oracle(), TopBlocks(), block_size=8)(q, k, 1, Causal())
    for stride in (0, True, 2.0):
        with pytest.raises(InvalidInput, match="stride of at least 1"):
            Antidiagonal(stride)
    with pytest.raises(InvalidInput, match="expected a pattern"):
        Selector(MeanPooled(), TopBlocks())(q, k, 1, "causal")
    with pytest.raises(TypeError):
        BlockScore()
