"""Several processes train as one: the same losses, norms and weights, one run folder, and stops that all agree on."""

import dataclasses
import functools
import json
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shared_runs import free_port
from typer.testing import CliRunner

from dilated_attention_pytorch import InvalidInput, LongNetLM
from dilated_attention_pytorch.cli import results
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.cli.train import _chosen
from dilated_attention_pytorch.training.loop import batch_at, train
from dilated_attention_pytorch.training.model import gathered_model
from dilated_attention_pytorch.training.ranks import (
    ALONE,
    Ranks,
    check_sharing,
    form_ranks,
    launched,
    launched_size,
    shared_anew,
)
from dilated_attention_pytorch.training.run import Run
from dilated_attention_pytorch.training.settings import TrainingSettings
from parallel.worlds import ends_of_world, run_world

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worlds are forked")
SETTINGS = TrainingSettings(
    steps=6,
    window=90,
    short_window=61,  # no number of ranks divides it
    short_share=0.5,
    batch_size=4,
    warmup_steps=2,
    learning_rate=1e-2,
    checkpoint_every=6,
    seed=7,
)


def build_model(dtype=torch.float64, **options):
    torch.manual_seed(5)
    branches = {"segment_lengths": [16, 32, 64], "dilation_rates": [1, 2, 4]}
    return LongNetLM(256, 32, 4, 0, 2, 64, **branches, embedding_width=3, dtype=dtype, **options)


def trained_share(path, changes, dtype, options):
    """One rank's training of the run in ``path``: losses, norms, and the whole weights on the first rank."""
    run = Run.open(path)
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, **changes))
    ranks, model, steps = form_ranks(run.settings, timedelta(seconds=60)), build_model(dtype, **options), []
    train(model, run, steps.append, ranks=ranks)
    whole = gathered_model(model, ranks)
    weights = None if whole is None else {name: x.detach() for name, x in whole.state_dict().items()}
    return [(step.bits_per_byte, step.gradient_norm) for step in steps], weights


def trained_shares(cases):
    return [trained_share(*case) for case in cases]


@pytest.fixture
def compare(new_run, request):
    """Assert that a world trains as one process does, each run with its changes, within a limit."""

    def check(size, cases):
        prepared = []
        for number, (changes, dtype, options, _) in enumerate(cases):
            fields = dataclasses.asdict(SETTINGS)
            prepared.append((new_run(f"{number}-of-{size}", **fields).path, changes, dtype, options))
        ends = run_world(size, trained_shares, prepared, timeout=180)
        for number, (changes, dtype, options, limit) in enumerate(cases):
            alone, steps = new_run(f"{number}-alone-{size}", **dataclasses.asdict(SETTINGS)), []
            model = build_model(dtype, **options)
            train(model, alone, steps.append)
            expected = [(step.bits_per_byte, step.gradient_norm) for step in steps]
            for rank, end in enumerate(ends):
                found, weights = end[number]
                assert found == ends[0][number][0], f"{changes}: rank {rank} has seen other numbers"
                assert len(found) == SETTINGS.steps
                assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < limit, f"{changes}: {found}"
                assert (weights is None) == (rank > 0)
            for name, x in model.state_dict().items():
                torch.testing.assert_close(
                    ends[0][number][1][name], x, rtol=0, atol=10 * limit, msg=f"{changes}: {name}"
                )
            run = Run.open(prepared[number][0])
            assert [line["bits_per_byte"] for line in run.read_metrics()] == [bits for bits, _ in ends[0][number][0]]

    return check


DOUBLE, SINGLE = torch.float64, torch.float32


def test_two_processes_train_as_one(compare):
    compare(
        2,
        [
            ({"context_parallel": 2, "layout": "zigzag"}, DOUBLE, {"checkpoint_activations": True}, 1e-6),
            ({"context_parallel": 2, "parallel": "ddp"}, DOUBLE, {"position": "none"}, 1e-6),
            ({}, DOUBLE, {}, 1e-6),
            ({"context_parallel": 2, "layout": "striped"}, SINGLE, {}, 1e-4),
            ({"parallel": "ddp", "gradient_compression": "fp16"}, DOUBLE, {}, 2e-2),
        ],
    )


@pytest.mark.nightly
def test_meshes_of_two_dims_train_as_one(compare):
    both = [
        ({"context_parallel": 2, "layout": layout, "parallel": parallel}, dtype, {"tie_embeddings": tied}, limit)
        for layout, parallel, tied in (
            ("contiguous", "fsdp", True),
            ("zigzag", "ddp", False),
            ("striped", "fsdp", False),
        )
        for dtype, limit in ((DOUBLE, 1e-6), (SINGLE, 1e-4))
    ]
    compare(4, both)
    compare(3, [({"context_parallel": 3, "layout": layout}, DOUBLE, {}, 1e-6) for layout in ("zigzag", "striped")])


