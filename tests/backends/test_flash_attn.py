"""flash-attn's three generations through stand-ins with their documented signatures, which compute densely."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from dense_kernels import WALKED, WINDOWED, check_cases, dense, dense_backward, hidden

from dilated_attention_pytorch import Causal, InvalidInput, Window, longnet
from dilated_attention_pytorch.backends import flash_attn, reasons
from dilated_attention_pytorch.backends.flash_attn import FlashAttnBackend, FlashAttnOptions
from dilated_attention_pytorch.backends.kernel import is_installed
from dilated_attention_pytorch.plans import StridedPlan, candidate_plans
from dilated_attention_pytorch.problem import make_problem

HALF = (torch.float16, torch.bfloat16)


def check(*tensors):
    """What every generation asks of (batch, N, heads, D) tensors."""
    assert len({x.dtype for x in tensors}) == 1
    for x in tensors:
        assert x.dtype in HALF
        assert x.dim() == 4
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert all(stride % 8 == 0 for stride, size in zip(x.stride(), x.shape[:-1]) if size > 1), "16 bytes"


def attend(q, k, v, scale, causal, window=(-1, -1)):
    check(q, k, v)
    assert not causal or q.shape[1] == k.shape[1]
    mask = hidden(q.shape[1], k.shape[1], causal, window)
    out, lse = dense(*(x.transpose(1, 2) for x in (q, k, v)), scale, mask)
    return out.transpose(1, 2).contiguous(), lse


def differentiate(given, lse, grads, scale, causal, window=(-1, -1)):
    check(*given, *grads)
    dout, q, k, _v, out = given
    assert dout.shape == out.shape == q.shape
    assert [x.shape for x in grads] == [x.shape for x in given[1:4]]
    assert all(x.is_contiguous() for x in grads)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    mask = hidden(q.shape[1], k.shape[1], causal, window)
    for target, found in zip(grads, dense_backward(*(x.transpose(1, 2) for x in given), lse, scale, mask)):
        target.copy_(found.transpose(1, 2))
    return torch.empty(0)


def flash_2(calls):
    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        calls.append(2)
        return *attend(q, k, v, softmax_scale, causal, (window_size_left, window_size_right)), None, None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, softcap, alibi_slopes, rng_state) == (0.0, 0.0, None, None)
        calls.append(deterministic)
        window = (window_size_left, window_size_right)
        return differentiate((dout, q, k, v, out), softmax_lse, (dq, dk, dv), softmax_scale, causal, window)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_3(calls):
    def _flash_attn_forward(
        q,
        k,
        v,
        k_new=None,
        v_new=None,
        qv=None,
        out_=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        cu_seqlens_k_new=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        page_table=None,
        kv_batch_idx=None,
        leftpad_k=None,
        rotary_cos=None,
        rotary_sin=None,
        seqlens_rotary=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
    ):
        given = {name for name, value in locals().items() if value is not None}
        assert given == {"q", "k", "v", "softmax_scale", "causal", "window_size_left", "window_size_right", "calls"}
        calls.append(3)
        return *attend(q, k, v, softmax_scale, causal, (window_size_left, window_size_right)), None, None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        lengths = (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k)
        assert lengths == (None,) * 6
        return differentiate((dout, q, k, v, out), softmax_lse, (dq, dk, dv), softmax_scale, is_causal)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_4(calls):
    def bounds(left, right):
        return (-1 if left is None else left, -1 if right is None else right)

    def _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=None,
        softmax_scale=None,
        causal=False,
        softcap=None,
        window_size_left=None,
        window_size_right=None,
        return_lse=False,
    ):
        assert return_lse
        assert q.shape[-1] <= 128
        calls.append(4)
        return *attend(q, k, v, softmax_scale, causal, bounds(window_size_left, window_size_right)), None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
    ):
        calls.append(deterministic)
        window = bounds(window_size_left, window_size_right)
        differentiate((dout, q, k, v, out), lse, (dq, dk, dv), softmax_scale, causal, window)
        return dq, dk, dv

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


PACKAGES = {
    2: ("flash_attn.flash_attn_interface", flash_2),
    3: ("flash_attn_interface", flash_3),
    4: ("flash_attn.cute.interface", flash_4),
}


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins for these generations in place, on a CPU that claims a capability; gives the list of calls."""
    is_installed.cache_clear()

    def install(*versions, capability=(9, 0), release="2.8.3"):
        calls = []
        monkeypatch.setattr(flash_attn, "cuda_capability", lambda device: capability)
        for version in versions:
            name, make = PACKAGES[version]
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                if path not in sys.modules:
                    module = ModuleType(path)
                    module.__spec__ = ModuleSpec(path, None, is_package=True)
                    module.__path__ = []
                    monkeypatch.setitem(sys.modules, path, module)
            vars(sys.modules[name]).update(make(calls))
            sys.modules[parts[0]].__version__ = release
        return calls

    yield install
    is_installed.cache_clear()


def problem_of(dtype=torch.float16, head_dim=16, device="cpu"):
    q = torch.randn(1, 600, 2, head_dim).to(device, dtype)
    return make_problem(q, q, q, scale=0.25, query_start=0, needs_grad=True)


def against(backend, problem, pattern=None):
    pattern = longnet([256, 512], [1, 2]) if pattern is None else pattern
    return reasons(backend, problem, candidate_plans(pattern, problem))[1]


