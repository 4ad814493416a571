"""Tuning measures every candidate that can, keeps what is finished, and auto goes by its file."""

import json
import logging

import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch import InvalidInput, backends, explain
from dilated_attention_pytorch.backends import BACKENDS, DenseBackend, SdpaBackend
from dilated_attention_pytorch.backends.base import NoOptions
from dilated_attention_pytorch.backends.tuning import (
    PATTERN_CLASSES,
    Choice,
    Key,
    Measured,
    Table,
    Timing,
    key_of,
    table_from_dict,
    using,
)
from dilated_attention_pytorch.benchmark import tune as measuring
from dilated_attention_pytorch.benchmark.measure import Spread
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.plans import TilePlan, candidate_plans

CPU = torch.device("cpu")
BOTH = (SdpaBackend(), DenseBackend())
FIRST, SECOND, THIRD = (Choice(name, "DensePlan", NoOptions()) for name in ("first", "second", "third"))


def call(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def _two_backends(monkeypatch):
    """Only what every machine has, so that the tests measure little."""
    monkeypatch.setattr(measuring, "BACKENDS", BOTH)


@pytest.mark.parametrize("key", measuring.grid(["float32"], [16], [64]), ids=str)
def test_an_example_is_of_its_key(key):
    one = measuring.example(key, CPU)
    assert key_of(one.problem, candidate_plans(one.pattern, one.problem)) == key
    assert one.problem.num_heads >= 2


def test_the_grid_of_keys():
    keys = measuring.grid(["float32", "bfloat16"], [32, 64], [100, 128, 16384])
    assert len(keys) == len(set(keys))
    assert {k.pattern for k in keys} == set(PATTERN_CLASSES)
    assert {k.length for k in keys} == {128, 16384}
    assert max(k.length for k in keys if k.pattern in measuring.QUADRATIC and not k.decode) == 128
    for bad in (["int8"], [64], [64], ["causal"]), (["float32"], [0], [64], ["causal"]), (["float32"], [8], [8], ["x"]):
        with pytest.raises(InvalidInput, match="tune: expected"):
            measuring.grid(*bad)


def test_long_examples_have_few_heads():
    key = Key("float32", 16, "causal", 16384, False, False)
    assert measuring.example(key, CPU).problem.num_heads == 2
    assert measuring.example(key._replace(length=64), CPU).problem.num_heads == 8


def test_candidates_can_compute_and_are_not_far_worse():
    one = measuring.example(Key("float32", 16, "causal", 128, False, False), CPU)
    found = measuring.candidates(one.problem, one.pattern, "causal", BOTH)
    assert {c.backend for c in found} == {"sdpa", "dense"}
    assert {c.plan for c in found if c.backend == "sdpa"} == {"StridedPlan", "DensePlan", "TilePlan"}
    for choice, (backend, plan) in found.items():
        assert (backend.name, type(plan).__name__, backend.options) == (choice.backend, choice.plan, choice.options)
        assert backend.reasons_against(one.problem, plan) == []
    window = measuring.example(Key("float32", 16, "window", 4096, False, False), CPU)
    assert {c.plan for c in measuring.candidates(window.problem, window.pattern, "window", BOTH)} == {
        "StridedPlan",
        "TilePlan",
    }


def test_tables_of_tiles_are_candidates_where_they_may_pay():
    class Tiled(DenseBackend):
        name = "tiled"
        plans = (TilePlan,)

    for kind, expected in (("causal", {"tiled"}), ("dilated-short", set()), ("documents", set())):
        one = measuring.example(Key("float32", 16, kind, 128, False, False), CPU)
        assert {c.backend for c in measuring.candidates(one.problem, one.pattern, kind, (Tiled(),))} == expected


def test_a_race_interleaves_drops_the_far_and_leaves_out_the_failed(monkeypatch, caplog):
    order, clock = [], iter(range(10_000))
    cost = {"first": 1, "second": 2, "third": 50}

    def runs(name):
        def run():
            order.append(name)
            for _ in range(cost[name]):
                next(clock)

        return run

    def fails():
        raise RuntimeError("no such kernel\nat length")

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    logging.getLogger("dilated_attention_pytorch").propagate = True
    all_runs = {choice: runs(choice.backend) for choice in (FIRST, SECOND, THIRD)}
    seconds = measuring.race(all_runs | {Choice("bad", "DensePlan", NoOptions()): fails}, 3, limit=10**6)
    assert order == [*("first",) * 2, *("second",) * 2, *("third",) * 2, *("first", "second") * 3]
    assert {c.backend: len(s) for c, s in seconds.items()} == {"first": 3, "second": 3, "third": 1}
    assert "bad dense failed and is left out: no such kernel" in caplog.text
    assert len(measuring.race({FIRST: runs("first")}, 9, limit=0)[FIRST]) == 1


def test_options_are_measured_of_what_came_near(monkeypatch):
    races = []

    def race(runs, rounds):
        races.append([str(choice) for choice in runs])
        return {choice: [1.0 if choice.plan == "StridedPlan" else 1.6] * rounds for choice in runs}

    monkeypatch.setattr(measuring, "race", race)
    ranking = measuring.rank(Key("float32", 16, "causal", 64, False, False), CPU, 4)
    assert races[0] == ["sdpa dense", "sdpa strided", "sdpa tile", "dense dense"]
    assert races[1] == ["sdpa strided", "sdpa strided packed_rows=4096", "sdpa strided packed_rows=65536"]
    assert [m.seconds.rounds for m in ranking] == [4, 4, 4, 1, 1, 1]
    assert measuring.rank(Key("float32", 16, "causal", 64, False, False), CPU, 4, [m.choice for m in ranking]) is None


def test_the_order_of_a_ranking():
    spreads = {FIRST: Spread(1.04, 1, 2, 3), SECOND: Spread(1.0, 1, 2, 3), THIRD: Spread(1.5, 1, 2, 3)}
    ranking = measuring.in_order(spreads)
    assert [m.choice for m in ranking] == [FIRST, SECOND, THIRD], "ties stand as they were given"
    assert ranking[2].seconds == Timing(1.5, 1, 2, 3)
    assert [m.choice for m in measuring.in_order({THIRD: spreads[THIRD], FIRST: spreads[FIRST]})] == [FIRST, THIRD]
    assert measuring.in_order({}) == ()


def test_tune_writes_a_table_that_auto_goes_by_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tuning.json"
    shares = []
    keys = measuring.grid(["float32"], [16], [64], ["causal", "window"])
    table = measuring.tune(keys, CPU, path, rounds=1, progress=shares.append)
    assert set(table.entries) == set(keys)
    assert shares == [(n + 1) / len(keys) for n in range(len(keys))]
    stored = table_from_dict(json.loads(path.read_text()), BACKENDS, "x")
    assert set(stored.entries) == set(keys)
    assert stored.threads == 1
    one = measuring.example(keys[0], CPU)
    with using(stored):
        assert explain(one.problem.q, one.problem.k, one.problem.v, one.pattern).because.startswith(
            str(stored.entries[keys[0]][0].choice)
        )
    again = []
    in_order = measuring.in_order
    monkeypatch.setattr(measuring, "in_order", lambda spreads: again.append(len(spreads)) or in_order(spreads))
    more = measuring.grid(["float32"], [16], [64], ["causal", "documents"])
    assert set(measuring.tune(more, CPU, path, rounds=1).entries) == {*keys, *more}
    assert len(again) == 2, "only documents are new"
    measuring.tune(more, CPU, path, rounds=1, force=True)
    assert len(again) == 2 + len(more)
    monkeypatch.setattr(DenseBackend, "import_error", lambda self: "gone")
    measuring.tune(more[:1], CPU, path, rounds=1)
    assert len(again) == 3 + len(more), "other candidates"
    monkeypatch.setattr(measuring, "versions", lambda: {"dilated-attention-pytorch": "9", "torch": "9"})
    assert set(measuring.tune(more[:1], CPU, path, rounds=1).entries) == {more[0]}, "what another version measured goes"


def test_a_table_for_any_device_is_small_and_readable():
    choices = [Choice("sdpa", "StridedPlan", SdpaBackend.options_type(packed_rows=n)) for n in (4096, 16384)]
    others = [Choice("dense", "DensePlan", NoOptions()), Choice("sdpa", "DensePlan", SdpaBackend().options)]
    ranking = [Measured(choice, Timing(1.0, 1.0, 1.0, 1)) for choice in (*choices, *others)]
    assert [m.choice for m in measuring.best_of_each(ranking)] == [choices[0], *others]
    key = Key("float32", 16, "causal", 64, False, False)
    for entries in ({}, {key: tuple(ranking), key._replace(length=128): tuple(ranking[:1])}):
        table = Table("cpu", entries, 1, "0.3.0", "2.13.0")
        text = measuring.table_text(table)
        assert json.loads(text) == table.to_dict()
        assert len(text.splitlines()) == 9 + max(1, len(entries))


def test_choices_are_shown_by_length():
    def ranked(*names):
        return tuple(
            Measured(Choice(n, "DensePlan", NoOptions()), Timing(i + 1.0, 1, 9, 3)) for i, n in enumerate(names)
        )

    key = Key("float32", 64, "causal", 64, False, False)
    entries = {key: ranked("a", "b"), key._replace(length=128): ranked("a"), key._replace(length=256): ranked("b", "a")}
    entries[key._replace(decode=True)] = ()
    rows = measuring.choice_rows(Table("cpu", entries))
    assert rows == [
        ("float32, D 64, causal, forward", "64-128 a dense (2.00 x); 256 b dense (2.00 x)"),
        ("float32, D 64, causal, decode", ""),
    ]


def test_the_command_measures_shows_and_resumes(tmp_path, monkeypatch):
    target = tmp_path / "table.json"
    words = ("tune", "--quick", "--lengths", "64", "--head-dims", "16", "--patterns", "causal", "--out", str(target))
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert "float32, D 16, causal, training" in result.output
    assert json.loads(target.read_text())["device"] != "cpu"
    monkeypatch.setattr(measuring, "race", None)
    assert call(*words).exit_code == 0
    monkeypatch.undo()
    result = call(*words, "--any-device", "--rounds", "1")
    assert json.loads(target.read_text())["device"] == "cpu"
    with using(table_from_dict(json.loads(target.read_text()), BACKENDS, str(target))):
        shown = call("tune", "--show")
    assert str(target) in shown.output.replace("\n", "")
    assert "float32, D 16, causal, decode" in shown.output
    assert backends.BACKENDS is BACKENDS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--dtypes", "int8"), "expected float16"),
        (("--lengths", "1,x"), "--lengths"),
        (("--lengths", "0"), "at least 1"),
        (("--patterns", "spiral"), "pattern classes"),
        (("--device", "moon"), "--device moon"),
        (("--any-device",), "needs --out"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(arguments, says):
    result = call("tune", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_help_teaches_with_examples():
    result = call("tune", "--help")
    assert "dilated-attention tune --quick" in result.output
    assert "tune" in call("--help").output
