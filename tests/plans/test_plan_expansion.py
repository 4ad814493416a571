"""Law 7 on long sequences: a plan expanded without any kernel gives exactly the pattern's counts."""

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.plans import DensePlan, StridedPlan, TilePlan, candidate_plans, pieces, planner
from dilated_attention_pytorch.problem import Run, make_problem
from dilated_attention_pytorch.testing.contract import check_plans, part_of

PAPER = longnet([64, 128, 256], [1, 2, 4])


def problem_of(n, *, nq=None, start=None, heads=2, batch=1, visible=None):
    nq = n if nq is None else nq
    x = torch.zeros(batch, n, 1, 1)
    mask = None if visible is None else torch.arange(n) >= torch.tensor(visible)[:, None]
    start = n - nq if start is None else start
    q = torch.zeros(batch, nq, heads, 1)
    return make_problem(q, x, x, scale=1.0, query_start=start, key_padding_mask=mask)


def strided(pattern, problem):
    plan = planner.strided_plan(pattern, problem)
    assert isinstance(plan, StridedPlan)
    return plan


LONG = {
    "longnet": PAPER,
    "longnet_causal": PAPER & Causal(),
    "not_nesting": longnet([60, 100, 90], [1, 3, 2]) & Causal(),
    "window": Window(70),
    "window_causal": Window(70) & Causal(),
    "window_narrow": Window(2),
    "window_wide": Window(600) & Causal(),
    "longnet_window": longnet([512], [2]) & Window(40) & Causal(),
    "dilated_wide_window": longnet([2048], [3]) & Window(200),
    "documents": Documents([300, 0, 1, 511, 200]).of(PAPER & Causal()),
    "documents_window": Documents([1000, 12]).of(Window(33)),
    "mixed": PAPER + Window(16) + Causal(),
}
PLACES = {
    "whole": {},
    "padded": {"batch": 3, "visible": (1100, 517, 1)},
    "queries_last": {"nq": 130},
    "queries_between": {"nq": 300, "start": 257},
    "decode": {"nq": 1},
    "past_the_keys": {"nq": 70, "start": 1065},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LONG)
def test_long_sequences(name, place):
    problem = problem_of(1100, **PLACES[place])
    strided(LONG[name], problem)
    check_plans(candidate_plans(LONG[name], problem, tiles=True), problem, LONG[name], name)


