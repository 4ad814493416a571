"""A run that was stopped, killed or torn continues to the very bits of a run that never was."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_reader import Reader

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.training.data import Windows
from dilated_attention_pytorch.training.interrupt import StopRequest
from dilated_attention_pytorch.training.loop import Step, batch_at, train
from dilated_attention_pytorch.training.run import Run

NewRun = Callable[..., Run]
NewReader = Callable[[], Reader]


def losses(run: Run) -> list[float]:
    return [line["bits_per_byte"] for line in run.read_metrics()]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_short_windows_come_first_and_each_phase_has_its_own_sequence(new_run: NewRun) -> None:
    run = new_run("run")  # 5 steps of 2 windows of 64 bytes, then 7 steps of 2 windows of 128
    shapes = [batch_at(step, run).shape for step in range(12)]
    assert shapes == [(2, 65)] * 5 + [(2, 129)] * 7
    for length, steps in ((64, range(5)), (128, range(5, 12))):
        windows = Windows(run.corpus.train, length, run.settings.seed)
        seen = np.concatenate([batch_at(step, run) for step in steps])
        assert np.array_equal(seen, windows.batch(0, len(seen)))


def test_training_learns_and_records_every_step(new_run: NewRun, reader: NewReader) -> None:
    run, seen = new_run("run", steps=40), list[Step]()
    before = torch.get_rng_state()
    assert train(reader(), run, seen.append) == 40
    assert torch.equal(torch.get_rng_state(), before)
    assert [step.step for step in seen] == list(range(1, 41))
    assert losses(run) == [step.bits_per_byte for step in seen]
    assert seen[-1].bits_per_byte < seen[0].bits_per_byte - 2
    assert all(step.gradient_norm > 0 and step.tokens_per_second > 0 for step in seen)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_continues_to_the_last_bit(new_run: NewRun, reader: NewReader, stop: int) -> None:
    whole, parts = new_run("whole"), new_run("parts")
    straight = reader()
    train(straight, whole)
    done: list[Step] = []
    assert train(reader(), parts, done.append, lambda: len(done) >= stop) == stop
    torch.manual_seed(99)  # the continued run must not depend on this process's generator
    continued = reader()
    assert train(continued, Run.open(parts.path)) == 12
    assert losses(parts) == losses(whole)
    assert same_weights(straight, continued)


def test_metrics_behind_the_checkpoint_are_cut_and_made_again(new_run: NewRun, reader: NewReader) -> None:
    whole, torn = new_run("whole"), new_run("torn")
    train(reader(), whole)

    def die(step: Step) -> None:
        if step.step == 6:
            raise KeyboardInterrupt  # leaves no checkpoint of its own, as a kill would

    with pytest.raises(KeyboardInterrupt):
        train(reader(), torn, die)
    assert len(losses(torn)) == 6
    with torn.metrics.open("a") as file:
        file.write('{"step": 7, "bits_per')
    (torn.path / "checkpoint.safetensors.unfinished").write_bytes(b"half a file")
    train(reader(), Run.open(torn.path))
    assert losses(torn) == losses(whole)
    assert [json.loads(line)["step"] for line in torn.metrics.read_text().splitlines()] == list(range(1, 13))


def trains_until_killed(path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    train(Reader(), Run.open(path), lambda step: time.sleep(0.02 if step.step > 7 else 0.0))


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_leaves_a_run_that_continues_to_the_last_bit(new_run: NewRun, reader: NewReader) -> None:
    whole, killed = new_run("whole", steps=40, checkpoint_every=2), new_run("killed", steps=40, checkpoint_every=2)
    child = multiprocessing.get_context("fork").Process(target=trains_until_killed, args=(killed.path,))
    child.start()
    try:
        deadline = time.monotonic() + 60
        while not killed.checkpoint.exists() or len(killed.read_metrics()) < 7:
            assert child.is_alive(), "the child ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.join()
    done = len(killed.read_metrics())
    assert 7 <= done < 40
    straight, continued = reader(), reader()
    train(straight, whole)
    train(continued, Run.open(killed.path))
    assert losses(killed) == losses(whole)
    assert same_weights(straight, continued)


def test_a_finished_run_trains_no_further(new_run: NewRun, reader: NewReader) -> None:
    run = new_run("run")
    first, again, steps = reader(), reader(), list[Step]()
    train(first, run)
    assert train(again, Run.open(run.path), steps.append) == 12
    assert not steps
    assert same_weights(first, again)


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_two_processes_cannot_train_one_run(new_run: NewRun, reader: NewReader) -> None:
    run = new_run("run")
    with run.locked(), pytest.raises(InvalidInput, match="another process"):
        train(reader(), run)
    assert train(reader(), run) == 12


def test_a_loss_that_is_not_finite_stops_before_it_is_applied(new_run: NewRun, reader: NewReader) -> None:
    run, model = new_run("run", steps=8), reader()

    def poison(step: Step) -> None:
        if step.step == 5:
            with torch.no_grad():
                model.embedding.weight[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 6"):
        train(model, run, poison)
    fresh = reader()
    train(fresh, run)
    assert all(torch.isfinite(value).all() for value in fresh.state_dict().values())


def test_bf16_autocast_changes_the_numbers_and_learns(new_run: NewRun, reader: NewReader) -> None:
    full, half = new_run("full", steps=30), new_run("half", steps=30, autocast="bf16")
    train(reader(), full)
    train(reader(), half)
    assert losses(full) != losses(half)
    assert losses(half)[-1] == pytest.approx(losses(full)[-1], abs=0.3)


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert request.signal == 0
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
