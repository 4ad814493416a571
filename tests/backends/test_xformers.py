"""xFormers through a stand-in with its documented signatures, which computes densely."""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from dense_kernels import WALKED, WINDOWED, check_cases, dense, dense_backward, hidden

from dilated_attention_pytorch import longnet
from dilated_attention_pytorch.backends import reasons, xformers
from dilated_attention_pytorch.backends.kernel import is_installed
from dilated_attention_pytorch.backends.xformers import XformersBackend
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import make_problem


class LowerTriangularMask:
    """xFormers' name for a causal mask."""


def mask_of(bias, query, key):
    nq, nk = query.shape[1], key.shape[1]
    if isinstance(bias, LowerTriangularMask):
        assert nq == nk
        return hidden(nq, nk, True)
    if bias is not None:
        assert bias.shape == (query.shape[0], query.shape[2], nq, nk)
        assert bias.dtype == query.dtype
        assert bias.stride(-1) == 1
        assert bias.stride(-2) * bias.element_size() % 16 == 0
    return bias


def check(*tensors):
    assert len({x.dtype for x in tensors}) == 1
    multiple = 4 if tensors[0].dtype == torch.float32 else 8
    for x in tensors:
        assert x.dim() == 4
        assert x.stride(-1) == 1
        assert all(stride % multiple == 0 for stride, size in zip(x.stride(), x.shape[:-1]) if size > 1)


def memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert p == 0.0
    check(query, key, value)
    out, lse = dense(*(x.transpose(1, 2) for x in (query, key, value)), scale, mask_of(attn_bias, query, key))
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.nan)
    return out.transpose(1, 2).contiguous(), padded


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    assert p == 0.0
    check(grad, output, query, key, value)
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    given = (x.transpose(1, 2) for x in (grad, query, key, value, output))
    return tuple(x.transpose(1, 2) for x in dense_backward(*given, lse, scale, mask_of(attn_bias, query, key)))


@pytest.fixture
def install(monkeypatch):
    """Puts the stand-in in place, on a CPU that claims a capability."""
    is_installed.cache_clear()

    def install(capability=(9, 0)):
        for path in ("xformers", "xformers.ops"):
            module = ModuleType(path)
            module.__spec__ = ModuleSpec(path, None, is_package=True)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
        ops = sys.modules["xformers.ops"]
        ops.LowerTriangularMask = LowerTriangularMask
        ops.memory_efficient_attention_backward = memory_efficient_attention_backward
        ops.memory_efficient_attention_forward_requires_grad = memory_efficient_attention_forward_requires_grad
        monkeypatch.setattr(xformers, "cuda_capability", lambda device: capability)

    yield install
    is_installed.cache_clear()


def against(dtype=torch.float16, head_dim=16, device="cpu", needs_grad=False):
    q = torch.zeros(1, 64, 2, head_dim, dtype=dtype, device=device)
    problem = make_problem(q, q, q, scale=0.25, query_start=0, needs_grad=needs_grad)
    return reasons(XformersBackend(), problem, candidate_plans(longnet([16, 32], [1, 2]), problem))[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_xformers_keeps_the_laws(install, dtype):
    install()
    names = WALKED + WINDOWED
    report = check_cases(XformersBackend(), names, [dtype])
    assert report.checked >= len(names)
    assert not report.refused


def test_reasons(install):
    install()
    assert against() == []
    assert "not float64" in against(torch.float64)[0]
    assert "multiple of 8" in against(head_dim=12)[0]
    assert against(torch.float32, head_dim=12) == []
    install(capability=(7, 5))
    assert "8.0" in against(torch.bfloat16)[0]
    assert against() == []
    install(capability=None)
    assert "CUDA devices only, not on meta" in against(device="meta")[0]


def test_a_deterministic_backward_is_not_promised(install, monkeypatch):
    install()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert against() == []
    assert "not deterministic" in against(needs_grad=True)[0]


def test_a_package_that_does_not_import_is_a_reason(install, monkeypatch):
    install()
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    (why,) = against()
    assert "does not import" in why
    assert "pip install xformers" in why


def test_an_absent_package_is_a_reason(monkeypatch):
    is_installed.cache_clear()
    monkeypatch.setattr("dilated_attention_pytorch.backends.kernel.find_spec", lambda name: None)
    missing = XformersBackend().import_error()
    is_installed.cache_clear()
    assert missing == "xformers is not installed: pip install xformers"
