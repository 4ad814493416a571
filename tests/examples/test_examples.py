"""The examples run, and show what they claim."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_patterns_agree_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "patterns.py"), run_name="__main__")
    text = capsys.readouterr().out
    errors = [float(x) for x in re.findall(r"against the reference (\S+)", text)]
    assert len(errors) == 3
    assert max(errors) < 1e-5
    assert "pairs" in text


def test_slides_of_different_sizes_are_learnt() -> None:
    module = runpy.run_path(str(EXAMPLES / "slides.py"))
    assert module["main"](steps=12) >= 0.75  # 16 fresh slides; guessing gives about a half
