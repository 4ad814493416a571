"""A checkpoint of several ranks is whole or not there, and loads at any number of ranks."""

import dataclasses
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from byte_reader import SETTINGS, Reader
from shared_runs import calm_reader, dropping_reader, free_port, losses, rank_trains
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.training import sharded
from dilated_attention_pytorch.training.checkpoint import Progress, load_checkpoint, save_checkpoint, state_of
from dilated_attention_pytorch.training.loop import adamw, train
from dilated_attention_pytorch.training.resume import newest_checkpoint
from dilated_attention_pytorch.training.run import Run
from dilated_attention_pytorch.training.sharded import (
    finish_saving,
    load_sharded,
    read_complete,
    sharded_checkpoints,
    start_saving,
)
from parallel.worlds import ends_of_world, run_world

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worlds are forked")


def learner(shard):
    """A reader and its optimizer after two steps; its state whole, on every rank."""
    model = calm_reader()
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = adamw(model, SETTINGS)
    for seed in range(2):
        tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(seed))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(model, optimizer):
    state = state_of(model, optimizer).items()
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone() for name, x in state}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(folder, shard, steps=(2,)):
    """Saved at the given steps, weights overwritten while the last is being written; the state as it was."""
    model, optimizer = learner(shard)
    expected, group, go = whole(model, optimizer), dist.new_group(backend="gloo"), threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def patient(writer, *arguments):
        assert go.wait(20)
        return write(writer, *arguments)

    HuggingFaceStorageWriter.write_data = patient  # in this forked process only
    for step in steps:
        go.clear()
        saving = start_saving(folder, model, optimizer, Progress(step, 1.5), group)
        if step == steps[-1]:
            with torch.no_grad():
                for value in [*model.parameters(), *optimizer.state[model.embedding.weight].values()]:
                    value.fill_(9.0)
        go.set()
        finish_saving(saving)
        assert (folder / f"step-{step:08d}").is_dir(), "on every rank it is whole when the wait is over"
    return expected, torch.rand(3)


def load(path, shard):
    model = calm_reader()
    torch.manual_seed(100)
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = adamw(model, SETTINGS)
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    progress, continued = load_sharded(path, model, optimizer, group)
    return whole(model, optimizer), progress, continued, torch.rand(3)


@pytest.mark.parametrize(("shard", "size", "others"), [(True, 4, (4, 2)), (False, 2, (2, 3))], ids=["sharded", "whole"])
def test_saved_by_several_loads_at_as_many_other_numbers_and_one(tmp_path, shard, size, others):
    saved = run_world(size, save, tmp_path, shard)
    expected, path = saved[0][0], tmp_path / "step-00000002"
    for other in others:
        for rank, (state, progress, continued, drawn) in enumerate(run_world(other, load, path, True)):
            assert same(state, expected)
            assert progress == Progress(2, 1.5)
            assert continued == (other == size)
            assert (continued and torch.equal(drawn, saved[rank][1])) == continued  # each rank's own generator goes on
    state, *_ = load(path, False)
    assert same(state, expected)


def test_one_file_loads_into_shards(tmp_path):
    model, optimizer = learner(shard=False)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, Progress(2, 1.0))
    for state in run_world(2, load_file_sharded, tmp_path / "c.safetensors"):
        assert same(state, whole(model, optimizer))


def load_file_sharded(path):
    model = dropping_reader()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = adamw(model, SETTINGS)
    load_checkpoint(path, model, optimizer, continue_random=False)
    return whole(model, optimizer)


def test_the_last_two_are_kept_and_what_was_cut_off_goes(tmp_path):
    (tmp_path / "step-00000003.unfinished").mkdir()
    (tmp_path / "step-00000006.unfinished").mkdir()
    (tmp_path / "step-00000006.unfinished" / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"old")
    run_world(2, save, tmp_path, True, (2, 4, 6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    assert [path.name for path in sharded_checkpoints(tmp_path)] == ["step-00000006", "step-00000004"]
    assert len(list((tmp_path / "step-00000006").glob("shard-*"))) == 2


def test_a_run_goes_on_with_other_numbers_of_processes(new_run, straight_losses):
    run = new_run("run", batch_size=4)
    done = []
    train(calm_reader(), run, done.append, lambda: len(done) == 3)
    assert run_world(4, rank_trains, run.path, free_port(), calm_reader, lambda step: None, 6) == [6] * 4
    assert run_world(2, rank_trains, run.path, free_port(), calm_reader, lambda step: None, 9) == [9] * 2
    assert newest_checkpoint(run).name == "step-00000009"
    assert train(calm_reader(), Run.open(run.path)) == 12
    assert newest_checkpoint(run) == run.checkpoint
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 13))
    assert losses(run) == pytest.approx(straight_losses(4), abs=1e-4)


