"""The ring sends what is needed, writes no buffer that is read, and its shares stay unrounded."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import Causal, Full, Softcap, Window, attend, longnet
from dilated_attention_pytorch.parallel import Layout, ring, wire
from dilated_attention_pytorch.parallel.runs import partial_backward, partial_forward
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.problem import Problem, Run, make_problem, positions_tensor
from parallel.worlds import run_world

LENGTH = 48


def world(layout="contiguous", length=LENGTH):
    size = dist.get_world_size()
    rows = tuple(Layout(layout, length, size).positions(rank) for rank in range(size))
    return World(dist.get_rank(), rows, rows, dist.group.WORLD)


def problem_of(here, dtype=torch.float64, heads=2):
    rows = positions_tensor(here.queries[here.rank])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, LENGTH, heads, 8, dtype=torch.float64)[:, rows].to(dtype) for _ in range(3))
    return Problem(q, k, v, 0.3, here.queries[here.rank], here.keys[here.rank])


def places(messages):
    """Where the memory of messages begins."""
    return {x.untyped_storage().data_ptr() for _, x in messages if x.numel() > 0}


def _received(pattern, layout):
    """Bytes that came to this rank forward and backward, what `traffic` says, and whether a buffer in use was hit."""
    here, came, last, hit = world(layout), [], [], []

    def counted(group, sends, receives):
        came.append(sum(x.numel() * x.element_size() for _, x in receives))
        hit.extend(places(receives) & places([*sends, *last]))  # what came last is computed with meanwhile
        last[:] = receives or last  # and stays alive, so that its place is not given away
        return wire.start_exchange(group, sends, receives)

    ring.start_exchange = counted
    p = problem_of(here)
    out, lse, kept = ring.forward(p, pattern, here)
    forward = sum(came)
    ring.backward(p, pattern, here, torch.ones_like(out), None, out, lse, kept)
    return (forward, sum(came) - forward), tuple(ring.traffic(p, pattern, here)), hit


PATTERNS = {"full": Full(), "causal": Causal(), "window": Window(4) & Causal(), "short": longnet([4, 8], [1, 2])}


def _all_received():
    return {
        (name, layout): _received(PATTERNS[name], layout) for name in PATTERNS for layout in ("contiguous", "zigzag")
    }


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_that_come_are_those_that_are_told(size):
    told = run_world(size, _all_received)
    for rank in told:
        for name, (found, expected, hit) in rank.items():
            assert found == expected, name
            assert not hit, name
    shard, row = LENGTH // size, 2 * 2 * 16 * 8  # rows of a shard, bytes of k and v of one
    rows = {"full": [shard * (size - 1)] * size, "causal": [shard * rank for rank in range(size)]}
    rows |= {"window": [0] + [3] * (size - 1), "short": [0] * size}
    for name, counts in rows.items():
        assert [rank[name, "contiguous"][0][0] for rank in told] == [row * n for n in counts], name
    chunk = shard // 2  # of zigzag shards a rank sees the low chunk of those before it, and both of those behind it
    expected = [chunk * (rank + 2 * (size - 1 - rank)) for rank in range(size)]
    assert [rank["causal", "zigzag"][0][0] for rank in told] == [row * n for n in expected]


def rows_and_truth(pattern, dtype=torch.float64, layout="zigzag", **options):
    """A problem of shard 1 of 3 over all keys, in any runs, and what attention over the whole gives for its rows."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, 2, 8, dtype=torch.float64).to(dtype) for _ in range(3))
    mine = Layout(layout, LENGTH, 3).positions(1)
    keys = Layout(layout, LENGTH, 1).positions(0)
    rows = positions_tensor(mine)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*wide, pattern, scale=0.3, backend="dense", return_lse=True, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    hidden = torch.ones(LENGTH, dtype=torch.bool).index_fill(0, rows, False)
    dout, dlse = dout.masked_fill(hidden[None, :, None, None], 0), dlse.masked_fill(hidden, 0)
    grads = torch.autograd.grad((out, lse), wide, (dout, dlse))
    p = Problem(q[:, rows], k, v, 0.3, mine, keys, **options)
    return p, rows, (out.detach()[:, rows], lse.detach()[:, :, rows]), (dout[:, rows], dlse[:, :, rows]), grads


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (Full(), {}),
        (Causal(), {}),
        (Window(9), {}),
        (Window(9) & Causal(), {}),
        (longnet([8, 24], [1, 2]) & Causal(), {}),
        (Causal(), {"score": Softcap(2.0)}),
    ],
    ids=["full", "causal", "window", "causal_window", "longnet", "softcap"],
)
def test_rows_in_several_runs(pattern, options, layout):
    p, rows, truth, (dout, dlse), (dq, dk, dv) = rows_and_truth(pattern, layout=layout, **options)
    for found, expected in zip(partial_forward(p, pattern), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    grads = partial_backward(p, pattern, dout, dlse, *truth)
    for found, expected in zip(grads[:3], (dq[:, rows], dk, dv), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_equal_steps_are_closed_up_where_only_order_counts():
    """Rows 1, 4, 7, ... over keys 2, 5, 8, ... of a causal pattern: no query sees the key of its own number."""
    x = torch.zeros(1, 5, 1, 8, dtype=torch.float64)
    p = Problem(x, x, x, 0.3, (Run(1, 3, 5),), (Run(2, 3, 5),))
    _, lse = partial_forward(p, Causal())
    assert lse.exp().round().flatten().tolist() == [0, 1, 2, 3, 4]
    _, lse = partial_forward(Problem(x, x, x, 0.3, (Run(2, 3, 5),), (Run(1, 3, 5),)), Causal() & Window(6))
    assert lse.exp().round().flatten().tolist() == [1, 2, 2, 2, 2]  # 1 and 4 back


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(5) & Causal(), Window(4)], ids=str)
def test_runs_that_lie_between_each_other(pattern):
    """0, 2, 4 and 6, 8 go on as one run, but 1, 3, 5 stand between them in the shard."""
    torch.manual_seed(0)
    runs = (Run(0, 2, 3), Run(1, 2, 3), Run(6, 2, 2))
    rows = positions_tensor(runs)
    q, k, v = (torch.randn(1, 10, 2, 8, dtype=torch.float64) for _ in range(3))
    hidden = torch.ones(10, dtype=torch.bool).index_fill(0, rows, False)
    bias = torch.zeros(10, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    out, lse = attend(q, k, v, pattern, scale=0.3, bias=bias, return_lse=True)
    p = Problem(q, k[:, rows], v[:, rows], 0.3, (Run(0, 1, 10),), runs)
    for found, expected in zip(partial_forward(p, pattern), (out, lse), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    own = replace(p, q=q[:, rows], query_positions=runs)  # a rank's queries and keys stand alike
    for found, expected in zip(partial_forward(own, pattern), (out[:, rows], lse[:, :, rows]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_shares_of_half_types_are_not_rounded():
    p, rows, truth, (dout, dlse), (dq, _, _) = rows_and_truth(Causal(), torch.bfloat16)
    out, lse = partial_forward(p, Causal())
    assert lse.dtype == torch.float64  # until all steps are merged
    dout = dout.bfloat16()
    grads = partial_backward(p, Causal(), dout, dlse.float(), out, lse)
    exact = partial_backward(
        Problem(p.q.double(), p.k.double(), p.v.double(), 0.3, p.query_positions, p.key_positions),
        Causal(),
        dout.double(),
        dlse,
        *truth,
    )
    torch.testing.assert_close(exact.q, dq[:, rows], rtol=0, atol=0.1)  # but for the rounding of dout
    for found, expected in zip((out, *grads[:3]), (truth[0], *exact[:3]), strict=True):
        assert found.dtype == torch.float32
        rounded = (expected.bfloat16() - expected).abs().max()
        assert (found - expected).abs().max() < rounded / 4


def test_a_problem_without_rows_or_keys():
    q, k = torch.ones(1, 0, 2, 8), torch.ones(1, 4, 2, 8)
    nothing = make_problem(q, k, k, scale=1.0, query_start=0)
    out, lse = partial_forward(nothing, Full())
    assert (out.shape, lse.shape) == ((1, 0, 2, 8), (1, 2, 0))
    no_keys = make_problem(k, q, q, scale=1.0, query_start=0)
    out, lse = partial_forward(no_keys, Full())
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    grads = partial_backward(no_keys, Full(), out, None, out, lse)
    assert grads.k.shape == q.shape
    assert bool((grads.q == 0).all())
