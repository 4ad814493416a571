"""A checkpoint comes back whole or not at all: damage is named, and nothing is changed by it."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_reader import SETTINGS, Reader
from safetensors.torch import load_file, save_file

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.training.checkpoint import FORMAT, Progress, load_checkpoint, save_checkpoint
from dilated_attention_pytorch.training.loop import adamw, train
from dilated_attention_pytorch.training.run import Run, new_run_folder, point_latest

NewRun = Callable[..., Run]
NewReader = Callable[[], Reader]


@pytest.fixture
def checkpoint(new_run: NewRun, reader: NewReader) -> Path:
    run = new_run("run", steps=4)
    train(reader(), run)
    return run.checkpoint


def rewrite(
    path: Path, change: Callable[[dict[str, torch.Tensor]], None], metadata: dict[str, str] | None = None
) -> None:
    tensors = load_file(path)
    change(tensors)
    progress = json.dumps({"step": 4, "seconds": 1.0})
    save_file(tensors, path, {"format": FORMAT, "progress": progress, **(metadata or {})})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6])


def pickle_bomb(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def missing_tensor(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.__delitem__("optimizer.exp_avg.embedding.weight"))


def other_shape(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"model.embedding.weight": torch.zeros(256, 17)}))


def other_dtype(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"model.embedding.weight": torch.zeros(256, 16).half()}))


def broken_random_state(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"random.cpu": torch.full_like(tensors["random.cpu"], 255)}))


def other_format(path: Path) -> None:
    rewrite(path, lambda tensors: None, {"format": "something else"})


def no_progress(path: Path) -> None:
    rewrite(path, lambda tensors: None, {"progress": "[" * 100_000})


def impossible_step(path: Path) -> None:
    rewrite(path, lambda tensors: None, {"progress": '{"step": -3, "seconds": 1}'})


DAMAGES = [
    truncate,
    only_header,
    pickle_bomb,
    huge_header,
    missing_tensor,
    other_shape,
    other_dtype,
    broken_random_state,
    other_format,
    no_progress,
    impossible_step,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_changes_nothing(
    checkpoint: Path, reader: NewReader, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint)
    model = reader()
    optimizer = adamw(model, SETTINGS)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(InvalidInput, match=r"checkpoint\.safetensors"):
        load_checkpoint(checkpoint, model, optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not optimizer.state


def test_everything_comes_back_bit_for_bit(tmp_path: Path, reader: NewReader) -> None:
    model = reader()
    optimizer = adamw(model, SETTINGS)
    model(torch.randint(256, (1, 20))).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.get_buffer("scale").fill_(3.0)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, Progress(9, 2.5))
    drawn = torch.rand(5)
    other = reader()
    again = adamw(other, SETTINGS)
    with torch.random.fork_rng(devices=[]):
        assert load_checkpoint(tmp_path / "c.safetensors", other, again) == Progress(9, 2.5)
        assert torch.equal(torch.rand(5), drawn)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    for mine, yours in zip(model.parameters(), other.parameters(), strict=True):
        for quantity, value in optimizer.state[mine].items():
            assert torch.equal(again.state[yours][quantity], value)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_folder_that_is_no_run_says_so(tmp_path: Path, new_run: NewRun) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match=r"no training\.json"):
        Run.open(tmp_path)
    run = new_run("run")
    with pytest.raises(InvalidInput, match="--resume"):
        new_run("run")
    record = json.loads((run.path / "training.json").read_text())
    for bad in (
        "{",
        "[1]",
        "[" * 100_000,
        json.dumps({**record, "format_version": 99}),
        json.dumps({**record, "text": 3}),
    ):
        (run.path / "training.json").write_text(bad)
        with pytest.raises(InvalidInput, match=r"training\.json"):
            Run.open(run.path)
    record["text"]["digest"] = "../../../../etc/passwd"
    (run.path / "training.json").write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match="digest"):
        Run.open(run.path)


def test_a_refused_text_leaves_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InvalidInput, match="too little"):
        Run.create(tmp_path / "run", SETTINGS, {}, tmp_path / "short.txt")
    assert not (tmp_path / "run").exists()


def test_runs_get_names_of_their_own_and_latest_leads_to_the_newest(tmp_path: Path) -> None:
    first, second = new_run_folder(tmp_path / "runs"), new_run_folder(tmp_path / "runs")
    assert first != second
    for path in (first, second):
        point_latest(path)
        assert (tmp_path / "runs" / "latest").resolve() == path.resolve()
    (tmp_path / "runs" / "latest").unlink()
    (tmp_path / "runs" / "latest").mkdir()
    point_latest(first)
    assert not (tmp_path / "runs" / "latest").is_symlink()
