"""The choice of PyTorch's kernels, and the arguments they get; CUDA's through a stand-in that computes densely."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from dense_kernels import WALKED, WINDOWED, check_cases, dense, dense_backward, hidden

from dilated_attention_pytorch import Causal, Full, InvalidInput, Window, longnet
from dilated_attention_pytorch.backends import SdpaBackend
from dilated_attention_pytorch.backends.base import Backend
from dilated_attention_pytorch.backends.kernel import window_of
from dilated_attention_pytorch.backends.sdpa import SdpaOptions, kernels
from dilated_attention_pytorch.backends.sdpa.kernels import (
    CpuFlash,
    CudaCudnn,
    CudaEfficient,
    CudaFlash,
    Need,
    choose_kernel,
)
from dilated_attention_pytorch.backends.strided import StridedWalk
from dilated_attention_pytorch.backends.tiled import TiledWalk
from dilated_attention_pytorch.plans import StridedPlan, TilePlan, candidate_plans
from dilated_attention_pytorch.problem import make_problem

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_cpu(dtype):
    assert isinstance(choose_kernel(Need("cpu", dtype, 13, masks=True)), CpuFlash)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "more", "kind"),
    [
        (F16, 64, (8, 0), {}, CudaFlash),
        (BF16, 64, (9, 0), {}, CudaCudnn),
        (BF16, 128, (10, 0), {}, CudaCudnn),
        (BF16, 64, (9, 4), {"is_rocm": True}, CudaFlash),
        (BF16, 64, (9, 0), {"shortest": 511}, CudaFlash),
        (BF16, 64, (9, 0), {"bands": True}, CudaFlash),
        (BF16, 64, (9, 4), {"bands": True, "is_rocm": True}, CudaEfficient),
        (BF16, 64, (9, 0), {"deterministic": True}, CudaFlash),
        (BF16, 136, (9, 0), {}, CudaFlash),
        (BF16, 256, (9, 0), {}, CudaFlash),
        (F16, 224, (9, 0), {}, CudaFlash),
        (F16, 224, (8, 9), {}, CudaEfficient),
        (BF16, 64, (9, 0), {"masks": True}, CudaEfficient),
        (BF16, 264, (9, 0), {}, CudaEfficient),
        (F16, 64, (7, 5), {}, CudaEfficient),
        (F32, 64, (9, 0), {}, CudaEfficient),
        (F32, 4, (7, 0), {"bands": True}, CudaEfficient),
    ],
)
def test_cuda(dtype, head_dim, capability, more, kind):
    need = Need("cuda", dtype, head_dim, capability=capability, **more)
    assert isinstance(choose_kernel(need), kind)
    assert isinstance(choose_kernel(need, kind.name), kind)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "words"),
    [
        ("cuda", F64, 64, (9, 0), "float64"),
        ("cuda", BF16, 64, (7, 5), "8.0"),
        ("cuda", F16, 13, (9, 0), "multiple of 8"),
        ("cuda", F32, 13, (9, 0), "multiple of 4"),
        ("mps", F32, 64, (0, 0), "mps"),
        ("xpu", F16, 64, (0, 0), "xpu"),
    ],
)
def test_a_reason_where_there_is_none(device, dtype, head_dim, capability, words):
    reason = choose_kernel(Need(device, dtype, head_dim, capability=capability))
    assert isinstance(reason, str)
    assert words in reason


@pytest.mark.parametrize(
    ("wanted", "need", "words"),
    [
        ("cudnn_attention", Need("cuda", F16, 64, capability=(8, 0)), "capability 9 or 10"),
        ("cudnn_attention", Need("cuda", F16, 64, bands=True, capability=(9, 0)), "windows"),
        ("cudnn_attention", Need("cuda", F16, 192, capability=(9, 0)), "128 .192"),
        ("cudnn_attention", Need("cuda", F16, 64, shortest=8, capability=(9, 0)), "512 tokens .8"),
        ("flash_attention", Need("cuda", F32, 64, capability=(9, 0)), "float16"),
        ("flash_attention", Need("cuda", F16, 64, masks=True, capability=(9, 0)), "masks"),
        ("flash_attention", Need("cuda", F16, 512, capability=(9, 0)), "256 .512"),
        ("flash_attention", Need("cuda", F16, 200, capability=(12, 0)), "backward"),
    ],
)
def test_a_kernel_that_is_asked_for_and_cannot_says_why(wanted, need, words):
    reason = choose_kernel(need, wanted)
    assert isinstance(reason, str)
    assert wanted in reason
    assert re.search(words, reason), reason


def test_options_are_checked_and_worth_measuring():
    with pytest.raises(InvalidInput, match="packed_rows of at least 1"):
        SdpaOptions(packed_rows=0)
    with pytest.raises(InvalidInput, match="'flash_attention'"):
        SdpaOptions(kernel="math")
    x = torch.zeros(1, 8, 1, 8)
    problem = make_problem(x, x, x, scale=1.0, query_start=0)
    offered = SdpaBackend(SdpaOptions(packed_rows=64)).candidates(problem)
    assert offered[0] == SdpaOptions(packed_rows=64)
    assert len(set(offered)) == len(offered)
    assert len({options.packed_rows for options in offered}) > 2
    assert {options.tile for options in offered} == {64, 128, 256}


@pytest.mark.parametrize("rows", [1, 40, 100000])
def test_the_number_of_packed_rows_changes_no_value(rows):
    q, k, v = (torch.randn(2, 100, 6, 8, dtype=F64) for _ in range(3))
    problem = make_problem(q, k, v, scale=0.3, query_start=0)
    plan = next(p for p in candidate_plans(longnet([16, 48], [1, 2]), problem) if isinstance(p, StridedPlan))
    expected = SdpaBackend().forward(problem, plan)
    found = SdpaBackend(SdpaOptions(packed_rows=rows)).forward(problem, plan)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(q)
    grads = SdpaBackend(SdpaOptions(packed_rows=rows)).backward(problem, plan, dout, None, *found)
    torch.testing.assert_close(grads[:3], SdpaBackend().backward(problem, plan, dout, None, *expected)[:3])


class StandIn:
    """Answers aten's names on the CPU; the real operator's meta kernel checks the arguments and tells the shapes."""

    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        answer = getattr(type(self), f"answer{name}")

        def call(*args, **options):
            self.names.append(name)
            args_of_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
            expected = getattr(torch.ops.aten, name)(*args_of_meta, **options)
            for x in args:
                if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[-1] > 1:
                    assert x.stride(-1) == 1
                    assert all(stride % 8 == 0 or size == 1 for stride, size in zip(x.stride()[:-1], x.shape))
            found = answer(*args, **options)
            for x, y in zip(found, expected):
                if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dim() >= 3:
                    assert x.shape[:2] == y.shape[:2]
                    assert x.dtype == y.dtype
            return found

        return call

    @staticmethod
    def answer_flash_attention_forward(
        q, k, v, cum_q, cum_k, nq, nk, p, causal, debug, *, scale, window_size_left=-1, window_size_right=-1
    ):
        assert (cum_q, cum_k, nq, nk, p, debug) == (None, None, q.shape[1], k.shape[1], 0.0, False)
        mask = hidden(nq, nk, causal, (window_size_left, window_size_right))
        out, lse = dense(*(x.transpose(1, 2) for x in (q, k, v)), scale, mask)
        return out.transpose(1, 2), lse, torch.empty(0), torch.empty(0), torch.empty(0)

    @staticmethod
    def answer_flash_attention_backward(
        g, q, k, v, o, lse, cum_q, cum_k, nq, nk, p, causal, rng, unused, *, scale, **window
    ):
        assert (cum_q, cum_k, nq, nk, p) == (None, None, q.shape[1], k.shape[1], 0.0)
        assert rng.dtype == unused.dtype == torch.uint64
        assert lse.is_contiguous()
        assert lse.dtype == F32
        mask = hidden(nq, nk, causal, (window.get("window_size_left", -1), window.get("window_size_right", -1)))
        grads = dense_backward(*(x.transpose(1, 2) for x in (g, q, k, v, o)), lse, scale, mask)
        return tuple(x.transpose(1, 2) for x in grads)

    @staticmethod
    def answer_scaled_dot_product_cudnn_attention(q, k, v, bias, with_lse, p, causal, debug, *, scale):
        assert (bias, with_lse, p, debug) == (None, True, 0.0, False)
        out, lse = dense(q, k, v, scale, hidden(q.shape[2], k.shape[2], causal))
        return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None

    @staticmethod
    def answer_scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, o, lse, seed, offset, bias, cum_q, cum_k, nq, nk, p, causal, *, scale
    ):
        assert (bias, cum_q, cum_k, nq, nk, p) == (None, None, None, q.shape[2], k.shape[2], 0.0)
        assert seed.dtype == offset.dtype == torch.int64
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        assert lse.dtype == F32
        return dense_backward(g, q, k, v, o, lse.squeeze(-1), scale, hidden(nq, nk, causal))

    @classmethod
    def answer_scaled_dot_product_efficient_attention(cls, q, k, v, bias, with_lse, p, causal, *, scale):
        assert (with_lse, p) == (True, 0.0)
        out, lse = dense(q, k, v, scale, cls.seen(bias, q, k, causal))
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.nan), None, None

    @classmethod
    def answer_scaled_dot_product_efficient_attention_backward(
        cls, g, q, k, v, bias, o, lse, seed, offset, p, wanted, causal, *, scale
    ):
        assert (p, wanted) == (0.0, [True, True, True, False])
        assert lse.shape[-1] % 32 == 0
        assert bool((lse[..., q.shape[2] :] == math.inf).all())
        assert seed.dtype == offset.dtype == torch.int64
        return (*dense_backward(g, q, k, v, o, lse[..., : q.shape[2]], scale, cls.seen(bias, q, k, causal)), None)

    @staticmethod
    def seen(bias, q, k, causal):
        if bias is None:
            return hidden(q.shape[2], k.shape[2], causal)
        assert not causal
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert bias.dtype == q.dtype
        assert bias.stride(2) * bias.element_size() % 16 == 0, "rows must be aligned to 16 bytes"
        return bias


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(kernels, "aten", found)
    return found


class Walked(Backend):
    """One CUDA kernel on strided pieces, in the problem's own dtype as on a GPU."""

    name, plans = "walked", (StridedPlan,)

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def reasons_against(self, problem, plan):
        return []

    def forward(self, problem, plan):
        return StridedWalk(self.kernel, problem.q.dtype).forward(problem, plan)

    def backward(self, problem, plan, *given):
        return StridedWalk(self.kernel, problem.q.dtype).backward(problem, plan, *given)