@pytest.mark.parametrize(
    ("version", "names", "dtypes"),
    [(2, WALKED + WINDOWED, HALF), (3, WALKED, HALF[:1]), (4, WALKED + WINDOWED, HALF[1:])],
)
def test_each_generation_keeps_the_laws(install, version, names, dtypes):
    calls = install(version)
    report = check_cases(FlashAttnBackend(FlashAttnOptions(version)), names, dtypes)
    assert report.checked == len(names) * len(dtypes)
    assert not report.refused
    assert set(calls) <= {version, False}


@pytest.mark.parametrize(
    ("installed", "capability", "asked", "taken"),
    [
        ((2, 3, 4), (9, 0), 0, 3),
        ((2, 4), (9, 0), 0, 4),
        ((2, 3, 4), (10, 0), 0, 4),
        ((2, 3, 4), (8, 6), 0, 2),
        ((2, 3), (12, 0), 0, 2),
        ((2, 3, 4), (9, 0), 2, 2),
    ],
)
def test_the_most_special_generation_is_taken(install, installed, capability, asked, taken):
    calls = install(*installed, capability=capability)
    backend, problem = FlashAttnBackend(FlashAttnOptions(asked)), problem_of()
    plan = next(p for p in candidate_plans(Causal(), problem) if isinstance(p, StridedPlan))
    assert against(backend, problem) == []
    backend.forward(problem, plan)
    assert set(calls) == {taken}


def test_deterministic_algorithms_are_asked_for(install, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    problem = problem_of()
    plan = next(p for p in candidate_plans(Causal(), problem) if isinstance(p, StridedPlan))
    for version in (2, 4):
        calls, backend = install(version), FlashAttnBackend()
        out, lse = backend.forward(problem, plan)
        backend.backward(problem, plan, out, None, out, lse)
        assert calls == [version, True]
        del sys.modules[PACKAGES[version][0]]
    install(3)
    assert "not deterministic" in against(FlashAttnBackend(FlashAttnOptions(3)), problem)[0]


def test_windows_go_to_a_generation_that_takes_them(install):
    calls = install(2, 3)
    problem = problem_of()
    plan = next(p for p in candidate_plans(Window(5), problem) if isinstance(p, StridedPlan))
    FlashAttnBackend().forward(problem, plan)
    assert set(calls) == {2}
    assert "windows" in against(FlashAttnBackend(FlashAttnOptions(3)), problem, Window(5))[0]


def test_a_gradient_of_lse_at_the_largest_head_dim(install):
    """No column fits beside 256 or FlashAttention-4's 128: two passes instead."""
    install(4)
    q, k, v = (torch.randn(1, 40, 1, 128).to(torch.bfloat16) for _ in range(3))
    problem = make_problem(q, k, v, scale=0.1, query_start=0)
    plan = next(p for p in candidate_plans(Causal(), problem) if isinstance(p, StridedPlan))
    backend = FlashAttnBackend()
    out, lse = backend.forward(problem, plan)
    dlse = torch.randn_like(lse)
    found = backend.backward(problem, plan, torch.zeros_like(out), dlse, out, lse)
    q64, k64 = (x.double().requires_grad_() for x in (q, k))
    logits = 0.1 * torch.einsum("bnhd,bmhd->bhnm", q64, k64)
    expected = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).logsumexp(-1)
    dq, dk = torch.autograd.grad(expected, (q64, k64), dlse.double())
    torch.testing.assert_close(found.q.double(), dq, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(found.k.double(), dk, atol=2e-3, rtol=2e-2)
    assert bool((found.v == 0).all())


def test_absent_packages_are_a_reason_with_the_line_that_mends_it(monkeypatch):
    is_installed.cache_clear()
    monkeypatch.setattr("dilated_attention_pytorch.backends.kernel.find_spec", lambda name: None)
    missing = FlashAttnBackend().import_error()
    is_installed.cache_clear()
    assert missing is not None
    assert "pip install flash-attn --no-build-isolation" in missing
    assert "pip install flash-attn-4" in missing


def test_every_reason(install):
    install(2)
    assert FlashAttnBackend().import_error() is None
    assert "not float32" in against(FlashAttnBackend(), problem_of(torch.float32))[0]
    assert "multiple of 8" in against(FlashAttnBackend(), problem_of(head_dim=12))[0]
    assert "up to 256" in against(FlashAttnBackend(), problem_of(head_dim=264))[0]
    (why,) = against(FlashAttnBackend(FlashAttnOptions(3)), problem_of())
    assert "FlashAttention-3: does not import" in why
    assert "hopper" in why
    install(2, capability=(7, 5))
    assert against(FlashAttnBackend(), problem_of()) == [
        "flash-attn has no kernels for capability 7.5; use backend='sdpa'"
    ]
    install(2, capability=(8, 0))
    assert "FlashAttention-4 has no kernels" in against(FlashAttnBackend(FlashAttnOptions(4)), problem_of())[0]


def test_old_and_broken_packages_are_reasons(install):
    install(2, release="2.6.3")
    assert "2.7 or later" in against(FlashAttnBackend(), problem_of())[-1]
    install(2)
    del sys.modules["flash_attn.flash_attn_interface"]._flash_attn_backward
    assert "lacks _flash_attn_forward or _flash_attn_backward" in against(FlashAttnBackend(), problem_of())[-1]
    install(4, capability=(10, 0))
    assert "128" in against(FlashAttnBackend(), problem_of(head_dim=136))[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices(install, monkeypatch, device):
    install(2, capability=None)
    assert "CUDA devices only" in against(FlashAttnBackend(), problem_of(device=device))[0]


def test_options():
    with pytest.raises(InvalidInput, match="0, 2, 3 or 4"):
        FlashAttnOptions(1)
    versions = [options.version for options in FlashAttnBackend(FlashAttnOptions(3)).candidates(problem_of())]
    assert versions == [3, 4, 2]
