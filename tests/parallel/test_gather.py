"""The gather: what its plans bring, what they compute, what travels, and results equal to one process's."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import (
    BlockSparse,
    Causal,
    Documents,
    Full,
    Pattern,
    Relative,
    Softcap,
    Window,
    attention,
    longnet,
)
from dilated_attention_pytorch.parallel import gather
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.parallel.parcels import gather_plan
from dilated_attention_pytorch.parallel.world import World
from dilated_attention_pytorch.problem import Problem, Run, positions_tensor
from parallel.worlds import run_world

CPU = torch.device("cpu")


def planned(problem, pattern, layout, size, start=0, groups=None):
    """The worlds of all ranks, and each rank's problem, from the whole problem (keys from 0, queries from start)."""
    sides = [Layout(layout, problem.query_length, size, start), Layout(layout, problem.key_length, size)]
    queries, keys = (tuple(side.positions(rank) for rank in range(size)) for side in sides)
    worlds = [World(rank, queries, keys, None if groups is None else groups) for rank in range(size)]
    return worlds, [share(problem, world, start) for world in worlds]


def share(problem, world, start):
    """A rank's rows of the whole problem."""
    rows = positions_tensor(world.queries[world.rank]) - start
    keys = positions_tensor(world.keys[world.rank])
    return replace(
        problem,
        q=problem.q[:, rows],
        k=problem.k[:, keys],
        v=problem.v[:, keys],
        query_positions=world.queries[world.rank],
        key_positions=world.keys[world.rank],
    )


def whole_problem(batch, queries, keys, heads, kv_heads, visible=None, start=0, dim=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(queries + 7 * keys)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    q, k, v = (torch.randn(batch, n, h, dim, generator=g, dtype=dtype) for n, h in shapes)
    return Problem(
        q,
        k,
        v,
        scale=0.5,
        query_positions=(Run(start, 1, queries),),
        key_positions=(Run(0, 1, keys),),
        key_lengths=visible,
        needs_grad=True,
    )


def plan_of(problem, pattern, world):
    return gather_plan(gather._terms(problem, pattern, world), world.rank, world.queries, world.keys, CPU)


def check_plans(problem, pattern, layout, size, start=0):
    """Rows that come are those that some own query sees in the branch and does not hold; pairs are those of counts."""
    batch, heads, group = problem.batch, problem.num_heads, problem.kv_group
    worlds, shares = planned(problem, pattern, layout, size, start)
    truth = pattern.to_mask(heads, problem.query_length, problem.key_length, query_start=start)
    truth = truth.expand(batch, *truth.shape[-3:]).clone()
    if problem.key_lengths is not None:
        truth *= (torch.arange(problem.key_length) < torch.tensor(problem.key_lengths)[:, None])[:, None, None]
    plans = [plan_of(p, pattern, w) for p, w in zip(shares, worlds)]
    for me, (world, plan) in enumerate(zip(worlds, plans)):
        mine, own = positions_tensor(world.queries[me]) - start, positions_tensor(world.keys[me])
        remote = truth[:, :, mine]
        remote[..., own] = 0
        came = []  # (sample, position, kv head) of every wire row
        for source, other in enumerate(plans):
            assert other.send_counts[me] == plan.receive_counts[source]
            sent = torch.stack(other.sent_rows(), 1).split(other.send_counts)[me]
            at = positions_tensor(world.keys[source])
            came += [(b, int(at[row]), head) for b, row, head in sent.tolist()]
        counts = torch.zeros_like(remote)
        used = torch.zeros(len(came), dtype=torch.bool)
        for bundle in plan.bundles:
            seen = bundle.shape.pattern.count(
                0, 1, positions_tensor((bundle.shape.queries,))[:, None], positions_tensor((bundle.shape.keys,))
            )
            rows, keys = bundle.queries.expand(), bundle.keys.expand()
            assert len(keys.unique()) == keys.numel()
            for e in range(len(bundle.samples)):
                b, hs = int(bundle.samples[e]), bundle.heads[e]
                assert all(came[i][0] == b and came[i][2] == int(h) // group for i in keys[e].tolist() for h in hs)
                places = torch.tensor([came[i][1] for i in keys[e].tolist()])
                for h in hs.tolist():
                    counts[b, h, rows[e].view(-1, 1), places] += seen
                used[keys[e]] |= seen.any(0)
        assert torch.equal(counts, remote)
        assert bool(used.all())  # no row comes that nothing sees
        assert len(pattern.branches()) > 1 or len(set(came)) == len(came)  # and none twice
        assert gather.traffic(shares[me], pattern, world).forward == len(came) * 8 * 8
        assert gather.traffic(shares[me], pattern, world).backward == sum(plan.send_counts) * 8 * 8


@st.composite
def closed_forms(draw) -> Pattern:
    branches = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 70), min_size=branches, max_size=branches))
    rates = draw(st.lists(st.integers(1, 7), min_size=branches, max_size=branches))
    heads = draw(st.booleans())
    pattern = draw(st.sampled_from([longnet(lengths, rates, head_groups=heads), longnet(lengths, rates), Full()]))
    if draw(st.booleans()):
        pattern = pattern & Window(draw(st.integers(1, 40)))
    if draw(st.booleans()):
        pattern = pattern & Causal()
    if draw(st.booleans()):
        pattern = Documents(draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))).of(pattern)
    return pattern