def interrupted(path, port):
    def interrupt(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_trains(path, port, calm_reader, interrupt)


def test_a_checkpoint_under_way_becomes_whole_when_training_is_interrupted(new_run):
    run = new_run("run")
    run_world(2, interrupted, run.path, free_port())
    assert newest_checkpoint(run).name == "step-00000004"


def killed_while_saving(path, port, method, victim):
    """As `rank_trains`, but the rank `victim` is killed in the middle of writing the second checkpoint."""
    rank, called, original = dist.get_rank(), [], getattr(sharded._Writer, method)

    def fatal(writer, *arguments, **named):
        called.append(method)
        if rank == victim and len(called) == 2:
            if method == "write_data":
                Path(writer.path, "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(writer, *arguments, **named)

    setattr(sharded._Writer, method, fatal)
    return rank_trains(path, port, dropping_reader)


@pytest.fixture(scope="module")
def losses_of_two(tmp_path_factory, text):
    """Losses of a run by two ranks that nothing stops."""
    settings = dataclasses.replace(SETTINGS, steps=9)
    run = Run.create(tmp_path_factory.mktemp("whole") / "run", settings, {"kind": "reader"}, text)
    run_world(2, rank_trains, run.path, free_port(), dropping_reader)
    return losses(run)


@pytest.mark.parametrize(("method", "victim"), [("write_data", 1), ("finish", 0)])
def test_a_kill_while_saving_leaves_the_checkpoint_before(new_run, losses_of_two, method, victim):
    run = new_run("run", steps=9)
    ends = ends_of_world(2, killed_while_saving, run.path, free_port(), method, victim)
    assert "exit code -9" in ends[victim].text
    assert "RankLost" in ends[1 - victim].text
    assert (run.checkpoints / "step-00000008.unfinished").is_dir()
    assert newest_checkpoint(run).name == "step-00000004"
    run_world(2, rank_trains, run.path, free_port(), dropping_reader)
    assert losses(run) == losses_of_two
    assert not list(run.checkpoints.glob("*.unfinished"))


def fails_to_write(folder):
    model, optimizer = learner(shard=True)
    group = dist.new_group(backend="gloo")
    if dist.get_rank() == 1:

        def full(*arguments):
            raise OSError("No space left on device")

        HuggingFaceStorageWriter.write_data = full
    with pytest.raises(OSError, match="rank 1 could not write a checkpoint: No space left"):
        finish_saving(start_saving(folder, model, optimizer, Progress(2, 1.0), group))


def test_a_rank_that_cannot_write_is_named_on_all(tmp_path):
    run_world(2, fails_to_write, tmp_path)
    assert not sharded_checkpoints(tmp_path)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_world(2, save, folder, True, (4, 8))
    return folder


@pytest.fixture
def run(new_run, two_checkpoints):
    made = new_run("run")
    shutil.copytree(two_checkpoints, made.checkpoints)
    return made


def shard_of(path):
    return path / "shard-00001-model-00001-of-00001.safetensors"


def truncate(path):
    shard_of(path).write_bytes(shard_of(path).read_bytes()[:-1])


def lose(path):
    shard_of(path).unlink()


def unmark(path):
    (path / "complete.json").unlink()


def garble(path):
    (path / "complete.json").write_text('{"format": "another"}')


@pytest.mark.parametrize("damage", [truncate, lose, unmark, garble], ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_left_out_and_named(run, caplog, damage):
    assert newest_checkpoint(run).name == "step-00000008"
    damage(run.checkpoints / "step-00000008")
    with caplog.at_level(logging.WARNING, "dilated_attention_pytorch"):
        assert newest_checkpoint(run).name == "step-00000004"
    assert "step-00000008" in caplog.text
    damage(run.checkpoints / "step-00000004")
    with pytest.raises(InvalidInput, match="step-0000000"):  # it does not begin anew in silence
        train(calm_reader(), run)


def test_the_newest_of_both_kinds_is_taken(run, caplog):
    model, optimizer = learner(shard=False)
    save_checkpoint(run.checkpoint, model, optimizer, Progress(6, 1.0))
    assert newest_checkpoint(run).name == "step-00000008"
    save_checkpoint(run.checkpoint, model, optimizer, Progress(9, 1.0))
    assert newest_checkpoint(run) == run.checkpoint
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "dilated_attention_pytorch"):
        assert newest_checkpoint(run).name == "step-00000008"
    assert "checkpoint.safetensors" in caplog.text


def break_header(path):
    """The size stays, so only reading finds it."""
    content = bytearray(shard_of(path).read_bytes())
    content[8:40] = b"?" * 32
    shard_of(path).write_bytes(content)


class OtherReader(Reader):
    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Parameter(torch.zeros(4))


def refuses(path, build, text):
    model = build()
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = adamw(model, SETTINGS)
    before, random = whole(model, optimizer), torch.get_rng_state()
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    with pytest.raises(InvalidInput, match=text):
        load_sharded(path, model, optimizer, group)
    assert same(whole(model, optimizer), before)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)


def test_what_cannot_be_loaded_is_refused_on_every_rank_and_changes_nothing(run):
    path = run.checkpoints / "step-00000008"
    refuses(path, OtherReader, r"step-00000008.*extra must have shape \(4,\)")
    refuses(path, lambda: torch.nn.Linear(2, 2), "step-00000008.*another model")
    run_world(2, refuses, path, OtherReader, "extra must have shape")
    break_header(path)
    assert read_complete(path)[0] == Progress(8, 1.5)
    refuses(path, calm_reader, "step-00000008.*damaged")
    run_world(2, refuses, path, calm_reader, "step-00000008.*damaged")
