"""A rank that fails ends the others' steps in time, a restart changes nothing, and memory may run out once."""

import dataclasses
import functools
import logging
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from byte_reader import Reader
from shared_runs import calm_reader, dropping_reader, free_port, losses, rank_trains

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.training.environment import launch
from dilated_attention_pytorch.training.faults import (
    MicroBatch,
    failed_transfer,
    ran_out_of_memory,
    together,
    unwritten,
)
from dilated_attention_pytorch.training.loop import train
from dilated_attention_pytorch.training.resume import check_restart, newest_checkpoint, run_before_restart
from dilated_attention_pytorch.training.run import Run
from parallel.worlds import ends_of_world, run_world

forked = pytest.mark.skipif(os.name != "posix", reason="worlds are forked")


def kill_one(checkpoint, step):
    if dist.get_rank() == 2 and step.step == 7:
        while not checkpoint.is_dir():  # it is written beside the steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


@forked
def test_one_of_four_is_killed_and_a_new_world_goes_on_to_the_same_losses(new_run):
    whole, run = new_run("whole", batch_size=4, steps=9), new_run("run", batch_size=4, steps=9)
    run_world(4, rank_trains, whole.path, free_port(), dropping_reader)
    kill = functools.partial(kill_one, run.checkpoints / "step-00000004")
    ends = ends_of_world(4, rank_trains, run.path, free_port(), dropping_reader, kill, None, 3.0)
    assert "exit code -9" in ends[2].text
    for rank in (0, 1, 3):
        assert f"RankLost: rank {rank} of 4" in ends[rank].text
        assert f"--resume {run.path}" in ends[rank].text
    assert newest_checkpoint(run).name == "step-00000004"
    run_world(4, rank_trains, run.path, free_port(), dropping_reader)
    assert losses(run) == losses(whole)


def lost_while_one_hangs(path, port):
    rank = dist.get_rank()

    def hang(step):
        deadline = time.monotonic() + 20
        while rank == 1 and step.step == 2 and not all((path / f"lost-{other}").exists() for other in (0, 2)):
            assert time.monotonic() < deadline, "the others wait for as long as this rank hangs"
            time.sleep(0.05)

    with pytest.raises(RuntimeError, match=r"hung for more than 1 s"):
        rank_trains(path, port, calm_reader, hang, timeout=1.0)
    (path / f"lost-{rank}").touch()


@forked
def test_a_rank_that_hangs_becomes_an_error_on_the_others_while_it_does(new_run):
    run = new_run("run", batch_size=3)
    run_world(3, lost_while_one_hangs, run.path, free_port())
    assert (run.path / "lost-1").exists()


class Scarce(Reader):
    """Reports that memory ran out in some calls, before or behind the work of the forward pass."""

    def __init__(self, calls, behind=False):
        super().__init__()
        self.calls, self.behind, self.count = calls, behind, 0
        self.sizes = []

    def forward(self, tokens):
        self.count += 1
        self.sizes.append(len(tokens))
        rows = super().forward(tokens) if self.behind else None
        if self.count in self.calls:
            raise torch.OutOfMemoryError("injected")
        return super().forward(tokens) if rows is None else rows


def scarce(calls, behind=False):
    torch.manual_seed(5)
    model = Scarce(calls, behind)
    model.dropout.p = 0.0
    if dist.is_initialized():
        del model.extra  # DDP wants a gradient of every parameter
    return model


def test_memory_runs_out_once_and_the_gradient_is_the_same(new_run, straight_losses, caplog):
    run = new_run("run", batch_size=3)
    model = scarce({6})
    with caplog.at_level(logging.WARNING, "dilated_attention_pytorch"):
        train(model, run, stop_requested=lambda: model.count > 12)
    assert model.sizes == [3] * 6 + [2, 1] * 4
    assert (
        "memory ran out in step 6 (injected); from now on a rank computes 2 samples at once instead of 3" in caplog.text
    )
    continued = scarce({})
    train(continued, Run.open(run.path))
    assert set(continued.sizes) == {2, 1}, "a continued run does not try the whole batch again"
    assert losses(run) == pytest.approx(straight_losses(3), abs=1e-5)


def test_memory_that_runs_out_twice_is_an_error(new_run):
    run = new_run("run")
    with pytest.raises(torch.OutOfMemoryError, match=r"step 4, and micro-batches were halved before.*injected"):
        train(scarce({3, 7}), run)
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
    with pytest.raises(torch.OutOfMemoryError, match="one sample already"):
        train(scarce({3}), new_run("single", batch_size=1))


