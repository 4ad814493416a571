"""Pairs counted by arithmetic on runs are those of the dense counts, and stay exact far past 2^63."""

import random
from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, Documents, Full, Window, longnet
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.plans import DensePlan
from dilated_attention_pytorch.plans.pairs import closed_form_pairs
from dilated_attention_pytorch.problem import Run, make_problem, positions_tensor
from dilated_attention_pytorch.testing.cases import CASES, random_case


def drawn(problem, pattern, queries):
    """The pairs of queries at these positions, from all counts."""
    rows = len(positions_tensor(queries))
    q = problem.q.new_empty(1).expand(problem.batch, rows, problem.num_heads, 1)
    return int(DensePlan(pattern).expand(replace(problem, q=q, query_positions=queries)).sum())


def on_meta(length, heads=1):
    x = torch.empty(1, device="meta").expand(1, length, heads, 8)
    return make_problem(x, x, x, scale=1.0, query_start=0)


def test_equal_to_dense_counts_for_every_way_to_deal_rows():
    source = random.Random(8)
    cases = [c for c in CASES if c.batch * c.query_length < 200] + [random_case(source) for _ in range(150)]
    checked = 0
    for case in cases:
        problem = case.problem(torch.float32)
        whole = closed_form_pairs(case.pattern, problem)
        if case.pattern.branches() is None:
            assert whole is None
            continue
        assert whole == [drawn(problem, case.pattern, problem.query_positions)], case
        layout = Layout(source.choice(LAYOUTS), problem.query_length, source.randint(1, 9), source.randint(0, 20))
        sets = [layout.positions(r) for r in range(layout.world)]
        sets.append((Run(source.randint(0, 9), source.randint(1, 9), 7), Run(30, 3, 7), Run(5, 2, 0)))
        assert closed_form_pairs(case.pattern, problem, sets) == [drawn(problem, case.pattern, s) for s in sets], case
        checked += 1
    assert checked > 200


def test_keys_may_stand_in_runs_of_step_one_only():
    x = torch.zeros(1, 10, 2, 4)
    problem = make_problem(x, x, x, scale=1.0, query_start=0)
    apart = replace(problem, key_positions=(Run(0, 1, 4), Run(20, 1, 6)), query_positions=(Run(12, 1, 10),))
    pattern = Window(9) & Causal()
    assert closed_form_pairs(pattern, apart) == [drawn(apart, pattern, apart.query_positions)]
    assert closed_form_pairs(pattern, replace(problem, key_positions=(Run(0, 2, 10),))) is None


@pytest.mark.parametrize("length", [10**9, 2**33 + 5])
def test_exact_where_products_pass_two_to_the_63(length):
    problem = on_meta(length, 12)
    assert closed_form_pairs(Full(), problem) == [12 * length**2]
    assert closed_form_pairs(Causal(), problem) == [12 * length * (length + 1) // 2]
    halves = [Layout("striped", length, 2).positions(r) for r in range(2)]
    even = -(-length // 2)  # rows 0, 2, 4, ... see 1, 3, 5, ... keys
    assert closed_form_pairs(Causal(), problem, halves) == [12 * even**2, 12 * (length - even) * (length - even + 1)]
    w, r = 1 << 20, 512
    whole, rest = divmod(length, w)
    sizes = [(w // r, whole)] + [(len(range(h, rest, r)), 1) for h in range(12)]
    expected = 12 * whole * (w // r) ** 2 + sum(n * n for n, _ in sizes[1:])
    assert closed_form_pairs(Dilated(w, r), problem) == [expected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [longnet([1024, 5792, 185363, 1 << 20], [1, 2, 8, 16]), Window(5000)])
def test_shards_of_a_thousand_ranks_add_up(layout, pattern):
    problem = on_meta(10**9, 16)
    pattern = pattern & Causal()
    dealt = Layout(layout, 10**9, 1024)
    shares = closed_form_pairs(pattern, problem, [dealt.positions(r) for r in range(1024)])
    assert [sum(shares)] == closed_form_pairs(pattern, problem)
    assert shares[700:701] == closed_form_pairs(pattern, problem, [dealt.positions(700)])


def test_many_documents():
    lengths = [5, 0, 7, 64, 1] * 3000
    problem = on_meta(sum(lengths), 2)
    pattern = Documents(lengths).of(longnet([4, 32], [1, 2]) & Causal())
    alone = sum(closed_form_pairs(longnet([4, 32], [1, 2]) & Causal(), on_meta(n, 2))[0] for n in lengths[:5])
    shares = [Layout("zigzag", sum(lengths), 8).positions(r) for r in range(8)]
    assert sum(closed_form_pairs(pattern, problem, shares)) == 3000 * alone
