"""Ways to call context-parallel attention: groups and meshes, parts of the gradient, views, known lengths, orders."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dilated_attention_pytorch import Causal, Full, InvalidInput, attend, hilbert_order, longnet
from dilated_attention_pytorch.parallel import (
    ContextParallel,
    context_parallel_attend,
    shard_sequence,
    unshard_sequence,
)
from parallel.world_contract import LAYOUTS, METHODS, Trial, ask, attempt, cases, errors, rows_of, shards
from parallel.worlds import run_world

PAPER = longnet([8, 16, 32], [1, 2, 4]) & Causal()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def _in_a_part_of_the_world(asked):
    """The last two of three ranks are a group, the outer two a mesh: their numbers there are not those in the world."""
    group, outer = dist.new_group([1, 2]), dist.new_group([0, 2])
    told = []
    for part, members in ((group, (1, 2)), (outer, (0, 2))):
        if dist.get_rank() in members:
            for method in METHODS:
                trial = Trial("longnet_causal", "zigzag", method)
                told.append(max(errors(asked, "zigzag", attempt(asked, trial, group=part), part).values()))
        else:
            with pytest.raises(InvalidInput, match="not in the group"):
                context_parallel_attend(*shards(asked, "zigzag")[0], asked.case.pattern, group=part)
    mesh = init_device_mesh("cpu", (3,))
    told.append(max(errors(asked, "zigzag", attempt(asked, Trial("longnet_causal", "zigzag"), mesh)).values()))
    return told


def test_a_group_may_be_a_part_of_the_world():
    told = run_world(3, _in_a_part_of_the_world, ask(cases(6)["longnet_causal"]))
    assert [len(errors_of_rank) for errors_of_rank in told] == [5, 5, 9]
    assert max(map(max, told)) < 1e-12


def _parts_of_the_gradient(asked, method):
    """What autograd gives for some inputs, for out or lse alone, and a second time, beside what it gives for all."""
    (q, k, v), _ = shards(asked, "striped")
    mine = rows_of("striped", asked.q.shape[1], dist.get_rank(), dist.get_world_size())
    dout, dlse = asked.dout[:, mine], asked.dlse[..., mine]

    def call(*inputs):
        return context_parallel_attend(*inputs, PAPER, layout="striped", method=method, return_lse=True)

    out, lse = call(q, k, v)
    by_out = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    by_lse = torch.autograd.grad(lse, (q, k, v), dlse, retain_graph=True)
    both = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    for x, y, z in zip(by_out, by_lse, both):
        close(x + y, z)
    assert bool((by_lse[2] == 0).all())
    for number in range(3):
        some = [x.detach() for x in (q, k, v)]
        some[number].requires_grad_()
        close(torch.autograd.grad(call(*some), some[number], (dout, dlse))[0], both[number])
    with torch.no_grad():
        silent = call(q, k, v)
    assert not silent[0].requires_grad
    assert torch.equal(silent[0], out)
    assert torch.equal(silent[1], lse)
    return errors(asked, "striped", dict(zip(("dq", "dk", "dv"), both)))


@pytest.mark.parametrize("method", METHODS[:3])
def test_parts_of_the_gradient(method):
    for told in run_world(2, _parts_of_the_gradient, ask(cases(6)["longnet_causal"]), method):
        assert max(told.values()) < 1e-12


def _views_and_known_lengths(asked):
    rank, size = dist.get_rank(), dist.get_world_size()
    pattern, length = asked.case.pattern, asked.q.shape[1]
    for method in METHODS:
        for layout in LAYOUTS:
            (q, k, v), _ = shards(asked, layout)
            options = {"layout": layout, "method": method}
            expected = context_parallel_attend(q, k, v, pattern, **options)
            close(context_parallel_attend(q, k, v, pattern, total_length=length, **options), expected)
            heads_first = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
            close(context_parallel_attend(*heads_first, pattern, **options), expected)
            fused = torch.stack((q, k, v), 2).detach().unbind(2)
            close(context_parallel_attend(*fused, pattern, **options), expected)
        whole = (x[:, rank::size] for x in (asked.q, asked.k, asked.v))
        close(context_parallel_attend(*whole, pattern, layout="striped", method=method), expected)
    queries = [x[:, :0] for x in (asked.q, asked.k, asked.v)]
    empty = context_parallel_attend(*queries, pattern, total_length=0)
    assert empty.shape == (2, 0, 6, 8)
    with pytest.raises(InvalidInput, match=rf"rank {rank} of 2 holds \d+ of {length + 2} rows of q"):
        context_parallel_attend(q, k, v, pattern, total_length=length + 2)
    fewer = rows_of("contiguous", 9, rank, size) + length - 9
    some = context_parallel_attend(
        asked.q[:, fewer], *(x.tensor_split(size, 1)[rank] for x in (asked.k, asked.v)), pattern, method="ring",
        total_length=9, total_key_length=length,
    )  # fmt: skip
    close(some, attend(asked.q[:, -9:], asked.k, asked.v, pattern).tensor_split(size, 1)[rank])


def test_views_and_known_lengths():
    run_world(2, _views_and_known_lengths, ask(cases(6)["longnet_causal"]))


def _in_hilberts_order(x, expected, gradient):
    order = hilbert_order((7, 8))
    context = ContextParallel(layout="zigzag")
    x = x.clone().requires_grad_()
    mine = shard_sequence(order.apply(x, 1), layout="zigzag")
    out = context.attend(mine, mine, mine, PAPER)
    out = order.undo(unshard_sequence(out, layout="zigzag"), 1)
    close(out, expected)
    out.square().sum().backward()
    close(x.grad, gradient)
    places = context.positions(56)
    assert torch.equal(places, rows_of("zigzag", 56, dist.get_rank(), dist.get_world_size()))
    assert torch.equal(context.unshard(context.shard(x.detach())), x)


@pytest.mark.parametrize("size", [2, 3])
def test_an_order_goes_before_the_cut(size):
    order = hilbert_order((7, 8))
    x = torch.randn(2, 56, 6, 8, dtype=torch.float64, requires_grad=True)
    moved = order.apply(x, 1)
    out = order.undo(attend(moved, moved, moved, PAPER), 1)
    out.square().sum().backward()
    run_world(size, _in_hilberts_order, x.detach(), out.detach(), x.grad)


def _under_autocast(x):
    mine = shard_sequence(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = context_parallel_attend(mine, mine, mine, Full(), return_lse=True)
    return out, lse


def test_autocast_is_that_of_attend():
    x = torch.randn(1, 30, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = attend(x, x, x, Full(), return_lse=True)
    out, lse = (torch.cat(parts, dim) for dim, parts in zip((1, 2), zip(*run_world(2, _under_autocast, x))))
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected[0], rtol=0, atol=8e-3)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-5)


def _losses_that_read_different_results(asked, method):
    """Rank 0's loss reads out and lse, rank 1's reads out and rank 2's lse only."""
    leaves, _ = shards(asked, "zigzag")
    rank, mine = dist.get_rank(), rows_of("zigzag", asked.q.shape[1], dist.get_rank(), 3)
    out, lse = context_parallel_attend(*leaves, PAPER, layout="zigzag", method=method, return_lse=True)
    loss = (out * asked.dout[:, mine]).sum() if rank < 2 else 0
    if rank != 1:
        loss = loss + (lse * asked.dlse[..., mine]).sum()
    return errors(asked, "zigzag", dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves))))


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_loss_may_read_out_here_and_lse_there(method):
    whole = ask(cases(6)["longnet_causal"])
    dout, dlse = whole.dout.clone(), whole.dlse.clone()
    dout[:, rows_of("zigzag", 53, 2, 3)] = 0
    dlse[..., rows_of("zigzag", 53, 1, 3)] = 0
    leaves = [x.clone().requires_grad_() for x in (whole.q, whole.k, whole.v)]
    grads = torch.autograd.grad(attend(*leaves, PAPER, return_lse=True), leaves, (dout, dlse))
    whole = replace(whole, truth=dict(zip(("dq", "dk", "dv"), grads)))
    for told in run_world(3, _losses_that_read_different_results, whole, method):
        assert max(told.values()) < 1e-12
