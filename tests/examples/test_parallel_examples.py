"""The examples on many ranks run, and compute what one process computes."""

import runpy
from pathlib import Path

import pytest
import torch.distributed as dist

from parallel.worlds import run_world

EXAMPLES = Path(__file__).parents[2] / "examples"


def _five_lines():
    module = runpy.run_path(str(EXAMPLES / "parallel_in_five_lines.py"))
    return module["main"]()


def test_a_model_becomes_parallel_in_five_lines():
    assert max(run_world(2, _five_lines)) < 1e-11
    assert _five_lines() == 0  # alone it is the same model


def _losses(steps, context):
    module = runpy.run_path(str(EXAMPLES / "context_parallel_lm.py"))
    return module["main"](steps, context), dist.get_rank()


def test_a_language_model_learns_the_same_on_a_mesh():
    (alone,) = run_world(1, _losses, 3, 1)
    first, second = run_world(2, _losses, 3, 2)
    assert first[0] == second[0]
    assert first[0] == pytest.approx(alone[0], abs=1e-4)
    assert alone[0][2] < alone[0][0] - 0.3
