"""Collections that do not look through what earlier tests left, and a clock that tests move."""

import gc

import pytest

from dilated_attention_pytorch.memory import pool as pool_module


@pytest.fixture(autouse=True)
def _quick_collections():
    gc.freeze()  # what was there before the test is not looked through
    yield
    gc.unfreeze()


class Clock:
    """Stands for the module time in the pool; the tests move it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(pool_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)
