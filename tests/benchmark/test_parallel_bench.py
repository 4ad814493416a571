"""The part on context parallelism: worlds that stay, bytes that arrive, and ratios of one round."""

import json
import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch.benchmark import parallel
from dilated_attention_pytorch.benchmark.cases import GIGAPATH, Case
from dilated_attention_pytorch.benchmark.crew import crew
from dilated_attention_pytorch.benchmark.received import ReceivedBytes
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.wire import start_all_to_all, start_exchange

SIZES = parallel.ParallelSizes(
    tokens=128,
    heads=2,
    head_dim=16,
    whole=Case("", 1 << 12, 3, 16, (64, 1024), (1, 4)),
    scaled=Case("", 240, 3, 16, (16, 100, 240), (1, 2, 4)),
    bytes_world=3,
    balance_worlds=(2,),
    rounds_of_rounds=2,
)


def _jobs():
    def fail():
        if dist.get_rank() == 1:
            raise ValueError("seven")
        dist.barrier()

    def nap():
        time.sleep(0.3 * dist.get_rank())

    def hang():
        while dist.get_rank() == 1:
            time.sleep(0.1)

    return {"rank": dist.get_rank, "fail": fail, "nap": nap, "hang": hang, "threads": torch.get_num_threads}


def test_a_crew_runs_jobs_together_and_ends():
    with crew(3, _jobs) as run:
        assert run("rank").results == [0, 1, 2]
        assert run("threads").results == [1, 1, 1]
        assert 0.6 < run("nap").seconds < 5  # until the last one
        with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed in 'fail'.*seven"):
            run("fail")
    with crew(2, _jobs, time_limit=2) as run, pytest.raises(TimeoutError, match=r"ranks \[1\].*'hang'"):
        run("hang")
    assert not multiprocessing.active_children()


def _carried():
    def job():
        rank = dist.get_rank()
        with ReceivedBytes() as received:
            x, y = torch.zeros(3), torch.zeros(5, dtype=torch.int64)
            sends, receives = ([(1, x)], []) if rank == 0 else ([], [(0, y[:3].float())])
            start_exchange(dist.group.WORLD, sends, receives).wait()
            counts = [1, 3] if rank == 0 else [2, 4]
            come = [1, 2] if rank == 0 else [3, 4]
            start_all_to_all(dist.group.WORLD, torch.zeros(sum(counts), 2), counts, come)[0].wait()
            dist.all_gather([x, x.clone()], torch.zeros(3))
            dist.all_gather_into_tensor(torch.zeros(4), torch.zeros(2))
            with pytest.raises(InvalidInput, match="allreduce_"):
                dist.all_reduce(x)
        return dict(received.bytes), received.total

    return {"all": job}


def test_what_arrives_is_counted_without_a_rank_s_own():
    with crew(2, _carried) as run:
        first, second = run("all").results
    assert first == ({"send": 0, "alltoall_base_": 2 * 8, "allgather_": 12, "_allgather_base_": 8}, 36)
    assert second[0]["recv_"] == 12
    assert second[0]["alltoall_base_"] == 3 * 8
    assert second[1] == 12 + 24 + 12 + 8


def test_rows_by_hand_are_those_of_the_mask():
    case = Case("", 96, 3, 8, (10, 96), (3, 4))
    found = parallel.gather_by_hand(case, 4)
    forward, backward = [0] * 4, [0] * 4
    for w, r in zip(case.segment_lengths, case.dilation_rates):
        grid = torch.stack([(torch.arange(96) % w - h) % r == 0 for h in range(3)])
        segment = torch.arange(96) // w
        for receiver in range(4):
            own = torch.arange(96) // 24 == receiver
            needed = grid & torch.isin(segment, segment[own]) & ~own
            forward[receiver] += int(needed.sum()) * 2 * 8 * 2
            for owner in range(4):
                backward[owner] += int(needed[:, owner * 24 : (owner + 1) * 24].sum()) * 2 * 8 * 4
    assert found == {"forward": forward, "backward": backward}