@pytest.mark.parametrize("rows", [(1, 4), (16, 16), (128, 512)])
@pytest.mark.parametrize("size", [1, 3, 16, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_fold_equal_blocks(monkeypatch, rows, size, causal):
    monkeypatch.setattr(pieces, "WINDOW_ROWS", rows)
    pattern = Window(size) & Causal() if causal else Window(size)
    for n, nq, start in ((700, 700, 0), (700, 290, 301), (333, 400, 20)):
        problem = problem_of(n, nq=nq, start=start)
        plan = planner.strided_plan(pattern, problem)
        assert torch.equal(plan.expand(problem), DensePlan(pattern).expand(problem))
        assert plan.issued_pairs(problem) == int(plan.expand(problem).sum())


def test_folds_keep_long_windows_short():
    problem = problem_of(100_000)
    plan = strided(Window(128) & Causal(), problem)
    assert sum(len(c.pieces) for c in plan.chunks) < 20
    inner = max(plan.chunks[0].pieces, key=lambda p: p.segments)
    assert inner.segments > 100
    assert plan.issued_pairs(problem) == 2 * (128 * 100_000 - 127 * 128 // 2)


@pytest.mark.parametrize("limit", [1, 100, 256, 8192])
def test_chunks_of_any_size(monkeypatch, limit):
    monkeypatch.setattr(planner, "CHUNK_ROWS", limit)
    for pattern in (PAPER & Causal(), longnet([60, 100], [1, 3]), Documents([500, 200]).of(PAPER)):
        problem = problem_of(1000, batch=2, visible=(1000, 611))
        plan = planner.strided_plan(pattern, problem)
        assert torch.equal(plan.expand(problem), DensePlan(pattern).expand(problem))


@pytest.mark.parametrize("name", LONG)
def test_key_and_query_shards(name):
    whole = problem_of(1100)
    total = torch.zeros(1, 2, 1100, 1100, dtype=torch.int64)
    for rows in (slice(0, 401), slice(401, 1100)):
        for columns in (slice(0, 77), slice(77, 640), slice(640, 1100)):
            part = part_of(whole, rows, columns)
            total[:, :, rows, columns] = strided(LONG[name], part).expand(part)
    assert torch.equal(total, DensePlan(LONG[name]).expand(whole))


def test_positions_that_are_no_single_run_have_no_strided_plan():
    problem = problem_of(12)
    for rows, columns in ((slice(0, 12, 2), slice(None)), (slice(None), slice(1, 12, 3))):
        part = part_of(problem, rows, columns)
        plans = candidate_plans(Causal(), part)
        assert {type(plan) for plan in plans} == {DensePlan, TilePlan}
        check_plans(plans, part, Causal(), "striped")


def every_row_once(plan, problem):
    rows = torch.zeros(problem.batch, problem.num_heads, problem.query_length, dtype=torch.int64)
    for c in plan.chunks:
        rows[slice(*c.samples), c.heads.part(0, c.heads.size), slice(*c.queries)] += 1
    return bool((rows == 1).all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LONG)
def test_chunks_hold_every_row_once_and_pieces_every_promise(name, place):
    problem = problem_of(1100, **PLACES[place])
    plan = strided(LONG[name], problem)
    assert every_row_once(plan, problem)
    for c in plan.chunks:
        n, m = c.queries[1] - c.queries[0], c.keys[1] - c.keys[0]
        rows, keys = torch.zeros(n, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
        written, written_keys = rows.clone(), keys.clone()
        for p in c.pieces:
            assert p.segments >= 1
            assert p.queries.length >= 1
            assert p.keys.length >= 1
            assert not p.is_causal or (p.queries.length == p.keys.length and p.band is None)
            if p.band is not None:
                assert bool(p.band.visible(p.queries.length, p.keys.length).any(1).all()), "a row without a key"
            fresh, fresh_keys = True, True
            for s in p.queries.slices(p.segments):
                assert 0 <= s.start < s.stop <= n
                fresh &= bool((rows[s] == 0).all())
            for s in p.keys.slices(p.segments):
                assert 0 <= s.start < s.stop <= m
                fresh_keys &= bool((keys[s] == 0).all())
            assert p.fresh <= fresh
            assert p.fresh_keys <= fresh_keys
            own = keys.clone().zero_()
            for s in p.queries.slices(p.segments):
                rows[s] += 1
                written[s] += p.fresh
            for s in p.keys.slices(p.segments):
                own[s] += 1
                keys[s] += 1
                written_keys[s] += p.fresh_keys
            assert int(own.max()) == 1, "segments of a piece share key rows, so gradients would race"
        assert c.complete <= bool((written > 0).all())
        assert c.complete_keys <= bool((written_keys > 0).all())


def test_a_run_far_away_is_planned_by_arithmetic():
    far = 2**40
    x = torch.zeros(1, 100, 2, 1)
    problem = make_problem(x, x, x, scale=1.0, query_start=0)
    problem = replace(problem, query_positions=(Run(far, 1, 100),), key_positions=(Run(far, 1, 100),))
    for pattern in (PAPER & Causal(), Window(5)):
        plan = strided(pattern, problem)
        assert torch.equal(plan.expand(problem), DensePlan(pattern).expand(problem))


def test_plans_describe_themselves():
    problem = problem_of(1100)
    dense, plan = DensePlan(PAPER), strided(PAPER, problem)
    assert "chunks" in plan.describe(problem)
    assert "1100 x 1100" in dense.describe(problem)
    assert dense.issued_pairs(problem) == 2 * 1100 * 1100
    assert strided(Full(), problem).issued_pairs(problem) == 2 * 1100 * 1100
