"""A small text and runs on it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_reader import SETTINGS, Reader
from shared_runs import calm_reader, losses

from dilated_attention_pytorch.training.loop import train
from dilated_attention_pytorch.training.run import Run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def reader() -> Callable[[], Reader]:
    def build() -> Reader:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return Reader()

    return build


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.array(["alpha", "beta", "gamma", "delta", "epsilon"])
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(np.random.RandomState(1).choice(words, 4000)))
    return file


@pytest.fixture
def new_run(tmp_path: Path, text: Path) -> Callable[..., Run]:
    def create(name: str, **changes: object) -> Run:
        settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
        return Run.create(tmp_path / name, settings, {"kind": "reader"}, text)

    return create


@pytest.fixture(scope="session")
def straight_losses(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[int], list[float]]:
    """Losses of a calm reader's run in one process and without a stop, by batch size."""

    @functools.cache
    def of(batch_size: int) -> list[float]:
        settings = dataclasses.replace(SETTINGS, batch_size=batch_size)
        run = Run.create(tmp_path_factory.mktemp("straight") / "run", settings, {"kind": "reader"}, text)
        train(calm_reader(), run)
        return losses(run)

    return of
