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


@pytest.fixture(scope="module")
def flex_without_dynamo():
    """FlexAttention's eager operator with nothing around it: tests ask what it computes, over many problems.

    Dynamo took nine tenths of the time of all backends together, and keeps some 20 MB for each problem.
    """
    from torch.nn.attention import flex_attention as torch_flex

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@pytest.fixture(scope="session")
def fresh_interpreters(tmp_path_factory):
    interpreters = FreshInterpreters(tmp_path_factory.mktemp("fresh"))
    yield interpreters
    interpreters.close()
