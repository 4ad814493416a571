"""The harness itself: what ranks return, raise, and do not survive."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from parallel.worlds import Failure, WorldFailed, ends_of_world, run_world


def _sum_of_ranks(factor):
    x = torch.full((100_000,), float(dist.get_rank()) + 1, requires_grad=True)
    (x * factor).sum().backward()  # autograd works in a forked process
    total = x.detach().clone()
    dist.all_reduce(total)
    assert torch.get_num_threads() == 1
    return total, float(x.grad[0]), torch.rand(1).item(), {"rank": dist.get_rank()}


def test_results_come_back_by_rank():
    torch.rand(10, requires_grad=True).sum().backward()
    for size in (1, 3):
        ends = run_world(size, _sum_of_ranks, 2.5)
        assert [told["rank"] for *_, told in ends] == list(range(size))
        assert all(bool((total == size * (size + 1) / 2).all()) and slope == 2.5 for total, slope, *_ in ends)
        assert len({draw for *_, draw, _ in ends}) == 1
    assert not multiprocessing.active_children()


def _rank_one_raises():
    if dist.get_rank() == 1:
        raise ValueError("seven")
    dist.barrier()  # waits for it in vain


def test_a_rank_that_raises_stops_the_world_and_is_named():
    start = time.monotonic()
    with pytest.raises(WorldFailed, match=r"(?s)rank 1 failed.*_rank_one_raises.*ValueError: seven"):
        run_world(3, _rank_one_raises)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def _one_rank_is_killed(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_a_failure_beside_the_others(rank):
    ends = ends_of_world(2, _one_rank_is_killed, rank)
    assert ends[rank] == Failure(rank, "its process ended without a result, exit code -9")
    assert ends[1 - rank] == "alive"
    assert not multiprocessing.active_children()


def _rank_one_hangs():
    while dist.get_rank() == 1:
        time.sleep(0.1)


def test_a_rank_that_hangs_is_killed_and_shows_where_it_was():
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\] of 2 have not ended after 2 s.*_rank_one_hangs"):
        run_world(2, _rank_one_hangs, timeout=2)
    assert not multiprocessing.active_children()
