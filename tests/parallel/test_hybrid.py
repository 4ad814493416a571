"""Meshes of two dims: heads are exchanged for tokens inside a row, and another method joins the rows."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import BlockSparse, Causal, Documents, InvalidInput, attention, longnet
from dilated_attention_pytorch.benchmark.received import ReceivedBytes
from dilated_attention_pytorch.parallel import gather, heads, ring
from dilated_attention_pytorch.parallel.grouping import two_worlds
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.problem import Problem, positions_tensor
from parallel.worlds import run_world

LENGTH, HEADS = 53, 8
PAPER = longnet([8, 24, 64], [1, 3, 4])
BLOCKS = torch.rand(HEADS, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.5
OUTER = {"all_to_all": heads, "ring": ring, "gather": gather}

# (pattern, key-value heads, visible keys)
CASES = {
    "causal": (Causal(), HEADS, None),
    "longnet": (PAPER, 2, (LENGTH, 20)),
    "longnet_causal": (longnet([8, 24, 64], [1, 3, 4], head_offset="torchscale") & Causal(), 1, None),
    "documents": (Documents([7, 23, 23]).of(longnet([8, 32], [1, 4], head_groups=True) & Causal()), HEADS, None),
    "blocks": (BlockSparse(8, BLOCKS) & Causal(), HEADS, None),
}


def whole(kv_heads, visible):
    g = torch.Generator().manual_seed(3)
    shapes = (HEADS, kv_heads, kv_heads, HEADS)
    q, k, v, dout = (torch.randn(2, LENGTH, h, 4, generator=g, dtype=torch.float64) for h in shapes)
    dlse = torch.randn(2, HEADS, LENGTH, generator=g, dtype=torch.float64)
    at = Layout("contiguous", LENGTH, 1).positions(0)
    return Problem(q, k, v, 0.4, at, at, key_lengths=visible, needs_grad=True), dout, dlse


def truth(name):
    pattern, *rest = CASES[name]
    problem, dout, dlse = whole(*rest)
    out, lse = attention.forward(problem, pattern)
    return out, lse, *attention.backward(problem, pattern, dout, dlse, out, lse)[:3]


def on_a_mesh(truths, trials):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    groups = mesh.get_group("inner"), mesh.get_group("outer")
    for name, layout, method in trials:
        found, mine = flat(name, layout) if method is None else hybrid(name, layout, OUTER[method], groups)
        expected = (x[..., mine] if number == 1 else x[:, mine] for number, x in enumerate(truths[name]))
        for what, x, wanted in zip(("out", "lse", "dq", "dk", "dv"), found, expected):
            told = f"{what}, {name} {layout} {method}"
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-12, msg=lambda m: f"{told}: {m}")  # noqa: B023


def shard(name, layout):
    """This rank's rows of a case, what comes back to it, the world of four, and its rows' numbers."""
    given, dout, dlse = whole(*CASES[name][1:])
    rank, at = dist.get_rank(), tuple(Layout(layout, LENGTH, 4).positions(r) for r in range(4))
    mine = positions_tensor(at[rank])
    q, k, v = (x[:, mine] for x in (given.q, given.k, given.v))
    problem = replace(given, q=q, k=k, v=v, query_positions=at[rank], key_positions=at[rank])
    return problem, (dout[:, mine], dlse[..., mine]), World(rank, at, at, dist.group.WORLD), mine


def flat(name, layout):
    pattern = CASES[name][0]
    problem, back, world, mine = shard(name, layout)
    out, lse, kept = heads.forward(problem, pattern, world, "auto")
    return (out, lse, *heads.backward(problem, pattern, world, *back, out, lse, kept, "auto")[:3]), mine


def hybrid(name, layout, between, groups):
    pattern = CASES[name][0]
    problem, back, world, mine = shard(name, layout)
    outer, inner = two_worlds(world, 2, *groups)
    local, part = heads.inside(problem, pattern, inner)
    assert local.query_positions == outer.queries[outer.rank]
    assert between.reasons_against(local, part, outer) == []

    def forward(p, t):
        return between.forward(p, t, outer, "auto")

    def backward(p, t, *rest):
        return between.backward(p, t, outer, *rest, "auto")

    counted = (name, layout) == ("longnet", "zigzag")  # counting takes time
    with ReceivedBytes() if counted else nullcontext() as came:
        out, lse, kept = heads.forward_with(problem, pattern, inner, forward)
    with ReceivedBytes() if counted else nullcontext() as came_back:
        grads = heads.backward_with(problem, pattern, inner, *back, out, lse, kept, backward)
    if counted:
        wire, other = heads.traffic(problem, pattern, inner), between.traffic(local, part, outer)
        assert came.total == wire.forward + other.forward
        of_lse = (local.query_length - problem.query_length) * problem.batch * local.num_heads * lse.element_size()
        if between is not heads:  # which would send the gradient of lse once more
            assert came_back.total == wire.backward + other.backward + of_lse
    return (out, lse, *grads[:3]), mine


def test_a_mesh_of_two_by_two_computes_what_one_computes():
    layouts = {"ring": LAYOUTS, "gather": LAYOUTS, "all_to_all": ("zigzag",)}
    trials = [(name, layout, method) for method in OUTER for name in CASES for layout in layouts[method]]
    trials = [t for t in trials if t[0] != "blocks" or t[2] != "gather"]  # it has no tables of blocks
    trials = [t for t in trials if t[0] in ("causal", "longnet_causal") or t[1] != "striped"]
    trials.append(("longnet", "zigzag", None))  # all four exchange heads, and two share a key-value head
    run_world(4, on_a_mesh, {name: truth(name) for name in CASES}, trials, timeout=60)


def test_the_worlds_of_a_mesh():
    rows = tuple(Layout("zigzag", 48, 6).positions(r) for r in range(6))
    keys = tuple(Layout("contiguous", 60, 6).positions(r) for r in range(6))
    for rank in range(6):
        outer, inner = two_worlds(World(rank, rows, keys), 3)
        assert (outer.rank, outer.size, inner.rank, inner.size) == (rank // 3, 2, rank % 3, 3)
        assert inner.queries[inner.rank] == rows[rank]
        assert inner.keys[inner.rank] == keys[rank]
        for side, expected in ((outer.queries, rows), (outer.keys, keys)):
            for number, held in enumerate(side):
                all_rows = torch.cat([positions_tensor(own) for own in expected[number * 3 : number * 3 + 3]])
                assert torch.equal(positions_tensor(held), all_rows.sort().values)
    with pytest.raises(InvalidInput, match="6 ranks are no mesh of 4 columns"):
        two_worlds(World(0, rows, rows), 4)
