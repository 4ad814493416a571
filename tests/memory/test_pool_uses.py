"""What comes from the pool of the process: the uses that are switched on, when large, and with the same results."""

import gc
import weakref

import pytest
import torch

from dilated_attention_pytorch import Causal, attend, longnet
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import (
    USES,
    Workspace,
    empty,
    fill_with_nan,
    get_global_memory_pool,
    pooled_uses,
    reset_global_memory_pool,
    uses,
    zeros,
)
from dilated_attention_pytorch.parallel import ContextParallel
from dilated_attention_pytorch.patterns import local_window
from dilated_attention_pytorch.testing.cases import CASES
from dilated_attention_pytorch.testing.contract import ContractReport, check_case
from parallel.worlds import run_world

PATTERN = longnet([16, 64], [1, 4]) & Causal()


@pytest.fixture(autouse=True)
def _a_pool_of_its_own():
    reset_global_memory_pool()
    yield
    reset_global_memory_pool()


@pytest.fixture
def all_pooled(monkeypatch):
    """Every use, however small."""
    monkeypatch.setattr(uses, "LEAST_BYTES", 0)
    with pooled_uses(USES):
        yield


def served():
    info = get_global_memory_pool().get_info()
    return info["hits"] + info["misses"]


def test_large_buffers_of_uses_that_are_on_come_from_the_pool():
    large = uses.LEAST_BYTES // 4
    kept = [empty((large,), torch.float32, "cpu", name) for name in USES]
    kept += [empty((large - 1,), torch.float32, "cpu", name) for name in USES]
    kept += [empty((large,), torch.float32, "cpu"), empty((large,), torch.float32, "meta", "results")]
    on = sum(use.pooled for use in USES.values())
    assert on > 0
    assert served() == get_global_memory_pool().get_info()["live_buffers"] == on
    kept.clear()
    assert get_global_memory_pool().get_info()["live_buffers"] == 0


def test_a_block_may_choose_uses_and_names_are_checked():
    large = uses.LEAST_BYTES
    with pooled_uses(()):
        empty((large,), torch.uint8, "cpu", "results")
    assert served() == 0
    with pooled_uses(["ring"]):
        x = empty((large,), torch.uint8, "cpu", "ring")
        empty((large,), torch.uint8, "cpu", "results")
        assert {a.pool_type for a in get_global_memory_pool().snapshot().allocations} == {USES["ring"].pool_type}
    assert served() == 1
    del x
    with pytest.raises(InvalidInput, match="rings"), pooled_uses(["rings"]):
        pass


def test_zeros_are_zero_whatever_the_memory_held(all_pooled):
    x = empty((64,), torch.float32, "cpu", "results").fill_(3)
    place = x.data_ptr()
    del x
    again = zeros((64,), torch.float32, "cpu", "results")
    assert again.data_ptr() == place
    assert not again.any()
    assert not zeros((3,), torch.bfloat16, "cpu").any()
    with fill_with_nan():
        assert bool(empty((2,), torch.float32, "cpu", "results").isnan().all())
        assert not zeros((2,), torch.float32, "cpu", "results").any()


def test_a_workspace_takes_its_buffers_for_its_use(all_pooled):
    work = Workspace(torch.float32, "cpu", "tiles")
    work.take("a", (8,))
    assert [a.pool_type for a in get_global_memory_pool().snapshot().allocations] == [USES["tiles"].pool_type]
    del work
    assert get_global_memory_pool().get_info()["live_buffers"] == 0


@pytest.mark.parametrize("backend", ["native", "sdpa"])
@pytest.mark.parametrize(
    "pattern", [PATTERN, local_window(700, block_size=128, window=16) & Causal()], ids=["strided", "tiles"]
)
def test_results_are_the_same_and_nobody_else_s(all_pooled, backend, pattern):
    if (why := next(b for b in BACKENDS if b.name == backend).import_error()) is not None:
        pytest.skip(why)
    q, k, v, dout = torch.randn(4, 1, 700, 2, 8).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call():
        out = attend(*leaves, pattern, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with pooled_uses(()):
        expected = call()
    assert served() == 0
    first = call()
    copies = [x.clone() for x in first]
    for _ in range(3):
        for x, y in zip(call(), expected):
            assert torch.equal(x, y)
    for x, copy in zip(first, copies):  # later calls have taken none of it
        assert torch.equal(x, copy)
    assert get_global_memory_pool().get_info()["hits"] > 0
    ends = [weakref.ref(x) for x in first]
    del first, x, y
    gc.collect()
    assert not any(end() is not None for end in ends)
    assert get_global_memory_pool().get_info()["live_buffers"] == 0


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_the_contract_holds_on_memory_of_the_pool(all_pooled, backend):
    found = next(b for b in BACKENDS if b.name == backend)
    if (why := found.import_error()) is not None:
        pytest.skip(why)
    report = ContractReport()
    for case in CASES[::12]:
        check_case(found, case, torch.float32, "cpu", report)
    assert report.checked > 5
    assert served() > 0


def _ring(method):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 1, 96, 2, 8, generator=generator, dtype=torch.float64)
    context = ContextParallel(method=method)
    leaves = [context.shard(x).requires_grad_() for x in whole]
    outs = [context.attend(*leaves, PATTERN) for _ in range(3)]
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)
    assert served() > 0
    return [context.unshard(x.detach(), length=96) for x in (outs[0], outs[2], *grads)]


@pytest.mark.parametrize("method", ["ring", "gather", "all_to_all"])
def test_what_ranks_receive_may_come_from_the_pool(all_pooled, method):
    generator = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 96, 2, 8, generator=generator, dtype=torch.float64)]
    out = attend(*leaves, PATTERN)
    grads = torch.autograd.grad(3 * out.square().sum(), leaves)
    with pooled_uses(["ring", "exchange"]):
        for found in run_world(2, _ring, method):
            for x, y in zip(found, (out.detach(), out.detach(), *grads)):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
