"""estimate prints every number that it goes by, and explain the plan of a world."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dilated_attention_pytorch import Causal, longnet
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.cli.estimate import assumptions, tables, whole_number
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel import choice
from dilated_attention_pytorch.parallel.estimate import Job, Stack, estimate
from dilated_attention_pytorch.parallel.explanation import explain_world
from dilated_attention_pytorch.parallel.machines import MACHINES

SHAPE = ("--tokens", "1e6", "--world", "16", "--segments", "2048,65536", "--rates", "1,16")


def call(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"TERM": "dumb"})


def asked(**changes):
    return estimate(Job(Stack(), longnet([2048, 65536], [1, 16]), 10**6, 16, **changes), MACHINES["h100"])


def test_the_tables_hold_the_estimate(monkeypatch):
    monkeypatch.setattr(
        "dilated_attention_pytorch.cli.estimate.out", Console(width=300)
    )  # a narrow terminal folds cells
    result = call("estimate", *SHAPE)
    assert result.exit_code == 0, result.output
    found = asked()
    assert str(found.attention) in result.output
    for table in tables(found, set()):
        assert table.title in result.output
        for row in table.rows:
            assert all(cell in result.output for cell in row), row
    assert f"{found.seconds:.4g} s a step" in result.output
    assert "fits 80 GB" in result.output
    memory, work, wire, time, inputs = tables(found, set())
    assert memory.rows[-1][:2] == ("together", f"{found.memory_bytes / 1e6:,.1f}")
    assert work.rows[-1][1] == f"{sum(x.amount for x in found.flops) / 1e12:,.2f}"
    assert [row[0] for row in wire.rows] == [c.name for c in found.wire]
    assert time.rows[-1][1] == f"{1e3 * found.seconds:,.2f}"
    assert MACHINES["h100"].source in inputs.note


def test_json_holds_everything():
    result = call("estimate", *SHAPE, "--json", "--causal", "--layout", "zigzag", "--checkpoint-activations")
    told = json.loads(result.output)
    job = Job(
        Stack(), longnet([2048, 65536], [1, 16]) & Causal(), 10**6, 16, layout="zigzag", checkpoint_activations=True
    )
    assert told == json.loads(json.dumps(estimate(job, MACHINES["h100"]).to_dict()))
    assert told["job"]["context"] == 16
    assert told["layout"] == "zigzag"
    assert set(told) > {"memory", "flops", "wire", "times", "machine", "seconds", "imbalance", "refused"}


def test_every_input_of_the_times_can_be_replaced():
    before = json.loads(call("estimate", *SHAPE, "--json").output)
    for _, _, _, name in assumptions(MACHINES["h100"], set()):
        value = before["machine"][name] * 3 // 2 if isinstance(before["machine"][name], int) else 0.5
        after = json.loads(call("estimate", *SHAPE, "--json", "--set", f"{name}={value}").output)
        assert after["machine"] == before["machine"] | {name: value}
    fields = {k for k, v in before["machine"].items() if not isinstance(v, str)}
    assert fields == {row[3] for row in assumptions(MACHINES["h100"], set())}, "an input is not printed"
    half = json.loads(call("estimate", *SHAPE, "--json", "--set", "attained=0.2").output)
    assert half["times"][0]["amount"] == pytest.approx(2 * before["times"][0]["amount"])
    shown = call("estimate", *SHAPE, "--set", "attained=0.2").output
    (line,) = (line for line in shown.splitlines() if line.strip().startswith("share of the rate"))
    assert line.split()[-3:] == ["0.2", "--set", "attained"]


def test_model_and_sharing_are_options():
    told = json.loads(
        call(
            "estimate", "--tokens", "65_536", "--world", "8", "--segments", "1024", "--rates", "2", "--hidden", "96",
            "--layers", "3", "--heads", "8", "--kv-heads", "4", "--feedforward", "100", "--vocabulary", "50",
            "--context", "4", "--inner", "2", "--method", "ring", "--dtype", "fp32", "--gpu", "a100", "--json",
        ).output
    )  # fmt: skip
    stack = Stack(96, 3, 8, 4, 100, 50)
    assert told["stack"]["parameters"] == stack.parameters
    assert (told["job"]["context"], told["job"]["inner"], told["method"]) == (4, 2, "ring")
    assert told["machine"]["half_rate"] == MACHINES["a100"].half_rate
    assert "at 40% of 19.5 TFLOP/s" in told["times"][0]["note"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tokens", "1.5"), "whole number"),
        (("--tokens", "many"), "--tokens"),
        (("--world", "0"), "world"),
        (("--rates", "1"), "rates"),
        (("--segments", "a,b"), "--segments"),
        (("--gpu", "abacus"), "a100, h100"),
        (("--dtype", "int8"), "bf16"),
        (("--heads", "7"), "multiple of heads"),
        (("--layout", "spiral"), "layout"),
        (("--method", "tree"), "method"),
        (("--method", "all_to_all"), "must divide"),
        (("--context", "5"), "divide"),
        (("--set", "speed=3"), "attained"),
        (("--set", "attained=2"), "attained"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    result = call("estimate", *SHAPE, *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert said in result.output


def test_whole_numbers():
    assert whole_number("--tokens", "2.5e3") == 2500
    for bad in ("1e400", "nan", "2.5"):
        with pytest.raises(InvalidInput, match="--tokens"):
            whole_number("--tokens", bad)


def test_explain_shows_the_plan_of_a_world():
    shape = ("--seq-len", "65536", "--segments", "1024,65536", "--rates", "1,8", "--heads", "8", "--causal")
    result = call("explain", *shape, "--world", "4", "--layout", "zigzag", "--method", "gather", "--gpu", "h200")
    assert result.exit_code == 0, result.output
    x = torch.empty(1, 65536, 8, 64, device="meta")
    found = explain_world(
        x, x, x, longnet([1024, 65536], [1, 8]) & Causal(), world=4, layout="zigzag", method="gather", machine="h200"
    )
    assert result.output == str(found) + "\n"
    mixed = call("explain", *shape, "--world", "4", "--inner", "2", "--method", "ring")
    assert "all_to_all among 2 and ring among 2" in mixed.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layout", "zigzag"), "--layout is about ranks"),
        (("--gpu", "h100"), "--gpu is about ranks"),
        (("--world", "2", "--backend", "dense"), "leave out --backend"),
        (("--world", "2", "--training"), "leave out --backend and --training"),
        (("--world", "0"), "at least one rank"),
        (("--world", "4", "--inner", "3"), "divisor"),
    ],
)
def test_explain_ignores_no_option(arguments, said):
    result = call("explain", "--seq-len", "4096", "--segments", "1024", "--rates", "1", *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_billion_tokens_on_a_thousand_ranks(monkeypatch):
    monkeypatch.setattr(choice, "ASKED_RANKS", 4)
    segments, rates = "2048,32768,1048576", "1,16,512"
    result = call(
        "estimate", "--tokens", "1e9", "--world", "1024", "--segments", segments, "--rates", rates, "--hidden", "768",
        "--layers", "12", "--gpu", "h200", "--checkpoint-activations", "--json",
    )  # fmt: skip
    told = json.loads(result.output)
    assert told["method"] == "gather"
    assert told["pairs_are_exact"]
    assert told["fits"]
