"""Every test runs on one thread, from one seed, and leaves torch's settings as it found them."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
