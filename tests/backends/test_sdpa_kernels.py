"""The choice of PyTorch's kernels, and the arguments they get; CUDA's through a stand-in that computes densely."""

import math
from types import SimpleNamespace

import pytest
import torch

from dilated_attention_pytorch.backends.sdpa import kernels
from dilated_attention_pytorch.backends.sdpa.kernels import CpuFlash, CudaEfficient, CudaFlash, choose_kernel

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_cpu(dtype):
    assert isinstance(choose_kernel("cpu", dtype, 13, True), CpuFlash)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "masks", "capability", "kind"),
    [
        (torch.float16, 64, False, (8, 0), CudaFlash),
        (torch.bfloat16, 256, False, (9, 0), CudaFlash),
        (torch.bfloat16, 64, True, (9, 0), CudaEfficient),
        (torch.bfloat16, 264, False, (9, 0), CudaEfficient),
        (torch.float16, 64, False, (7, 5), CudaEfficient),
        (torch.float32, 64, False, (9, 0), CudaEfficient),
        (torch.float32, 4, False, (7, 0), CudaEfficient),
    ],
)
def test_cuda(dtype, head_dim, masks, capability, kind):
    assert isinstance(choose_kernel("cuda", dtype, head_dim, masks, capability), kind)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "words"),
    [
        ("cuda", torch.float64, 64, (9, 0), "float64"),
        ("cuda", torch.bfloat16, 64, (7, 5), "8.0"),
        ("cuda", torch.float16, 13, (9, 0), "multiple of 8"),
        ("cuda", torch.float32, 13, (9, 0), "multiple of 4"),
        ("mps", torch.float32, 64, None, "mps"),
        ("xpu", torch.float16, 64, None, "xpu"),
    ],
)
def test_a_reason_where_there_is_none(device, dtype, head_dim, capability, words):
    reason = choose_kernel(device, dtype, head_dim, False, capability)
    assert isinstance(reason, str)
    assert words in reason


def dense(q, k, v, scale, is_causal, bias=None):
    logits = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        logits = logits + bias
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.softmax(logits, -1) @ v, logits.logsumexp(-1)


def dense_backward(dout, q, k, v, out, lse, scale, is_causal, bias=None):
    logits = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        logits = logits + bias
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    weights = (logits - lse[..., None]).exp()
    inner = weights * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True))
    return scale * inner @ k, scale * inner.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout


class StandIn:
    """Answers aten's names on the CPU, with the shapes, paddings and demands of the CUDA operators."""

    def __init__(self):
        self.seen = []

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
        assert (dropout_p, return_debug_mask) == (0.0, False)
        out, lse = dense(q, k, v, scale, is_causal)
        nothing = torch.empty(0)
        return out, lse, None, None, q.shape[2], k.shape[2], nothing, nothing, nothing

    def _scaled_dot_product_flash_attention_backward(
        self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, q.shape[2], k.shape[2], 0.0)
        assert seed.dtype == offset.dtype == torch.uint64
        return dense_backward(dout, q, k, v, out, lse, scale, is_causal)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, compute_lse, dropout_p, is_causal, *, scale):
        assert (compute_lse, dropout_p) == (True, 0.0)
        self._check_bias(bias, q, k)
        out, lse = dense(q, k, v, scale, is_causal, bias)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.nan)
        return out, padded, torch.empty(0), torch.empty(0)

    def _scaled_dot_product_efficient_attention_backward(
        self, dout, q, k, v, bias, out, lse, seed, offset, dropout_p, grad_input_mask, is_causal=False, *, scale
    ):
        assert (dropout_p, grad_input_mask) == (0.0, [True, True, True, False])
        assert lse.shape[-1] % 32 == 0
        assert seed.dtype == offset.dtype == torch.int64
        self._check_bias(bias, q, k)
        return (*dense_backward(dout, q, k, v, out, lse[..., : q.shape[2]], scale, is_causal, bias), None)

    def _check_bias(self, bias, q, k):
        if bias is not None:
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.dtype == q.dtype
            assert bias.stride(2) * bias.element_size() % 16 == 0, "rows must be aligned to 16 bytes"
            assert bias.stride(3) == 1