def test_gigapath_s_bytes_are_those_that_were_expected():
    found = parallel.gather_by_hand(GIGAPATH, 8)["forward"]
    assert sum(found) / 8 == pytest.approx(238e6, rel=0.05)
    assert min(found) == pytest.approx(197e6, rel=0.05)
    assert max(found) == pytest.approx(268e6, rel=0.05)


@pytest.fixture(scope="module")
def measured():
    calls = []
    results = parallel.measure_parallel(2, lambda: calls.append(1), SIZES)
    assert len(calls) == parallel.parallel_steps(2, SIZES)
    assert not multiprocessing.active_children()
    return results


def test_what_was_counted_is_what_each_method_said(measured):
    scaled, whole = measured["bytes"]
    assert set(scaled["said"]) == {"ring", "gather", "all_to_all"}
    assert scaled["counted"] == scaled["said"]
    assert "counted" not in whole
    row = 3 * 16 * 2 * 2  # heads, dim, key and value, bytes
    assert scaled["said"]["ring"]["forward"] == [160 * row] * 3
    assert scaled["said"]["gather"]["forward"] == scaled["by hand"]["forward"]
    assert scaled["said"]["gather"]["backward"] == scaled["by hand"]["backward"]
    assert max(scaled["said"]["gather"]["forward"]) < 160 * row


def test_results_can_be_stored_and_shown(measured):
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["ring"].keys() == parallel.RING_GOALS.keys()
    for of in measured["ring"].values():
        assert of["times as fast as one process"]["rounds"] == 4
        assert of["seconds"]["low"] > 0
    tables = parallel.parallel_tables(measured)
    assert all(len(row) == len(columns) for _, columns, rows, _ in tables for row in rows)
    (_, _, ring, note), (_, _, received, _), (_, _, balance, _) = tables
    assert "N 128, H 2, D 16, causal, zigzag" in note
    assert [row[0] for row in ring] == ["forward", "forward + backward"]
    assert len(received) == 2 * 3 * 2
    assert all(row[4] == "1.000, goal equal" for row in received[:6])
    assert [row[5] for row in received[:2]] == ["1.000, goal within 5 %"] * 2
    assert len(balance) == 2 * 2 + 1
    assert balance[-1][2:] == ("1.500", "1.000", "1.000")


def test_what_falls_short_is_shown(measured):
    ring = measured["ring"]["forward + backward"] | {
        "times as fast as one process": {"median": 0.8, "low": 0.7, "high": 0.9, "rounds": 3}
    }
    of = measured["bytes"][0]
    told = of | {"said": {"gather": {"forward": [10, 20, 30]}}, "by hand": {"forward": [10, 20, 28]}}
    told["counted"] = {"gather": {"forward": [10, 21, 30]}}
    balance = [
        {"pattern": "p", "shape": "N", "world": 2, "layouts": {"contiguous": 1.5, "zigzag": 1.2, "striped": 1.3}}
    ]
    short = measured | {"ring": {"forward + backward": ring}, "bytes": [told], "balance": balance}
    (_, _, rings, _), (_, _, received, _), (_, _, uneven, _) = parallel.parallel_tables(short)
    assert rings[0][1] == "0.80 (0.70-0.90), goal 0.85 missed"
    assert received[0][4:] == ("1.050, goal equal missed", "1.071, goal within 5 % missed")
    assert uneven[0][2] == "1.500, goal at most 1.1 missed"


def test_ratios_are_of_one_round(monkeypatch):
    seconds = {"ring": 2.0, "nothing sent": 1.6}

    class Crew:
        def __init__(self, size, jobs):
            assert size == SIZES.ring_world

        def __enter__(self):
            return lambda name: parallel.Ended(seconds[name.rpartition(" forward")[0]], [])

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(parallel, "crew", Crew)
    monkeypatch.setattr(parallel, "seconds_of", lambda run: 1.5)
    found = parallel._ring(3, None, SIZES)["forward + backward"]
    assert found["times as fast as one process"]["median"] == 0.75
    assert found["times as long as with nothing sent"]["median"] == 1.25
    pairs = 2 * 128 * 129 // 2
    assert found["GFLOP/s"] == round(3.5 * 4 * 16 * pairs / 2.0 / 1e9, 1)
