"""The grid has the shapes that matter, and its verdict on auto is arithmetic on measured seconds."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch import Causal, attend, explain, longnet
from dilated_attention_pytorch.backends import DenseBackend, SdpaBackend
from dilated_attention_pytorch.backends.base import NoOptions
from dilated_attention_pytorch.backends.tuning import Choice, Measured, Table, Timing, key_of, pattern_class, using
from dilated_attention_pytorch.benchmark import grid, run
from dilated_attention_pytorch.benchmark.grid import GRID, Shape
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import make_problem

TINY = (
    Shape("one", Causal(), 24, 2, 8, queries=1),
    Shape("two", longnet([8, 16], [1, 2]), 24, 4, 8, batch=2, kv_heads=2, training=True, visible=(1.0, 0.3)),
)


@pytest.fixture(autouse=True)
def _two_backends(monkeypatch):
    for name in ("backends", "explanation", "benchmark.grid"):
        monkeypatch.setattr(f"dilated_attention_pytorch.{name}.BACKENDS", (SdpaBackend(), DenseBackend()))


def test_the_grid_covers_what_matters():
    assert len(GRID) >= 12
    assert len({shape.name for shape in GRID}) == len(GRID)
    assert {shape.head_dim for shape in GRID} >= {32, 48, 64, 128}
    assert {shape.training for shape in GRID} == {True, False}
    assert {shape.dtype for shape in GRID} >= {torch.float32, torch.bfloat16}
    kinds = {pattern_class(shape.pattern) for shape in GRID}
    assert kinds >= {"full", "causal", "window", "documents", "dilated-short", "dilated-long", "dilated-long-causal"}
    assert any(shape.queries == 1 for shape in GRID)
    assert any(shape.visible for shape in GRID)
    assert any(shape.kv_heads for shape in GRID)
    assert min(s.keys for s in GRID) <= 128
    assert max(s.keys for s in GRID) >= 32768


@pytest.mark.parametrize("shape", GRID, ids=lambda s: s.name)
def test_shapes_are_legal(shape):
    small = replace(shape, keys=min(shape.keys, 300), heads=shape.kv_heads or 1, head_dim=8)
    (q, k, v), mask = small.inputs()
    assert q.requires_grad == shape.training
    if pattern_class(shape.pattern) != "documents":  # their lengths are those of the whole
        assert attend(q, k, v, small.pattern, key_padding_mask=mask).shape == q.shape
    assert "D 8" in small.describe()


def test_auto_against_every_backend():
    calls = []
    results = grid.measure_grid(2, lambda: calls.append(1), TINY)
    assert len(calls) == 2
    assert results["threads"] == 1
    for figures in results["shapes"].values():
        assert figures["auto / best"]["rounds"] == 2
        assert {"auto", "sdpa"} <= set(figures["milliseconds"])
        assert figures["auto takes"].startswith("sdpa")
        assert {*figures["milliseconds"], *figures["far behind, one call"]} == {"auto", "sdpa", "dense"}
    rows = grid.grid_rows(results)
    assert [len(row) for row in rows] == [len(grid.GRID_COLUMNS)] * 2
    assert rows[1][0] == "two: B 2, N 24, H 4, Hkv 2, D 8, float32, training"


def test_a_wrong_choice_is_flagged(monkeypatch):
    """A table that names the slow backend, and rounds that say so."""
    shape = TINY[0]
    (q, k, v), _ = shape.inputs()
    problem = make_problem(q, k, v, scale=1.0, query_start=23)
    key = key_of(problem, candidate_plans(shape.pattern, problem))
    choice = Choice("dense", "DensePlan", NoOptions())

    def rounds(runs, count):
        return {name: [{"auto": 2.0, "dense": 2.1, "sdpa": 1.0}[name]] * count for name in runs}

    monkeypatch.setattr(grid, "interleaved_seconds", rounds)
    monkeypatch.setattr(grid, "one_call", lambda run: 1.0)
    with using(Table("cpu", {key: (Measured(choice, Timing(1, 1, 1, 1)),)})):
        figures = grid.measure_shape(shape, 3)
    assert figures["auto takes"] == "dense, dense"
    assert figures["best"] == "sdpa"
    assert figures["behind"]
    assert figures["auto / best"]["median"] == 0.5
    assert grid.grid_rows({"shapes": {"x": figures}})[0][-1] == "BEHIND"
    untuned = grid.measure_shape(shape, 3)
    assert untuned["auto takes"].startswith("sdpa")
    assert not untuned["behind"], "the best is what auto takes: what is left is noise"


def test_the_far_are_called_once_and_dense_not_at_all_on_long_problems(monkeypatch):
    seconds = iter([1.0, 1.1, 9.0])
    monkeypatch.setattr(grid, "one_call", lambda run: next(seconds))
    figures = grid.measure_shape(TINY[0], 1)
    assert figures["far behind, one call"] == {"dense": 9000.0}
    assert set(figures["milliseconds"]) == {"auto", "sdpa"}
    monkeypatch.setattr(grid, "FAR_PAIRS", 100)
    far = Shape("far", longnet([8], [4]), 64, 1, 8)
    assert set(grid.runs_of(far)[0]) == {"auto", "sdpa"}
    assert explain(*far.inputs()[0], far.pattern).backends["dense"] == ()


def test_the_command_prints_and_stores_the_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "GRID", TINY)
    monkeypatch.setattr(grid.measure_grid, "__defaults__", (None, TINY))
    words = ["bench", "--only", "grid", "--rounds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "250", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert "of 2 shapes are more than 10 % behind" in result.output
    (stored,) = tmp_path.rglob("grid.json")
    assert stored.parent.name == run.device_folder(run.about(1)["device"])
