"""Heads for tokens: exact there and back, few collectives, and the bytes that were announced."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import BlockSparse, Causal, Documents, Full, InvalidInput, Relative, attention, longnet
from dilated_attention_pytorch.parallel import heads, wire
from dilated_attention_pytorch.parallel.grouping import group_rows, slice_length
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.problem import Problem, Run, positions_tensor
from parallel.worlds import run_world

HEADS, LENGTH = 6, 53
PAPER = longnet([8, 24, 64], [1, 3, 4])
G = torch.Generator().manual_seed(2)
BLOCKS = torch.rand(2, HEADS, 7, 7, generator=G) < 0.5
SLOPES = torch.linspace(0.5, 0.1, HEADS, dtype=torch.float64)

# (pattern, what differs from 6 heads of 53 tokens in float64)
CASES = {
    "causal": (Causal(), {}),
    "longnet": (PAPER & Causal(), {"key_lengths": (LENGTH, 20)}),
    "torchscale": (longnet([16, 32], [2, 4], head_offset="torchscale"), {"value_dim": 5}),
    "groups_in_documents": (Documents([7, 0, 23, 17]).of(longnet([8, 16, 32], [1, 2, 4], head_groups=True)), {}),
    "blocks": (BlockSparse(8, BLOCKS), {"score": Relative(slopes=SLOPES)}),
    "one_kv_head": (PAPER, {"kv_heads": 1}),
    "dropout": (PAPER & Causal(), {"dropout_p": 0.3, "seed": torch.tensor([5])}),
    "cross": (Full(), {"queries": 17, "query_start": 13}),
    "no_tokens_for_some": (Causal(), {"queries": 1, "keys": 2, "query_start": 1}),
}


def whole(queries=LENGTH, keys=LENGTH, kv_heads=HEADS, num_heads=HEADS, value_dim=4, query_start=0, dtype=None, **rest):
    """A problem in one process, and the gradients that come back to it."""
    g = torch.Generator().manual_seed(3)
    shapes = [
        (queries, num_heads, 4),
        (keys, kv_heads, 4),
        (keys, kv_heads, value_dim),
        (queries, num_heads, value_dim),
    ]
    q, k, v, dout = (torch.randn(2, *s, generator=g, dtype=torch.float64).to(dtype or torch.float64) for s in shapes)
    dlse = torch.randn(2, num_heads, queries, generator=g, dtype=torch.float64)
    at = ((Run(query_start, 1, queries),), (Run(0, 1, keys),))
    return Problem(q, k, v, 0.4, *at, needs_grad=True, **rest), dout, dlse


def shard(problem, layout):
    """This rank's rows of a problem, the world of all ranks, and which queries are its own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    start = problem.query_positions[0].start
    layouts = Layout(layout, problem.query_length, size, start), Layout(layout, problem.key_length, size)
    queries, keys = (tuple(side.positions(r) for r in range(size)) for side in layouts)
    mine, other = positions_tensor(queries[rank]) - start, positions_tensor(keys[rank])
    part = replace(
        problem,
        q=problem.q[:, mine],
        k=problem.k[:, other],
        v=problem.v[:, other],
        query_positions=queries[rank],
        key_positions=keys[rank],
    )
    return part, World(rank, queries, keys, dist.group.WORLD), mine, other


def truth(name):
    pattern, change = CASES[name]
    problem, dout, dlse = whole(**change)
    out, lse = attention.forward(problem, pattern)
    return out, lse, *attention.backward(problem, pattern, dout, dlse, out, lse)[:3]


def every_case(truths):
    for name, (pattern, change) in CASES.items():
        given, dout, dlse = whole(**change)
        out, lse, dq, dk, dv = truths[name]
        for layout in LAYOUTS:
            problem, world, mine, other = shard(given, layout)
            assert heads.reasons_against(problem, pattern, world) == []
            got, got_lse, kept = heads.forward(problem, pattern, world, "auto")
            shapes = replace(problem, **{x: getattr(problem, x).to("meta") for x in "qkv"})  # backward reads no numbers
            back = (dout[:, mine], dlse[..., mine], got.to("meta"), got_lse.to("meta"))
            grads = heads.backward(shapes, pattern, world, *back, kept, "auto")
            expected = (out[:, mine], lse[..., mine], dq[:, mine], dk[:, other], dv[:, other])
            for tensor, wanted in zip((got, got_lse, *grads[:3]), expected):
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-12, msg=lambda m: f"{name} {layout}: {m}")  # noqa: B023


