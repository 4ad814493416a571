"""The part on memory pools: each use against none, peaks that see what was held, switches that follow the figures."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.benchmark import pools
from dilated_attention_pytorch.memory import USES, uses
from dilated_attention_pytorch.patterns import longnet

ROOT = Path(__file__).parents[2]
TINY = longnet([32, 128], [1, 4])
CASES = (
    pools.PoolCase("results", "tiny", 700, 2, 8, TINY, "sdpa"),
    pools.PoolCase("results", "tiny", 700, 2, 8, TINY, training=True),
    pools.PoolCase("ring", "tiny", 256, 2, 8, TINY, method="ring", training=True),
)


@pytest.fixture(scope="module")
def measured():
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uses, "LEAST_BYTES", 0)
        results = pools.measure_pools(2, lambda: calls.append(1), CASES)
    assert len(calls) == pools.pool_steps(2, CASES)
    assert not multiprocessing.active_children()
    return results


def test_results_can_be_stored_and_shown(measured):
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    ((_, columns, rows, note),) = pools.pool_tables(measured)
    assert [row[:2] for row in rows] == [(case.use, case.describe()) for case in CASES]
    assert all(len(row) == len(columns) for row in rows)
    assert "ring of 2 ranks" in rows[2][1]
    for of in measured["cases"]:
        assert of["times as fast with the pool"]["rounds"] == 2
        assert of["seconds without"]["low"] > 0
    assert all(0 < time < 1000 for time in measured["microseconds per hit"].values())
    assert "goal under 2" in note


def test_each_side_has_the_uses_that_it_says(monkeypatch):
    seen = []
    monkeypatch.setattr(pools, "_local_run", lambda case: lambda: seen.append(uses._pooled.get()))
    pools._seconds(CASES[0], 1, None)
    assert seen == [frozenset(), frozenset({"results"})] * 2  # a warm-up first


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc/self/clear_refs")
def test_a_peak_is_what_was_held_at_most():
    size = 1 << 26

    def call():
        torch.zeros(size, dtype=torch.uint8).add_(1)

    assert 0.95 * size <= pools._peak_of(call) < 1.5 * size  # the kernel counts pages in batches
    kept = []
    assert pools._peak_of(lambda: kept.append(torch.ones(size, dtype=torch.uint8))) >= 0.95 * pools.PEAK_CALLS * size


def test_a_verdict_is_on_time_and_on_memory():
    def of(median, peaks):
        return pools.verdict({"times as fast with the pool": {"median": median}, "peak bytes": peaks})

    assert of(1.03, None) == "gains"
    assert of(1.02, None) == of(0.98, None) == "even"
    assert of(0.97, None) == "loses"
    assert of(1.0, {"with": 90, "without": 100}) == "gains"
    assert of(1.0, {"with": 91, "without": 100}) == "even"
    assert of(2.0, {"with": 112, "without": 100}) == "loses"
    assert of(0.9, {"with": 50, "without": 100}) == "loses"


def test_what_is_measured_has_large_buffers_of_every_use():
    cases = pools.pool_cases()
    assert {case.use for case in cases} == set(USES)
    for case in cases:
        rows = case.tokens // (pools.RANKS if case.method else 1)
        assert 4 * rows * case.heads * case.head_dim >= uses.LEAST_BYTES


def test_a_use_is_switched_on_where_it_gained_and_nowhere_lost():
    results = json.loads((ROOT / "benchmarks/results/amd-epyc/pools.json").read_text())
    assert {of["use"] for of in results["cases"]} == set(USES)
    for name, use in USES.items():
        verdicts = {pools.verdict(of) for of in results["cases"] if of["use"] == name}
        assert use.pooled == ("gains" in verdicts and "loses" not in verdicts), (name, verdicts)