@settings(max_examples=40, deadline=None)
@given(
    pattern=closed_forms(),
    layout=st.sampled_from(LAYOUTS),
    size=st.integers(2, 5),
    keys=st.integers(1, 90),
    queries=st.integers(1, 90),
    start=st.integers(0, 20),
    kv_heads=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
)
def test_plans_bring_what_is_seen_and_nothing_else(pattern, layout, size, keys, queries, start, kv_heads, padded):
    visible = (keys, keys * 2 // 3) if padded else None
    problem = whole_problem(2, queries, keys, 4, kv_heads, visible, start)
    check_plans(problem, pattern, layout, size, start)


GIGAPATH = longnet([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16], head_offset="torchscale")


def test_bytes_of_gigapath_are_grid_rows_of_overlapped_segments_less_own():
    length, size, heads, width = 2**20, 8, 16, 2 * 48 * 2  # bytes of a key and a value in bfloat16
    rows = tuple(Layout("contiguous", length, size).positions(rank) for rank in range(size))
    received = []
    for rank, runs in enumerate(rows):
        first, last = runs[0].start, runs[0].start + runs[0].length - 1
        q = torch.empty(1, runs[0].length, heads, 48, device="meta", dtype=torch.bfloat16)
        problem = Problem(q, q, q, scale=1.0, query_positions=runs, key_positions=runs)
        received.append(gather.traffic(problem, GIGAPATH, World(rank, rows, rows)).forward)
        by_hand = 0
        for branch in GIGAPATH.branches():
            w, r = branch.segment_length, branch.dilation_rate
            places = torch.arange(first // w * w, min((last // w + 1) * w, length))
            away = places[(places < first) | (places > last)] % w % r
            heads_at = torch.bincount(torch.tensor([branch.offset(h, heads) for h in range(heads)]), minlength=r)
            by_hand += int(heads_at[away].sum()) * width
        assert received[rank] == by_hand
    # branches longer than a shard alone bring 197 to 268 MB, 238 on average
    assert (min(received), max(received)) == pytest.approx((197e6, 268e6), rel=0.05)
    assert sum(received) / size == pytest.approx(238e6, rel=0.05)


def test_bytes_of_a_thousand_ranks_are_counted_without_visiting_tokens():
    length, size = 10**9, 1024
    rows = tuple(Layout("zigzag", length, size).positions(rank) for rank in range(size))
    q = torch.empty(1, sum(run.length for run in rows[500]), 12, 64, device="meta", dtype=torch.bfloat16)
    problem = Problem(q, q, q, scale=1.0, query_positions=rows[500], key_positions=rows[500])
    world = World(500, rows, rows)
    one, far = gather.traffic(problem, longnet([2048], [1]), world), gather.traffic(problem, Full(), world)
    assert far.forward == (length - q.shape[1]) * 12 * 64 * 2 * 2
    assert far.backward == q.shape[1] * (size - 1) * 12 * 64 * 2 * 4
    # each of its two chunks shares the segments at its borders with a neighbour
    assert 0 < one.forward <= 4 * 2047 * 12 * 64 * 2 * 2
    assert gather.traffic(problem, longnet([2048], [1]) & Causal(), world).forward < one.forward


def test_windows_with_gaps_between_them_bring_no_row_of_the_gaps():
    problem = whole_problem(1, 80, 80, 2, 2)
    for pattern in (Window(2), Window(3) & Causal(), longnet([40], [2]) & Window(3)):
        check_plans(problem, pattern, "striped", 8)


@pytest.mark.parametrize("pattern", [Window(25), Window(9) & Causal(), longnet([50], [3]) & Window(30)])
def test_windows_of_two_chunks_that_overlap_bring_a_row_once(pattern):
    check_plans(whole_problem(1, 60, 60, 4, 2), pattern, "zigzag", 3)


def test_many_equal_segments_are_one_bundle():
    problem = whole_problem(1, 960, 960, 2, 2)
    worlds, shares = planned(problem, longnet([16], [2]), "striped", 4)
    bundles = plan_of(shares[1], longnet([16], [2]), worlds[1]).bundles
    assert [len(bundle.samples) for bundle in bundles] == [60]


def test_a_plan_is_made_once():
    problem = whole_problem(1, 60, 60, 2, 2)
    worlds, shares = planned(problem, Documents([20, 40]).of(Causal()), "zigzag", 2)
    plans = [plan_of(shares[0], Documents([20, 40]).of(Causal()), worlds[0]) for _ in range(2)]
    assert plans[0] is plans[1]


@pytest.mark.parametrize(("size", "halved"), [(2, False), (8, True)])
@pytest.mark.parametrize("pattern", [Full(), Causal(), longnet([80], [2])])
def test_no_softmax_sums_more_than_half_of_what_it_sees(pattern, size, halved):
    problem, most = whole_problem(1, 80, 80, 2, 2), 40 // pattern.branches()[0].dilation_rate
    worlds, shares = planned(problem, pattern, "contiguous", size)
    found = []
    for world, p in zip(worlds, shares):
        plan = plan_of(p, pattern, world)
        came = torch.arange(sum(plan.receive_counts) * 8.0).view(-1, 8)
        for bundle in plan.bundles:
            rows = gather._Rows(bundle, p)
            parts = list(rows.parts(came))
            assert torch.equal(torch.cat([rows.keys[:, keys] for _, keys in parts], 1), bundle.keys.expand())
            for part, keys in parts:
                assert torch.equal(torch.cat((part.k, part.v), -1)[:, :, 0], came[rows.keys[:, keys]])
                assert torch.equal(part.q, p.q[rows.queries])
                assert part.key_length <= most
            found.append(len(parts))
    assert set(found) == ({1} if not halved else {2} if pattern != Causal() else {1, 2})


def test_reasons():
    problem = whole_problem(1, 30, 30, 2, 2)
    worlds, shares = planned(problem, Full(), "contiguous", 2)

    def reasons(pattern=None, **change):
        pattern = Full() if pattern is None else pattern
        return gather.reasons_against(replace(shares[0], **change), pattern, worlds[0])

    assert reasons() == [] == reasons(score=Softcap(2.0))
    blocks = BlockSparse(10, torch.ones(2, 3, 3, dtype=torch.bool))
    assert ["closed form" in r for r in reasons(blocks)] == [True]
    unknown = Documents(torch.empty(2, dtype=torch.int64, device="meta")).of(Causal())
    assert ["meta device" in r for r in reasons(unknown)] == [True]
    assert ["read positions" in r for r in reasons(score=Relative(slopes=torch.ones(2)))] == [True]
    assert ["dropout" in r for r in reasons(dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int64))] == [True]
    assert ["bias" in r for r in reasons(bias=torch.zeros(1))] == [True]
    scattered = replace(worlds[0], queries=(tuple(Run(3 * i, 1, 1) for i in range(1025)), ()))
    assert ["runs" in r for r in gather.reasons_against(shares[0], Full(), scattered)] == [True]


@dataclass(frozen=True)
class Asked:
    """A problem for a whole world."""

    pattern: Pattern
    layout: str = "contiguous"
    queries: int = 53
    keys: int = 53
    kv_heads: int = 2
    visible: tuple | None = None
    start: int = 0
    score: Softcap | None = None
    dtype: torch.dtype = torch.float64
    dlse: bool = True

    def problem(self):
        p = whole_problem(2, self.queries, self.keys, 4, self.kv_heads, self.visible, self.start, 8, self.dtype)
        return replace(p, score=self.score)

    def gradients(self):
        g = torch.Generator().manual_seed(4)
        dout = torch.randn(2, self.queries, 4, 8, generator=g, dtype=torch.float64).to(self.dtype)
        return dout, torch.randn(2, 4, self.queries, generator=g, dtype=torch.float64) if self.dlse else None


PAPER = longnet([8, 20, 64], [1, 2, 4])
ASKED = (
    *(Asked(pattern, layout) for layout in LAYOUTS for pattern in (PAPER, PAPER & Causal(), Causal(), Window(7))),
    *(Asked(PAPER & Causal(), layout, visible=(53, 20), dlse=False) for layout in LAYOUTS),
    *(Asked(Documents([[13, 0, 30], [53, 0, 0]]).of(PAPER & Causal()), layout) for layout in LAYOUTS),
    *(Asked(PAPER & Window(9) & Causal(), layout, queries=30, start=17, kv_heads=1) for layout in LAYOUTS),
    Asked(longnet([16, 32, 64], [1, 2, 3], head_groups=True), "zigzag", kv_heads=4, score=Softcap(0.9)),
    Asked(PAPER & Causal(), "zigzag", queries=2, keys=2),
    Asked(Full(), "zigzag", queries=1, keys=40, start=39),
    Asked(PAPER, visible=(0, 30)),
    Asked(PAPER & Causal(), "zigzag", dtype=torch.bfloat16),
)


def gathered(asked):
    """What a rank computes: results with their rows, and the bytes that the group brought and `traffic` said."""
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for case in asked:
        problem = case.problem()
        worlds, shares = planned(problem, case.pattern, case.layout, size, case.start, dist.group.WORLD)
        world, mine = worlds[rank], shares[rank]
        assert gather.reasons_against(mine, case.pattern, world) == []
        rows = positions_tensor(world.queries[rank]) - case.start
        dout, dlse = case.gradients()
        dout, dlse = dout[:, rows], None if dlse is None else dlse[..., rows].to(mine.accumulate_dtype)
        with bytes_received() as carried:
            out, lse, kept = gather.forward(mine, case.pattern, world, "auto")
            forward = carried.pop()
            grads = gather.backward(mine, case.pattern, world, dout, dlse, out, lse, kept, "auto")
        results.append(
            (out, lse, grads.q, grads.k, grads.v, gather.traffic(mine, case.pattern, world), forward, carried)
        )
    return results


@contextmanager
def bytes_received():
    """A list that grows by the bytes of others in what each all-to-all brings, as the group is asked for it."""
    found, rank, send = [], dist.get_rank(), dist.all_to_all_single

    def counting(output, rows, receive_counts, send_counts, **options):
        others = sum(receive_counts) - receive_counts[rank]
        found.append(others * output[:1].numel() * output.element_size() if others else 0)
        return send(output, rows, receive_counts, send_counts, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        yield found


@pytest.mark.parametrize("size", [2, 3])
def test_results_are_those_of_one_process_and_bytes_those_counted(size):
    ends = run_world(size, gathered, ASKED)
    for number, case in enumerate(ASKED):
        problem, (dout, dlse) = case.problem(), case.gradients()
        exact = replace(problem, **{name: getattr(problem, name).double() for name in "qkv"})
        out, lse = attention.forward(exact, case.pattern)
        grads = attention.backward(exact, case.pattern, dout.double(), dlse, out, lse)
        truth = (out, lse.transpose(1, 2), *grads[:3])
        worlds, _ = planned(problem, case.pattern, case.layout, size, case.start)
        sides = [[positions_tensor(side) for side in of] for of in (worlds[0].queries, worlds[0].keys)]
        for x, (name, expected) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), truth)):
            rows = torch.cat(sides[0]) - case.start if x < 3 else torch.cat(sides[1])
            parts = [end[number][x].transpose(1, 2) if name == "lse" else end[number][x] for end in ends]
            got = torch.cat(parts, 1)
            assert got.dtype == problem.accumulate_dtype
            expected = expected[:, rows]
            unseen = torch.isinf(expected)
            assert torch.equal(unseen, torch.isinf(got)), (case, name)
            scale = max(expected.masked_fill(unseen, 0).abs().max(), dout.abs().max())
            error = (got.double() - expected).masked_fill(unseen, 0).abs().max() / scale
            assert error <= (1e-12 if case.dtype == torch.float64 else 1e-6), (case, name, error)
        for end in ends:
            traffic, forward, backward = end[number][5:]
            assert (traffic.forward, [traffic.backward]) == (forward, backward), case


def test_a_world_of_one_is_local():
    case = Asked(PAPER & Causal())
    problem = case.problem()
    world = World(0, (problem.query_positions,), (problem.key_positions,))
    out, lse, kept = gather.forward(problem, case.pattern, world)
    expected = attention.forward(problem, case.pattern)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    dout, dlse = case.gradients()
    grads = gather.backward(problem, case.pattern, world, dout, dlse, out, lse, kept)
    for got, want in zip(grads, attention.backward(problem, case.pattern, dout, dlse, *expected)):
        assert got is None if want is None else torch.equal(got, want)
    assert gather.traffic(problem, case.pattern, world).total == 0