def test_another_error_is_not_taken_for_scarce_memory(new_run):
    class Broken(Reader):
        def forward(self, tokens):
            raise RuntimeError("shapes differ")

    run = new_run("run")
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(Broken(), run)
    assert not list(run.path.glob("micro_batch*"))


def test_an_allocator_of_the_cpu_says_that_memory_ran_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert ran_out_of_memory(caught.value)
    assert not failed_transfer(caught.value)
    assert not ran_out_of_memory(RuntimeError("shapes differ"))


def test_a_damaged_micro_batch_is_named(new_run):
    run = new_run("run")
    (run.path / "micro_batch-0.json").write_text('{"micro_batch": 0}')
    with pytest.raises(InvalidInput, match=r"micro_batch-0\.json"):
        MicroBatch(run)


def scarce_ranks(path, port, ranks, calls, behind):
    began = time.monotonic()
    built = []

    def build():
        here = dist.get_rank() in ranks and not built
        built.append(scarce(calls if here else {}, behind))
        return built[-1]

    done = rank_trains(path, port, build, timeout=2.0)
    return done, [model.sizes for model in built], time.monotonic() - began


@forked
@pytest.mark.parametrize(
    ("parallel", "ranks", "behind"),
    [("fsdp", (1,), False), ("fsdp", (0,), True), ("fsdp", (0, 1), True), ("ddp", (0, 1), True)],
    ids=["one, before any transfer", "one, behind the forward pass", "all", "all, replicated"],
)
def test_memory_runs_out_on_a_rank_and_all_halve_their_batches(new_run, straight_losses, parallel, ranks, behind):
    run = new_run("run", batch_size=4, parallel=parallel)
    for done, sizes, _ in run_world(2, scarce_ranks, run.path, free_port(), ranks, {6}, behind):
        assert done == 12
        assert sizes == [[2] * 6, [1, 1] * 8]  # from the checkpoint at step 4
    assert losses(run) == pytest.approx(straight_losses(4), abs=1e-5)


def runs_out_again(path, port):
    with pytest.raises(torch.OutOfMemoryError, match="halved before"):
        rank_trains(path, port, lambda: scarce({3}, behind=True))


@forked
def test_memory_that_runs_out_twice_is_an_error_on_every_rank(new_run):
    run = new_run("run", batch_size=4)
    run_world(2, runs_out_again, run.path, free_port())


def test_one_process_works_alone():
    assert together("cpu", timedelta(seconds=1), lambda: dist.is_initialized()) is False


def test_a_restart_of_the_same_command_goes_on_with_its_run(new_run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    run = new_run("run")
    assert run_before_restart(run.path, run.settings, run.model_config).path == run.path
    assert run_before_restart(run.path.parent / "new", run.settings, run.model_config) is None
    with pytest.raises(InvalidInput, match="another model"):
        run_before_restart(run.path, run.settings, {"kind": "another"})
    with pytest.raises(InvalidInput, match="other settings"):
        run_before_restart(run.path, dataclasses.replace(run.settings, seed=8), run.model_config)
    for other in ("two", None):  # Run.create refuses the folder then
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        if other is not None:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        assert run_before_restart(run.path, run.settings, run.model_config) is None


def test_a_command_that_may_be_restarted_names_its_folder(tmp_path, monkeypatch):
    check_restart(None)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    check_restart(tmp_path)
    with pytest.raises(InvalidInput, match="--folder"):
        check_restart(None)


def test_a_launch_without_a_name_is_told_by_what_restarts_it(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch() == f"process {os.getppid()}"


def part_of_a_store(path, late):
    rank, size = dist.get_rank(), dist.get_world_size()
    kept = dist.FileStore(str(path), size)
    if rank == 0 and late:
        time.sleep(0.3)  # the others find what an earlier start has left
    part = unwritten(kept, rank, size, timedelta(seconds=20))
    part.set(f"from {rank}", "here")
    part.wait([f"from {other}" for other in range(size)])
    return part.add("ranks", 1)


@forked
def test_ranks_that_start_again_find_nothing_of_those_before_them(tmp_path):
    path = tmp_path / "store"
    path.touch()
    keep = dist.FileStore(str(path), -1)  # torchrun's store outlives the ranks
    for late in (False, True, False):
        assert sorted(run_world(3, part_of_a_store, path, late)) == [1, 2, 3]
    with pytest.raises(TimeoutError, match="rank 1 of 3"):
        unwritten(keep, 1, 3, timedelta(seconds=0.2))
