"""Plans are made once for a pattern and a set of shapes, and kept in a bounded, locked cache."""

import threading

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, longnet
from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.plans import DensePlan, StridedPlan, candidate_plans, planner
from dilated_attention_pytorch.problem import make_problem


def problem_of(n, *, heads=2, batch=1, visible=None, dtype=torch.float32):
    x = torch.zeros(batch, n, heads, 2, dtype=dtype)
    mask = None if visible is None else torch.arange(n) >= torch.tensor(visible)[:, None]
    return make_problem(x, x, x, scale=1.0, query_start=0, key_padding_mask=mask)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch):
    monkeypatch.setattr(planner, "_cache", BoundedCache(planner._cache.size))


def test_equal_shapes_share_a_plan():
    first = candidate_plans(Causal(), problem_of(9))
    assert candidate_plans(Causal(), problem_of(9)) is first


@pytest.mark.parametrize(
    "other",
    [
        lambda: (Causal(), problem_of(10)),
        lambda: (Causal(), problem_of(9, heads=3)),
        lambda: (Causal(), problem_of(9, batch=2)),
        lambda: (Causal(), problem_of(9, visible=(4,))),
        lambda: (longnet([4], [1]), problem_of(9)),
    ],
)
def test_other_shapes_do_not(other):
    first = candidate_plans(Causal(), problem_of(9))
    assert candidate_plans(*other()) is not first


def test_tables_belong_to_the_key():
    a, b = (candidate_plans(Documents(n).of(Causal()), problem_of(9)) for n in ([4, 5], [5, 4]))
    assert not torch.equal(a[0].expand(problem_of(9)), b[0].expand(problem_of(9)))
    large = [torch.ones(2000, dtype=torch.int64), torch.ones(2000, dtype=torch.int64)]
    large[1][1000] = 3  # what str(tensor) would leave out
    first, second = (candidate_plans(Documents(t).of(Causal()), problem_of(2002)) for t in large)
    assert first is not second


def test_bounded_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(planner._cache, "size", 4)
    kept = candidate_plans(Causal(), problem_of(1))
    for n in range(2, 10):
        candidate_plans(Causal(), problem_of(n))
        assert candidate_plans(Causal(), problem_of(1)) is kept  # used again, so it stays
        assert len(planner._cache) <= 4


def test_threads_share_it():
    errors = []

    def work(seed):
        try:
            for i in range(60):
                n = 1 + (seed * 7 + i) % 23
                problem = problem_of(n)
                plans = candidate_plans(Causal(), problem)
                assert int(plans[0].expand(problem).sum()) == n * (n + 1)
        except (AssertionError, KeyError, RuntimeError) as error:  # a thread's error is lost otherwise
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert len(planner._cache) <= 23


def test_log_counts_are_made_when_asked_for_and_hold_no_numbers():
    problem = problem_of(40)
    dense = next(p for p in candidate_plans(Causal(), problem) if isinstance(p, DensePlan))
    assert "log_counts" not in vars(dense)
    assert dense.log_counts is dense.log_counts
    assert torch.equal(dense.log_counts.exp().long(), dense.expand(problem))
    assert dense.short.q.untyped_storage().nbytes() == problem.q.element_size()
    held = problem_of(512)
    assert next(p for p in candidate_plans(Causal(), held) if isinstance(p, DensePlan)).short is not None
    long = problem_of(1024)
    assert next(p for p in candidate_plans(Causal(), long) if isinstance(p, DensePlan)).log_counts is None


def test_what_may_be_held_comes_first_only_when_it_is_short():
    """Above MASKED_PAIRS only a measurement puts the dense plan first."""
    pattern = longnet([16, 48, 256], [1, 3, 5]) & Causal()
    short, longer = (candidate_plans(pattern, problem_of(n, heads=15)) for n in (64, 128))
    assert isinstance(short[0], DensePlan)
    assert isinstance(longer[0], StridedPlan)
    assert longer[1].short is not None