@pytest.fixture
def _stand_in(monkeypatch):
    monkeypatch.setattr(kernels, "aten", StandIn())


def tensors(nq, nk):
    return torch.randn(2, 3, nq, 8), torch.randn(2, 3, nk, 8), torch.randn(2, 3, nk, 8)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("kernel", [CudaFlash(), CudaEfficient()], ids=lambda k: k.name)
@pytest.mark.parametrize(("nq", "nk", "is_causal"), [(5, 5, True), (5, 9, False), (32, 40, False), (33, 33, True)])
def test_cuda_kernels_through_a_stand_in(kernel, nq, nk, is_causal):
    q, k, v = tensors(nq, nk)
    out, lse = kernel.forward(q, k, v, 0.3, is_causal, None)
    expected = dense(q, k, v, 0.3, is_causal)
    torch.testing.assert_close((out, lse), expected)
    dout = torch.randn_like(out)
    found = kernel.backward(dout, q, k, v, out, lse, 0.3, is_causal, None)
    torch.testing.assert_close(found, dense_backward(dout, q, k, v, *expected, 0.3, is_causal))


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("width", [8, 9, 15])
def test_efficient_attention_aligns_its_mask(width):
    q, k, v = tensors(6, width)
    mask = torch.zeros(6, width).masked_fill(torch.ones(6, width).triu(1).bool(), -math.inf)
    out, lse = CudaEfficient().forward(q, k, v, 0.3, False, mask)
    expected = dense(q, k, v, 0.3, False, mask)
    torch.testing.assert_close((out, lse), expected)
    found = CudaEfficient().backward(torch.ones_like(out), q, k, v, out, lse, 0.3, False, mask)
    torch.testing.assert_close(found, dense_backward(torch.ones_like(out), q, k, v, *expected, 0.3, False, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("nq", "nk", "is_causal"), [(1, 1, False), (5, 9, False), (33, 33, True)])
def test_cpu_flash_is_dense_attention(dtype, nq, nk, is_causal):
    q, k, v = (x.to(dtype) for x in tensors(nq, nk))
    out, lse = CpuFlash().forward(q, k, v, 0.3, is_causal, None)
    expected = dense(q, k, v, 0.3, is_causal)
    torch.testing.assert_close((out, lse), expected)
    dout = torch.randn_like(out)
    found = CpuFlash().backward(dout, q, k, v, out, lse, 0.3, is_causal, None)
    torch.testing.assert_close(found, dense_backward(dout, q, k, v, *expected, 0.3, is_causal))


def test_cpu_flash_backward_takes_a_global_out_and_lse():
    q, k, v = (x.double() for x in tensors(7, 12))
    out, lse = dense(q, k, v, 0.3, False)
    dout = torch.randn_like(out)
    whole = dense_backward(dout, q, k, v, out, lse, 0.3, False)
    parts = [
        CpuFlash().backward(dout, q, k[:, :, s], v[:, :, s], out, lse, 0.3, False, None)
        for s in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 2), whole[1])
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 2), whole[2])


def test_capability_is_asked_of_cuda_devices_only(monkeypatch):
    from dilated_attention_pytorch.backends import SdpaBackend
    from dilated_attention_pytorch.plans import StridedPlan

    def asked(device):
        raise AssertionError("a CPU problem must not touch CUDA")

    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    q = torch.zeros(1, 2, 1, 4)
    problem = SimpleNamespace(q=q, v=q, dropout_p=0.0, bias=None, score=None, scale=1.0)
    from dilated_attention_pytorch import Full

    assert SdpaBackend().reasons_against(problem, StridedPlan(Full())) == []