@pytest.mark.parametrize(
    ("kernel", "names", "dtypes"),
    [
        (CudaFlash(), WALKED + WINDOWED, [F16]),
        (CudaCudnn(), WALKED, [BF16]),
        (CudaEfficient(), WALKED + WINDOWED, [F16, F32]),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_cuda_kernels_keep_the_laws(stand_in, kernel, names, dtypes):
    report = check_cases(Walked(kernel), names, dtypes)
    assert report.checked >= len(names)
    assert not report.refused
    assert len(set(stand_in.names)) == 2


class WalkedTiles(Walked):
    """The same on tables of tiles."""

    plans = (TilePlan,)

    def forward(self, problem, plan):
        return TiledWalk(self.kernel, problem.q.dtype, None, 1 << 18).forward(problem, plan)

    def backward(self, problem, plan, *given):
        return TiledWalk(self.kernel, problem.q.dtype, None, 1 << 18).backward(problem, plan, *given)


def test_cuda_keeps_the_laws_on_tiles(stand_in):
    """Only one of its kernels has the masks that partial tiles ask for."""
    names = ("product_of_grids", "documents_summed-placed", "same_branch_twice", "not_nesting-decode")
    report = check_cases(WalkedTiles(CudaEfficient()), names, [F16, F32])
    assert report.checked == len(names) * (2 + 3)
    assert len(set(stand_in.names)) == 2


def test_launches_stay_within_a_kernels_bound(monkeypatch):
    """More segments than a launch may have go in several calls, and nothing changes."""
    q, k, v = (torch.randn(2, 64, 3, 8, dtype=F64) for _ in range(3))
    problem = make_problem(q, k, v, scale=0.3, query_start=0)
    plan = next(p for p in candidate_plans(longnet([4, 6], [1, 2]), problem) if isinstance(p, StridedPlan))
    dout, sizes = torch.randn_like(q), []
    out, lse = StridedWalk(CpuFlash(), F64).forward(problem, plan)
    grads = StridedWalk(CpuFlash(), F64).backward(problem, plan, dout, None, out, lse)

    class Bounded(CpuFlash):
        max_batch = 5

        def forward(self, q, *rest):
            sizes.append(q.shape[0] * q.shape[1])
            return super().forward(q, *rest)

    walk = StridedWalk(Bounded(), F64)
    torch.testing.assert_close(walk.forward(problem, plan), (out, lse))
    torch.testing.assert_close(walk.backward(problem, plan, dout, None, out, lse)[:3], grads[:3])
    assert max(sizes) <= 5


def test_a_gradient_of_lse_without_room_for_a_column():
    q, k, v = (torch.randn(2, 30, 2, 8, dtype=F64) for _ in range(3))
    problem = make_problem(q, k, v, scale=0.3, query_start=0)
    plan = next(p for p in candidate_plans(longnet([8, 16], [1, 2]), problem) if isinstance(p, StridedPlan))
    walk = StridedWalk(CpuFlash(), F64)
    out, lse = walk.forward(problem, plan)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)

    class Narrow(CpuFlash):
        max_head_dim = 8

    expected = walk.backward(problem, plan, dout, dlse, out, lse)
    found = StridedWalk(Narrow(), F64).backward(problem, plan, dout, dlse, out, lse)
    torch.testing.assert_close(found[:3], expected[:3])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_windows_hide_what_bands_hide(is_causal, size):
    x = torch.zeros(1, 700, 1, 8)
    problem = make_problem(x, x[:, :650], x[:, :650], scale=1.0, query_start=20)
    pattern = Window(size) & Causal() if is_causal else Window(size)
    plan = next(p for p in candidate_plans(pattern, problem) if isinstance(p, StridedPlan))
    pieces = [p for chunk in plan.chunks for p in chunk.pieces]
    assert any(p.band is not None for p in pieces)
    for piece in pieces:
        nq, nk = piece.queries.length, piece.keys.length
        if piece.band is not None:
            window = window_of(piece.band, nq, nk)
            assert torch.equal(~hidden(nq, nk, False, window), piece.band.visible(nq, nk))


def tensors(nq, nk):
    return torch.randn(2, 3, nq, 8, dtype=F64), torch.randn(2, 3, nk, 8, dtype=F64), torch.randn(2, 3, nk, 8, dtype=F64)


@pytest.mark.parametrize(("nq", "nk", "is_causal"), [(1, 1, False), (5, 9, False), (33, 33, True)])
def test_cpu_flash_is_dense_attention(nq, nk, is_causal):
    q, k, v = tensors(nq, nk)
    out, lse = CpuFlash().forward(q, k, v, 0.3, is_causal, None)
    mask = hidden(nq, nk, is_causal)
    torch.testing.assert_close((out, lse), dense(q, k, v, 0.3, mask))
    dout = torch.randn_like(out)
    found = CpuFlash().backward(dout, q, k, v, out, lse, 0.3, is_causal, None)
    torch.testing.assert_close(found, dense_backward(dout, q, k, v, out, lse, 0.3, mask))


def test_cpu_flash_backward_takes_a_global_out_and_lse():
    q, k, v = tensors(7, 12)
    out, lse = dense(q, k, v, 0.3)
    dout = torch.randn_like(out)
    whole = dense_backward(dout, q, k, v, out, lse, 0.3)
    parts = [
        CpuFlash().backward(dout, q, k[:, :, s], v[:, :, s], out, lse, 0.3, False, None)
        for s in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 2), whole[1])
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 2), whole[2])


def test_capability_is_asked_of_cuda_devices_only(monkeypatch):
    def asked(device):
        raise AssertionError("a CPU problem must not touch CUDA")

    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    q = torch.zeros(1, 2, 1, 4)
    problem = SimpleNamespace(q=q, v=q, dropout_p=0.0, bias=None, score=None, scale=1.0)
    assert SdpaBackend().reasons_against(problem, StridedPlan(Full())) == []
