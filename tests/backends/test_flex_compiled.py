"""Compiled FlexAttention: right on the CPU, where it gives out alone, and compiled a handful of times at most."""

import functools
import shutil

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention import flex_attention as torch_flex

from dilated_attention_pytorch.backends import DenseBackend
from dilated_attention_pytorch.backends.flex import FlexBackend, FlexOptions
from dilated_attention_pytorch.backends.flex import kernel as module
from dilated_attention_pytorch.errors import NoBackend
from dilated_attention_pytorch.patterns import Causal, Dilated, Documents, longnet
from dilated_attention_pytorch.plans import DensePlan, tile_plan
from dilated_attention_pytorch.plans.orders import OrderedPlan, ordered_plan
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.scores import Relative
from dilated_attention_pytorch.testing import CASES, contract
from dilated_attention_pytorch.testing.truth import truth

BACKEND = FlexBackend(FlexOptions(compiled=True))
COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch compiles for the CPU by a C++ compiler",
)


def problem_of(n, nk=None, batch=2, heads=4, kv_heads=4, head_dim=8, **more):
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(batch, n, heads, head_dim, generator=generator)
    k, v = (torch.randn(batch, nk or n, kv_heads, head_dim, generator=generator) for _ in range(2))
    return make_problem(q, k, v, scale=0.3, query_start=more.pop("query_start", 0), **more)


@pytest.fixture
def counter(monkeypatch):
    """Counts what dynamo compiles, and runs it eagerly."""
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    module._compiled.cache_clear()
    yield counter
    module._compiled.cache_clear()


def out_of(problem, pattern):
    with torch.no_grad():
        return BACKEND.out(problem, ordered_plan(pattern, problem) or tile_plan(pattern, problem))


def test_lengths_and_patterns_recompile_a_handful_of_times(counter):
    patterns = (
        longnet([64, 128], [1, 4]),
        longnet([100, 200], [2, 3]) & Causal(),
        Documents([90, 30]).of(Dilated(64, 2)),
    )
    for i, n in enumerate(
        (1, 2, 40, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 383, 512, 513, 640, 1000)
    ):
        pattern = patterns[i % 2] + Causal()
        problem = problem_of(n, batch=1 + i % 3)
        found = out_of(problem, pattern)
        if n < 100:
            torch.testing.assert_close(found, DenseBackend().forward(problem, DensePlan(pattern))[0])
    assert counter.frame_count <= 4
    for n in (9, 100, 300):  # queries at the end of longer keys, as a cache gives them
        out_of(problem_of(n, 400, query_start=400 - n), patterns[2] + Causal())
    assert counter.frame_count <= 5


def test_more_variants_than_torch_allows_are_an_error_not_dense_attention(counter):
    with torch._dynamo.config.patch(recompile_limit=1):
        out_of(problem_of(40), Causal() + Causal())
        with pytest.raises(
            NoBackend, match=r"torch has compiled 1 variants .* raise torch._dynamo.config.recompile_limit"
        ):
            out_of(problem_of(1, batch=1), Causal() + Causal())


@COMPILER
def test_one_kernel_serves_patterns_lengths_and_masks():
    """Counts above 1, a score rule, grouped heads, padding, rows without keys and rows by residue, compiled once."""
    score = Relative(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def padded(n):
        mask = torch.arange(n) >= torch.tensor([[n], [n // 2]])
        return problem_of(n, kv_heads=2, score=score, key_padding_mask=mask)

    runs = (
        (padded(300), longnet([64, 300], [1, 4]) & Causal()),
        (padded(512), longnet([512, 512], [4, 4])),
        (padded(170), Documents([100, 30]).of(Causal()) + Dilated(64, 2)),
    )
    orders = 0
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for problem, pattern in runs:
        plan = ordered_plan(pattern, problem) or tile_plan(pattern, problem)
        orders += isinstance(plan, OrderedPlan)
        assert BACKEND.reasons_against_out(problem, plan) == []
        with torch.no_grad():
            found = BACKEND.out(problem, plan)
        dout, dlse = contract.cotangents(problem)
        expected = truth(problem, pattern, dout, dlse)
        error = (found - expected.out).abs().max() / max(expected.out.abs().max(), dout.abs().max())
        assert error < contract.LIMITS[torch.float32]
        unseen = (expected.lse == -torch.inf).transpose(1, 2)
        assert bool((found[unseen] == 0).all())
    assert orders >= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


class TrainingOnCpu(FlexBackend):
    def reasons_against(self, problem, plan):
        return self.reasons_against_out(problem, plan)


def test_gradients_trace_below_autograd_as_they_would_for_a_gpu(monkeypatch):
    """What the compiler of a GPU would be given, run eagerly: one graph forward and backward, in a custom operator."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    module._compiled.cache_clear()
    (case,) = (c for c in CASES if c.name == "longnet_causal-grouped_heads")
    problem, backend = case.problem(torch.float32), TrainingOnCpu(FlexOptions(compiled=True))
    plan = tile_plan(case.pattern, problem, (8, 8))
    dout, dlse = contract.cotangents(problem)
    found = []

    @torch.library.custom_op("dilated_attention_tests::flex_compiled", mutates_args=())
    def inside(x: torch.Tensor) -> torch.Tensor:
        found.append(contract.run(backend, problem, plan, dout, dlse))
        return x.clone()

    inside(torch.zeros(1, requires_grad=True))
    assert max(found[0].errors(truth(problem, case.pattern, dout, dlse), dout).values()) < 1e-5
    module._compiled.cache_clear()