def carried(given, dout, layout):
    """(collectives, bytes) that came from other ranks in forward and in backward, and those announced."""
    problem, world, mine, _ = shard(given, layout)
    counts = []

    def counting(group, rows, send_counts, receive_counts):
        counts.append((sum(receive_counts) - receive_counts[world.rank]) * rows.element_size())
        return wire.start_all_to_all(group, rows, send_counts, receive_counts)

    def compute(local, part):  # as rings do it, in the accumulate dtype
        out, lse = attention.forward(local, part)
        return out.to(lse.dtype), lse, ()

    with mock.patch.object(heads, "start_all_to_all", counting):
        out, lse, kept = heads.forward_with(problem, Causal(), world, compute)
        forward, counts = counts, []
        grads = heads.backward(problem, Causal(), world, dout[:, mine], None, out, lse, kept, "auto")
    meta = replace(problem, **{x: getattr(problem, x).to("meta") for x in "qkv"})
    announced = heads.traffic(meta, Causal(), world)
    assert [x.dtype for x in (out, *grads[:3])] == [problem.q.dtype] * 4
    return [(len(forward), sum(forward), announced.forward), (len(counts), sum(counts), announced.backward)]


def bytes_and_collectives():
    told = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kv_heads in (HEADS, 1):
            given, dout, _ = whole(kv_heads=kv_heads, value_dim=5, dtype=dtype)
            told[dtype, kv_heads] = [carried(given, dout, layout) for layout in LAYOUTS]
    return told


def half_type_gradients():
    """Gradients of a shared key-value head, all ranks' rows put together: (dk, dv) of rank 0."""
    given, dout, _ = whole(kv_heads=1, dtype=torch.bfloat16)
    problem, world, mine, other = shard(given, "striped")
    out, lse, kept = heads.forward(problem, Full(), world, "auto")
    grads = heads.backward(problem, Full(), world, dout[:, mine], None, out, lse, kept, "auto")
    found = []
    for grad in (grads.k, grads.v):
        full = torch.zeros(given.k.shape)
        full[:, other] = grad.float()
        dist.all_reduce(full)
        found.append(full)
    return found


def in_each_rank(truths):
    every_case(truths)
    return bytes_and_collectives(), half_type_gradients()


@pytest.mark.parametrize("size", [2, 3])
def test_heads_for_tokens_and_back(size):
    told = run_world(size, in_each_rank, {name: truth(name) for name in CASES})
    for numbers, _ in told:
        for (dtype, kv_heads), layouts in numbers.items():
            for (sent, got, announced), (sent_back, got_back, announced_back) in layouts:
                assert (got, got_back) == (announced, announced_back)
                assert sent == (2 if dtype == torch.float32 else 3)  # q, k, v together; out beside a wider lse
                assert sent_back == (3 if dtype == torch.bfloat16 and kv_heads == 1 else 2)
    given, dout, _ = whole(kv_heads=1, dtype=torch.bfloat16)
    exact = replace(given, q=given.q.double(), k=given.k.double(), v=given.v.double())
    found = {}
    for name, problem, d in (("exact", exact, dout.double()), ("alone", given, dout)):
        out, lse = attention.forward(problem, Full())
        found[name] = attention.backward(problem, Full(), d, None, out, lse)[1:3]
    for mine, alone, wanted in zip(told[0][1], found["alone"], found["exact"]):
        error, limit = ((x.double() - wanted).square().mean().sqrt() for x in (mine, alone))
        assert error <= 1.05 * limit  # shares are summed before they are rounded, once


