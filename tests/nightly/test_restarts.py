"""torchrun itself: one of four training processes is killed from outside, and the same command goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from dilated_attention_pytorch.training.loop import train
from dilated_attention_pytorch.training.model import build_model
from dilated_attention_pytorch.training.ranks import form_ranks
from dilated_attention_pytorch.training.run import Run
from parallel.worlds import run_world

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

SETTINGS = (
    "batch_size=2", "window=256", "short_window=128", "d_model=16", "nhead=2", "num_layers=2", "dim_feedforward=32",
    "segment_lengths=64,256", "dilation_rates=1,2", "head_groups=false", "dropout=0.1", "checkpoint_every=5",
    "threads=1",
)  # fmt: skip
STEPS = 60


def children(process):
    """The worker processes of torchrun."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            fields = entry.joinpath("stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == process and "dilated_attention_pytorch" in entry.joinpath("cmdline").read_text():
                found.append(int(entry.name))
    return sorted(found)


def undisturbed(path):
    run = Run.open(path)
    ranks = form_ranks(run.settings, timedelta(seconds=60))
    return train(build_model(run), run, ranks=ranks)


def lines_of(path):
    with contextlib.suppress(OSError):
        return path.read_text().count("\n")
    return 0


def test_torchrun_restarts_a_run_of_which_one_process_was_killed(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        words = np.random.RandomState(number).choice(["alpha", "beta", "gamma", "delta"], 400)
        text.joinpath(f"{number}.txt").write_text(" ".join(words))
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "4", "--max-restarts", "1", "-m", "dilated_attention_pytorch.cli", "train"]
    command += ["--data", str(text), "--folder", str(folder), "--steps", str(STEPS), "--context-parallel", "2"]
    command += ["--timeout", "30", *(part for pair in SETTINGS for part in ("--set", pair))]
    with (tmp_path / "output").open("w") as output:
        torchrun = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while lines_of(folder / "metrics.jsonl") < 17:
                assert torchrun.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            victims = children(torchrun.pid)
            assert len(victims) == 4
            os.kill(victims[2], signal.SIGKILL)
            torchrun.wait(300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(torchrun.pid, signal.SIGKILL)
            torchrun.wait()
    said = (tmp_path / "output").read_text()
    assert torchrun.returncode == 0, said
    assert "after step" in said, "it went on from a checkpoint"
    run = Run.open(folder)
    assert (folder / "report.html").is_file()
    straight = Run.create(tmp_path / "straight", run.settings, run.model_config, text)
    assert run_world(4, undisturbed, straight.path, timeout=120) == [STEPS] * 4
    assert [line["bits_per_byte"] for line in run.read_metrics()] == [
        line["bits_per_byte"] for line in straight.read_metrics()
    ]
