"""Every test runs on one thread, from one seed, and goes by no measurement of this machine."""

import pytest
import torch

from dilated_attention_pytorch.backends.tuning import using
from fresh_interpreters import FreshInterpreters

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _untuned():
    with using():
        yield


@pytest.fixture(scope="session")
def fresh_interpreters(tmp_path_factory):
    interpreters = FreshInterpreters(tmp_path_factory.mktemp("fresh"))
    yield interpreters
    interpreters.close()