def test_a_world_of_one_is_local():
    problem, dout, dlse = whole()
    world = World(0, (problem.query_positions,), (problem.key_positions,))
    out, lse, kept = heads.forward(problem, PAPER, world, "auto")
    expected = attention.forward(problem, PAPER)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    grads = heads.backward(problem, PAPER, world, dout, dlse, out, lse, kept, "auto")
    for x, y in zip(grads[:3], attention.backward(problem, PAPER, dout, dlse, out, lse)[:3]):
        assert torch.equal(x, y)
    assert heads.traffic(problem, PAPER, world).total == 0
    assert heads.reasons_against(problem, PAPER, world) == []
    assert heads.inside(problem, PAPER, world) == (problem, PAPER)


def test_what_cannot_be_dealt_says_so():
    def reasons(size, **change):
        problem, *_ = whole(**change)
        rows = tuple(Layout("contiguous", LENGTH, size).positions(r) for r in range(size))
        return heads.reasons_against(problem, Full(), World(0, rows, rows))

    assert [len(reasons(size)) for size in (1, 2, 3, 4, 5, 6)] == [0, 0, 0, 1, 1, 0]
    assert "6 heads to 4 ranks" in reasons(4)[0]
    assert reasons(4)[0].endswith("or 3, 2 ranks")
    assert reasons(4, num_heads=12, kv_heads=4) == reasons(4, num_heads=12, kv_heads=2) == []
    (reason,) = reasons(4, num_heads=12, kv_heads=6)
    assert "12 query heads and 6 key-value heads to 4 ranks" in reason
    assert "multiple of 4" in reason
    assert "bias" in reasons(2, bias=torch.zeros(1, 1, 1, LENGTH))[0]
    problem, *_ = whole()
    rows = tuple(Layout("striped", LENGTH, 2).positions(r) for r in range(2))
    with pytest.raises(InvalidInput, match="layout is for 5 heads, q has 6"):  # before anything is sent
        heads.forward(problem, BlockSparse(8, BLOCKS[:, :5]), World(0, rows, rows), "auto")


def test_heads_of_a_rank_keep_their_numbers():
    problem, *_ = whole(kv_heads=2, num_heads=12, score=Relative(slopes=torch.arange(12.0)))
    rows = tuple(Layout("zigzag", LENGTH, 4).positions(r) for r in range(4))
    local, _ = heads.inside(problem, PAPER, World(3, rows, rows))
    assert local.of_heads == (9, 12)
    assert local.score.slopes.tolist() == [9, 10, 11]
    assert (local.q.shape, local.k.shape) == ((2, LENGTH, 3, 4), (2, LENGTH, 1, 4))
    again, part = heads.inside(local, PAPER, World(2, rows[:3], rows[:3]))  # a slice of a slice
    assert again.of_heads == (11, 12)
    assert again.score.slopes.tolist() == [11]
    assert torch.equal(part.to_mask(1, LENGTH), PAPER.to_mask(3, LENGTH)[2:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_group_are_those_of_its_ranks(name):
    for length in (0, 1, 3, 16, 53):
        for world in (1, 2, 4, 6):
            rows = [Layout(name, length, world, start=5).positions(r) for r in range(world)]
            for group in (slice(None), slice(0, 2), slice(1, 4), slice(0, None, 2)):
                found = group_rows(rows[group])
                at = positions_tensor(found.positions)
                assert found.counts == [sum(run.length for run in own) for own in rows[group]]
                assert sum(found.counts) == len(at)
                for own, cuts in zip(rows[group], found.slices):
                    parts = [at[cut] for cut in cuts]
                    assert [len(p) for p in parts] == list(map(slice_length, cuts))
                    assert torch.equal(torch.cat([at[:0], *parts]), positions_tensor(own))
                assert len(found.positions) <= max(1, sum(map(len, rows[group])))
                if name != "striped" or group == slice(None):
                    assert at.tolist() == sorted(at.tolist())
            whole_rows = group_rows(rows).positions
            assert whole_rows == ((Run(5, 1, length),) if length else ())
