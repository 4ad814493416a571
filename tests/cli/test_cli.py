"""The command line on a small text: what each command writes, says and refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from dilated_attention_pytorch.cli import results
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.models.longnet import LongNetLM
from fresh_interpreters import FreshInterpreters

SMALL = {
    "window": "512",
    "short_window": "128",
    "short_share": "0.34",
    "d_model": "16",
    "nhead": "2",
    "num_layers": "1",
    "dim_feedforward": "32",
    "segment_lengths": "128,512",
    "dilation_rates": "1,2",
    "checkpoint_every": "2",
    "threads": "1",
}
OPTIONS = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def words(result: Result) -> str:
    return " ".join(result.output.split())


def write_text(folder: Path) -> Path:
    random = np.random.RandomState(1)
    vocabulary = ["".join(random.choice(list("abcdefgh"), random.randint(2, 8))) for _ in range(100)]
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(" ".join(random.choice(vocabulary, 500)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _short_continuations() -> Iterator[None]:
    """Of 20 bytes instead of 400, which took most of a command's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "NEW_BYTES", 20)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "books")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    result = call("train", "--data", str(text), "--run", str(run), "--steps", "6", *OPTIONS)
    assert result.exit_code == 0, result.output
    return run


def test_train_leaves_a_whole_run_folder(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    assert files >= {
        "model.safetensors", "config.json", "metrics.jsonl", "loss.png", "context.png", "report.html",
        "training.json", "evaluation.json", "continuation.txt", "checkpoint.safetensors",
    }  # fmt: skip
    assert not list(finished.rglob("*.unfinished"))
    model = LongNetLM.from_pretrained(finished)
    assert model.config.segment_lengths == (128, 512)
    record = json.loads((finished / "training.json").read_text())
    assert record["settings"]["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].endswith("1 thread")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert [row["context"] for row in evaluation["rows"]] == [256, 512]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", (finished / "report.html").read_text())


def test_evaluate_gives_the_figures_of_train(finished: Path) -> None:
    before = json.loads((finished / "evaluation.json").read_text())
    result = call("evaluate", str(finished))
    assert result.exit_code == 0, result.output
    assert json.loads((finished / "evaluation.json").read_text()) == before
    assert "Bits per byte of held-out text" in result.output
    fewer = call("evaluate", str(finished), "--targets", "4")
    assert "in 4 places" in words(fewer)


def test_generate_continues_the_prompt_and_repeats_with_its_seed(finished: Path) -> None:
    arguments = ("generate", str(finished), "--prompt", "abc é", "--max-new-tokens", "30", "--seed", "3")
    first, second = call(*arguments), call(*arguments)
    assert first.exit_code == 0, first.output
    assert first.output.startswith("abc é")
    assert first.output == second.output
    assert first.output != call(*arguments[:-1], "4").output
    piped = CliRunner().invoke(app, ["generate", str(finished), "--prompt", "-", *arguments[4:]], input="abc é")
    assert piped.output == first.output


def test_resume_finishes_an_interrupted_run_with_the_same_numbers(finished: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dilated_attention_pytorch.cli", "train", "--data", str(text), "--run", str(run)]
    # Many steps, so that the signal comes in between; the schedule must be that of the whole run.
    child = subprocess.Popen([*command, "--steps", "5000", *OPTIONS], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text().count("\n"):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 128 + signal.SIGTERM
    assert f"--resume {run}" in " ".join(output.split()).replace(" ", "").replace("--resume", "--resume ")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert (run / "checkpoint.safetensors").exists()
    assert not (run / "model.safetensors").exists()
    for name in ("evaluate", "generate"):
        refused = call(name, str(run))
        assert refused.exit_code == 2
        assert "--resume" in refused.output
    # The same run cut down to a few steps more: its lines so far stay, and it ends.
    record = json.loads((run / "training.json").read_text())
    record["settings"]["steps"] = len(lines) + 2
    (run / "training.json").write_text(json.dumps(record))
    result = call("train", "--resume", str(run))
    assert result.exit_code == 0, result.output
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines) + 2
    assert (run / "report.html").exists()


def test_a_run_in_two_parts_equals_one_in_one_part(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_attention_pytorch.training import loop

    arguments = ("--data", str(text), "--steps", "6", *OPTIONS)
    assert call("train", "--run", str(tmp_path / "one"), *arguments).exit_code == 0
    steps = loop._steps
    with monkeypatch.context() as patch:
        count: list[int] = []
        patch.setattr(loop, "_steps", lambda *a: steps(*a[:5], lambda step: count.append(1), lambda: len(count) >= 3))
        assert call("train", "--run", str(tmp_path / "two"), *arguments).exit_code == 128
    assert call("train", "--resume", str(tmp_path / "two")).exit_code == 0
    one, two = (LongNetLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert evaluations[0] == evaluations[1]


def test_one_short_document_has_no_standard_error_and_still_a_report(tmp_path: Path) -> None:
    file, run = tmp_path / "book.txt", tmp_path / "run"
    file.write_text(" ".join(f"word{number % 97}" for number in range(4000)))
    result = call("train", "--data", str(file), "--run", str(run), "--steps", "1", *OPTIONS)
    assert result.exit_code == 0, result.output
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert all(row["standard_error"] is None and row["bits_per_byte"] > 0 for row in rows)
    assert (run / "report.html").exists()


def test_runs_without_a_name_never_overwrite(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = call("train", "--data", str(text), "--steps", "1", *OPTIONS)
        assert result.exit_code == 0, result.output
    runs = [path for path in Path("runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 2
    assert Path("runs/latest").resolve() == max(path.resolve() for path in runs)
    assert call("generate", "--max-new-tokens", "2").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "--data", "/nowhere"), "does not exist"),
        (("train", "--resume", "/nowhere"), "not a run folder"),
        (("train", "--resume", "runs/x", "--steps", "3"), "leave out --steps"),
        (("train", "--set", "stepz=3"), "window"),
        (("train", "--set", "steps=3", "--steps", "4"), "give it once"),
        (("train", "--set", "window=1.5"), "window"),
        (("train", "--set", "segment_lengths=12,"), "segment_lengths"),
        (("train", "--set", "segment_lengths=128,256,512,1024"), "dilation_rates"),
        (("train", "--set", "learning_rate=-1"), "learning_rate"),
        (("train", "--set", "window=512"), "short_window"),
        (("train", "--device", "tpu"), "device"),
        (("train", "--autocast", "fp8"), "autocast"),
        (("evaluate", "/nowhere"), "not a run folder"),
        (("evaluate", "/nowhere", "--targets", "1"), "--targets"),
        (("generate", "/nowhere"), "not a run folder"),
        (("generate", "/nowhere", "--prompt", ""), "--prompt"),
        (("generate", "/nowhere", "--stop", "ab"), "--stop"),
        (("explain", "--seq-len", "64", "--segments", "16,x", "--rates", "1,2"), "--segments"),
        (("explain", "--seq-len", "64", "--segments", "16,32", "--rates", "1"), "dilation_rates"),
        (("explain", "--seq-len", "-1", "--segments", "16", "--rates", "1"), "--seq-len"),
        (("explain", "--seq-len", "64", "--segments", "16", "--rates", "1", "--device", "moon"), "--device"),
        (("explain", "--seq-len", "64", "--segments", "16", "--rates", "1", "--dtype", "int8"), "--dtype"),
        (("--log-level", "loud", "info"), "--log-level"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_red_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert says in words(result)
    assert "error: " in result.output
    assert "Traceback" not in result.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_damaged_model_is_named(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-8])
    result = call("generate", str(run))
    assert result.exit_code == 2
    assert "model.safetensors" in words(result)
    shutil.copy(finished / "model.safetensors", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "d_model": 10**9}))
    result = call("evaluate", str(run))
    assert result.exit_code == 2
    assert "config.json" in words(result)


def test_info_and_explain_name_the_backends() -> None:
    result = call("info")
    assert result.exit_code == 0, result.output
    for text in (torch.__version__, "sdpa", "dense", "chosen by auto"):
        assert text in result.output
    result = call("explain", "--seq-len", "1000000", "--segments", "2048,32768", "--rates", "1,12", "--causal")
    assert result.exit_code == 0, result.output
    for text in ("sdpa", "FLOPs", "Causal"):
        assert text in result.output


def test_help_teaches_with_examples() -> None:
    for command in ("train", "evaluate", "generate", "explain"):
        result = call(command, "--help")
        assert result.exit_code == 0
        assert f"dilated-attention {command}" in result.output
    commands = call("--help").output
    assert all(name in commands for name in ("train", "evaluate", "generate", "info", "explain"))


def test_a_missing_module_of_the_process_is_not_needed_for_help(fresh_interpreters: FreshInterpreters) -> None:
    code = (
        "import sys, dilated_attention_pytorch\n"
        "before = set(sys.modules)\n"
        "import dilated_attention_pytorch.cli.app\n"
        "late = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not late & {'matplotlib', 'safetensors'}, late\n"
        "own = [name for name in sys.modules if name.startswith('dilated_attention_pytorch.')]\n"
        "assert not [name for name in own if '.training' in name or '.reports' in name or '.models' in name], own\n"
    )
    fresh_interpreters.run(code)