def compressed(path):
    changes = {"parallel": "ddp", "gradient_compression": "powersgd", "context_parallel": 2}
    return [bits for bits, _ in trained_share(path, changes, SINGLE, {})[0]]


def test_powersgd_learns_and_sends_something_else(new_run):
    run, alone, plain = (
        new_run("run", **dataclasses.asdict(SETTINGS)),
        new_run("alone", **dataclasses.asdict(SETTINGS)),
        [],
    )
    ends = run_world(2, compressed, run.path, timeout=60)
    train(build_model(SINGLE), alone, plain.append)
    exact = [step.bits_per_byte for step in plain]
    assert ends[0] == ends[1]
    assert ends[0][:3] == pytest.approx(exact[:3], abs=1e-4)  # its first two gradients are whole
    assert abs(ends[0][-1] - exact[-1]) > 1e-3
    assert ends[0][-1] < ends[0][0] - 0.3


def asked_to_stop(path):
    run = Run.open(path)
    ranks, steps = form_ranks(run.settings, timedelta(seconds=20)), []
    return train(build_model(), run, steps.append, lambda: ranks.rank == 1 and len(steps) == 2, ranks)


def test_a_stop_asked_of_one_rank_stops_all(new_run):
    run = new_run("run", **dataclasses.asdict(SETTINGS))
    assert run_world(2, asked_to_stop, run.path, timeout=60) == [2, 2]
    assert len(run.read_metrics()) == 2


def shares_of_a_batch():
    settings = dataclasses.replace(SETTINGS, context_parallel=2, layout="zigzag")
    ranks = form_ranks(settings)
    batch = torch.arange(4 * 8).view(4, 8)
    tokens, labels = ranks.deal(batch)

    for error in (InvalidInput("no such text"), OSError("no space left")):
        with pytest.raises(type(error), match=str(error)):
            ranks.on_first(lambda error=error: (_ for _ in ()).throw(error))
    told = ranks.on_first(lambda: f"from {ranks.rank}")
    total = ranks.total(torch.tensor(float(ranks.rank)))
    return tokens, labels, told, ranks.any(ranks.rank == 3), ranks.any(False), float(total)


def test_what_each_rank_is_dealt_and_told():
    ends = run_world(4, shares_of_a_batch)
    batch = torch.arange(4 * 8).view(4, 8)
    for rank, (tokens, labels, *told) in enumerate(ends):
        rows, places = batch[rank // 2 * 2 :][:2], [[0, 1, 6], [2, 3, 4, 5]][rank % 2]  # chunks of 2, 2, 2 and 1 tokens
        assert torch.equal(tokens, rows[:, :-1][:, places])
        assert torch.equal(labels, rows[:, 1:][:, places])
        assert told == ["from 0", True, False, 6.0]


def test_one_process_sends_nothing():
    assert form_ranks(SETTINGS) is ALONE
    assert Ranks().is_first
    assert not launched()
    assert launched_size() == 1
    tokens, labels = ALONE.deal(torch.arange(6).view(1, 6))
    assert tokens.tolist() == [[0, 1, 2, 3, 4]]
    assert labels.tolist() == [[1, 2, 3, 4, 5]]
    assert not ALONE.any(False)
    model = torch.nn.Linear(2, 2)
    assert ALONE.share(model, SETTINGS) is model
    assert gathered_model(model, ALONE) is model


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"context_parallel": 2}, 1, "torchrun --nproc-per-node 2"),
        ({"parallel": "ddp", "gradient_compression": "fp16"}, 1, "torchrun"),
        ({"context_parallel": 3}, 4, "must divide the number of processes, 4"),
        ({"batch_size": 3}, 2, "batch_size 3"),
        ({"batch_size": 1, "context_parallel": 2}, 4, "--set batch_size=2"),
    ],
)
def test_processes_that_cannot_share_the_work_are_refused(changes, size, words):
    with pytest.raises(InvalidInput, match=words):
        check_sharing(dataclasses.replace(SETTINGS, **changes), size)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_parallel": 0}, "context_parallel"),
        ({"layout": "zigzag"}, "context_parallel is 1"),
        ({"layout": "spiral", "context_parallel": 2}, "'striped'"),
        ({"parallel": "tensor"}, "'fsdp', 'ddp'"),
        ({"gradient_compression": "fp16"}, "fully_shard has none"),
        ({"parallel": "ddp", "gradient_compression": "bf16"}, "NCCL"),
        ({"parallel": "ddp", "gradient_compression": "int8"}, "'powersgd'"),
    ],
)
def test_settings_of_sharing_are_checked(changes, words):
    with pytest.raises(InvalidInput, match=words):
        dataclasses.replace(SETTINGS, **changes)


