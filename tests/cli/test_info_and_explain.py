"""info and explain tell a user what each backend needs, and what auto goes by."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch.backends import BACKENDS, DenseBackend, SdpaBackend
from dilated_attention_pytorch.backends.base import NoOptions
from dilated_attention_pytorch.backends.tuning import Choice, Key, Measured, Table, Timing, device_name, files, using
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.cli.info import answer, backend_rows, tuning_rows
from dilated_attention_pytorch.testing import support

CPU = torch.device("cpu")
SHAPE = ("--seq-len", "4096", "--segments", "1024,4096", "--rates", "1,4", "--heads", "4")


def call(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250", "TERM": "dumb"})


def test_every_backend_has_its_rows():
    rows = backend_rows(["cpu"])
    assert list(dict.fromkeys(row[0] for row in rows)) == [b.name for b in BACKENDS]
    for backend in BACKENDS:
        mine = [row for row in rows if row[0] == backend.name]
        missing = backend.import_error()
        if missing is not None:
            assert mine == [(backend.name, "any", "any", missing)]
        else:
            assert {row[1:3] for row in mine} == {("cpu", "float32"), ("cpu", "bfloat16")}
            assert all(row[3] for row in mine)
    assert any("chosen by auto" in row[3] for row in rows)


@pytest.mark.parametrize("name", ["flash_attn", "xformers", "triton"])
def test_what_is_not_installed_is_named_with_its_pip_line(name):
    backend = next((b for b in BACKENDS if b.name == name), None)
    if backend is None or backend.import_error() is None:
        pytest.skip(f"{name} is installed here, or no backend")
    for result in (call("info"), call("explain", *SHAPE)):
        assert result.exit_code == 0, result.output
        assert "pip install" in backend.import_error()
        assert backend.import_error() in " ".join(result.output.split()), "a narrow table wraps it"


def test_what_a_backend_cannot_is_said(monkeypatch):
    class Forward(DenseBackend):
        name = "dense"

        def reasons_against(self, problem, plan):
            return ["no backward here"] if problem.needs_grad else []

    for module in ("backends", "explanation"):
        monkeypatch.setattr(f"dilated_attention_pytorch.{module}.BACKENDS", (SdpaBackend(), Forward()))
    assert answer("dense", "cpu", torch.float32) == "can, forward only: no backward here"
    assert answer("sdpa", "cpu", torch.float32) == "can, chosen by auto"
    result = call("explain", *SHAPE, "--training", "--backend", "dense")
    assert "backend   none" in result.output
    assert "no backward here" in result.output


def test_the_tuning_files_in_force_are_shown(tmp_path, monkeypatch):
    own = tmp_path / "tuning.json"
    monkeypatch.setattr(files, "user_file", lambda device: own)
    monkeypatch.setattr("dilated_attention_pytorch.backends.tuning.user_file", lambda device: own)
    monkeypatch.setattr(files._files, "given", None)
    shipped = str(files.SHIPPED["cpu"])
    (absent, _), (second, _) = tuning_rows(CPU)
    assert (absent, second) == (str(own), shipped)
    assert "absent: 'dilated-attention tune'" in tuning_rows(CPU)[0][1]
    own.write_text("{")
    with pytest.warns(RuntimeWarning, match="ignored the tuning file"):
        assert "--force" in tuning_rows(CPU)[0][1]
    key = Key("float32", 64, "dilated-long", 4096, False, False)
    choice = Choice("dense", "DensePlan", NoOptions())
    table = Table(device_name(CPU), {key: (Measured(choice, Timing(1, 1, 1, 1)),)}, 2, "0.3.0", "2.13.0")
    own.write_text(json.dumps(table.to_dict()))
    assert tuning_rows(CPU)[0] == (str(own), f"in force: 1 keys of {device_name(CPU)}, torch 2.13.0")
    assert str(own) in call("info").output


def test_explain_says_what_the_choice_goes_by():
    key = Key("float32", 64, "dilated-long", 4096, False, False)
    choice = Choice("dense", "DensePlan", NoOptions())
    assert "nothing like it was measured" in call("explain", *SHAPE).output
    with using(Table("cpu", {key: (Measured(choice, Timing(1, 1, 1, 1)),)}, source="mine.json")):
        shown, training = call("explain", *SHAPE), call("explain", *SHAPE, "--training")
    assert "dense dense is the fastest measured for float32, D 64, dilated-long" in shown.output
    assert "mine.json" in shown.output
    assert "nothing like it was measured" in training.output


def test_an_unknown_backend_gets_the_list_of_names():
    result = call("explain", *SHAPE, "--backend", "quantum")
    assert result.exit_code == 2
    assert all(repr(b.name) in result.output for b in BACKENDS)


def test_the_support_table_is_printed_as_it_is(monkeypatch):
    table = "| feature | `dense` |\n| --- | --- |\n| [b] | " + "long " * 100 + "|\n"
    monkeypatch.setattr(support, "support_table", lambda: table)
    assert call("info", "--support").output == table
