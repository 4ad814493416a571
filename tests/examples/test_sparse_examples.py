"""The examples of block-sparse and adaptive attention run, and show what they claim."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_block_sparse_layer_agrees_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "block_sparse.py"))
    assert module["main"]() < 1e-5
    computed = float(re.search(r"computed: (\S+)%", capsys.readouterr().out)[1])
    assert 5 < computed < 25


def test_more_budget_keeps_more_of_a_trained_models_attention(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "adaptive.py"))
    bits = module["main"](steps=8)
    text = capsys.readouterr().out
    rows = re.findall(r"^(\w.*?) +(\d+)% +(\d+)% +(\S+)", text, re.MULTILINE)
    assert len(rows) == 12
    kept = {(name, int(budget)): int(mass) for name, budget, mass, _ in rows}
    for name in module["SCORES"]:
        assert kept[name, 5] <= kept[name, 10] < kept[name, 20]
        assert all(kept[name, budget] <= kept["oracle", budget] for budget in (5, 10, 20))
    assert {name for name, _ in bits} == {"full", *module["SCORES"]} - {"oracle"}
    assert all(0 < value < 8.5 for value in bits.values())