def test_a_run_goes_on_shared_in_another_way():
    begun = dataclasses.replace(
        SETTINGS, context_parallel=4, layout="zigzag", parallel="ddp", gradient_compression="fp16"
    )
    assert shared_anew(begun, {}, 4) == begun
    assert shared_anew(begun, {}, 1) == dataclasses.replace(SETTINGS, parallel="ddp")
    halved = shared_anew(begun, {"context_parallel": 2, "layout": "striped"}, 2)
    assert (halved.context_parallel, halved.layout, halved.gradient_compression) == (2, "striped", "fp16")
    assert shared_anew(begun, {"parallel": "fsdp"}, 4).gradient_compression == "none"
    with pytest.raises(InvalidInput, match="torchrun"):
        check_sharing(shared_anew(begun, {"context_parallel": 2}, 1), 1)


def test_runs_from_before_several_processes_still_open(new_run):
    run = new_run("run", **dataclasses.asdict(SETTINGS))
    file = run.path / "training.json"
    record = json.loads(file.read_text())
    for name in ("context_parallel", "layout", "parallel", "gradient_compression"):
        del record["settings"][name]
    file.write_text(json.dumps(record))
    assert Run.open(run.path).settings == SETTINGS
    assert batch_at(0, Run.open(run.path)).shape == (4, 62)


SMALL = {
    "window": "256",
    "short_window": "128",
    "d_model": "16",
    "nhead": "2",
    "num_layers": "1",
    "dim_feedforward": "32",
    "segment_lengths": "64,256",
    "dilation_rates": "1,2",
    "checkpoint_every": "2",
    "threads": "1",
}


@pytest.fixture
def books(tmp_path):
    """Documents enough that standard errors are finite."""
    words = np.random.RandomState(1).choice(["alpha", "beta", "gamma", "delta"], (20, 300))
    (tmp_path / "books").mkdir()
    for number, chosen in enumerate(words):
        (tmp_path / "books" / f"{number}.txt").write_text(" ".join(chosen))
    return tmp_path / "books"


def command_on_a_rank(port, *arguments):
    """What the command prints on this rank when torchrun starts it, and its exit code."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output, repr(result.exception)


def test_the_command_under_torchrun_makes_one_run_and_goes_on_with_one_process(tmp_path, books, monkeypatch):
    monkeypatch.setattr(results, "write_results", functools.partial(results.write_results, targets=4))
    monkeypatch.setattr(results, "NEW_BYTES", 8)
    small = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    new = ["train", "--data", str(books), "--steps", "4", "--timeout", "30", *small]
    alone = CliRunner().invoke(app, [*new, "--run", str(tmp_path / "alone")])  # first: ranks inherit what it imports
    assert alone.exit_code == 0, alone.output
    path, no = tmp_path / "run", ["--run", str(tmp_path / "no"), "--set", "batch_size=3"]
    for code, said, _ in ends_of_world(2, command_on_a_rank, free_port(), *new, *no, timeout=60):
        assert code == 2
        assert "batch_size 3 cannot be dealt" in " ".join(said.split())
    assert not (tmp_path / "no").exists()
    shared = ["--run", str(path), "--context-parallel", "2", "--layout", "zigzag"]
    ends = run_world(2, command_on_a_rank, free_port(), *new, *shared, timeout=120)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "2 with fsdp, 2 to a sequence (zigzag)" in ends[0][1]
    for words in ("bits/byte", "report  "):
        assert words in ends[0][1]
        assert words not in ends[1][1]
    record = json.loads((path / "training.json").read_text())
    assert (record["settings"]["context_parallel"], record["settings"]["layout"]) == (2, "zigzag")
    assert record["device"].startswith("2 processes, each on ")
    assert record["settings"]["batch_size"] == 1
    assert LongNetLM.from_pretrained(path).config.d_model == 16
    one, two = ([line["bits_per_byte"] for line in Run.open(p).read_metrics()] for p in (tmp_path / "alone", path))
    assert two == pytest.approx(one, abs=1e-4)
    record["settings"]["steps"] = 6
    (path / "training.json").write_text(json.dumps(record))
    longer = CliRunner().invoke(app, ["train", "--resume", str(path)])
    assert longer.exit_code == 0, longer.output
    assert [line["bits_per_byte"] for line in Run.open(path).read_metrics()][:4] == two
    assert len(Run.open(path).read_metrics()) == 6


def test_each_rank_of_data_is_dealt_one_sequence_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_size() == 4
    for given, pairs, expected in (({"context_parallel": 2}, [], 2), ({}, [], 4), ({}, ["batch_size=8"], 8)):
        assert _chosen(given, pairs)[0].batch_size == expected
