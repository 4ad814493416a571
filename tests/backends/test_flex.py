"""FlexAttention on tables of tiles: the contract on its eager form, gradients by its own means, limits as reasons."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from dilated_attention_pytorch.backends import DenseBackend
from dilated_attention_pytorch.backends.flex import FlexBackend, FlexOptions
from dilated_attention_pytorch.backends.flex import backend as module
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import BlockSparse, Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.plans import TilePlan, candidate_plans, orders, tile_plan
from dilated_attention_pytorch.plans.orders import OrderedPlan, ordered_plan
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.selection import SelectedTiles
from dilated_attention_pytorch.testing import CASES, ContractReport, ContractViolation, contract
from dilated_attention_pytorch.testing.contract import check_case, check_large_offsets, check_packed, run
from dilated_attention_pytorch.testing.truth import truth

BACKEND = FlexBackend(FlexOptions(compiled=False))
BLOCK = (8, 8)
NO_BACKWARD = "FlexAttention has no backward on the CPU; call under torch.no_grad() or use backend='sdpa'"


def cases(*names: str):
    chosen = [c for c in CASES if c.name in names] if names else CASES
    assert len(chosen) == len(names or CASES)
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


def small_plans(backend, problem, pattern):
    """Blocks so small that the contract's lengths hold many, and rows by residue wherever there are rates."""
    plans = (ordered_plan(pattern, problem, BLOCK), tile_plan(pattern, problem, BLOCK))
    return tuple(plan for plan in plans if plan is not None)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch, flex_without_dynamo):
    monkeypatch.setattr(contract, "plans_for", small_plans)
    monkeypatch.setattr(orders, "WORTH", 100.0)


class TrainingOnCpu(FlexBackend):
    """The eager operator has gradients on the CPU too, behind a check that the fixture `training` takes away."""

    def reasons_against(self, problem, plan):
        return self.reasons_against_out(problem, plan)


@pytest.fixture
def training(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    return TrainingOnCpu(FlexOptions(compiled=False))


EVERY_DAY = [c for c in CASES if "-" not in c.name][::2]
EVERY_DAY += [c for c in CASES if c.name.startswith("longnet_causal-")][::8]
"""Every other pattern and some shapes; all of them in all dtypes each night."""


@pytest.mark.parametrize("case", EVERY_DAY, ids=lambda c: c.name)
def test_laws_of_out_and_lse(case):
    report = ContractReport()
    check_case(BACKEND, case, torch.float32, "cpu", report)
    if report.refused:
        assert "bias" in case.name or "dropout" in case.name
    else:
        assert list(report.forward_only.values()) == [(NO_BACKWARD,)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@cases("not_nesting-placed", "longnet_causal-table")
def test_laws_in_other_dtypes(case, dtype):
    report = ContractReport()
    check_case(BACKEND, case, dtype, "cpu", report)
    assert report.checked == 1


def test_packed_documents_and_large_offsets():
    report = ContractReport()
    check_packed(BACKEND, "cpu", report)
    check_large_offsets(BACKEND, "cpu", report)
    assert report.checked >= 4
    assert not [name for name in report.refused if "large" in name]


@cases("longnet_causal-grouped_heads")
def test_laws_of_gradients(training, case):
    """Gradients too, from the global out and lse of parts (law 4) and in residue order; as a GPU would compute them."""
    report = ContractReport()
    check_case(training, case, torch.float32, "cpu", report)
    assert report.checked == 7
    assert not report.forward_only


class ForgetsOthers(TrainingOnCpu):
    def backward(self, problem, plan, dout, dlse, out, lse):
        return super().backward(problem, plan, dout, dlse, *self.forward(problem, plan))


class Halved(FlexBackend):
    def forward(self, problem, plan):
        out, lse = super().forward(problem, plan)
        return out / 2, lse


def test_wrong_ones_are_caught(training):
    (case,) = (c for c in CASES if c.name == "longnet_causal")
    with pytest.raises(ContractViolation, match=r"law 4, .*error of d"):
        check_case(ForgetsOthers(), case, torch.float32, "cpu", ContractReport())
    with pytest.raises(ContractViolation, match=r"law 1, .*error of out"):
        check_case(Halved(), case, torch.float32, "cpu", ContractReport())


def test_gradients_inside_a_custom_operator(training):
    """The body of a custom operator runs below autograd; the backward pass records there all the same."""
    (case,) = (c for c in CASES if c.name == "longnet_causal")
    problem = case.problem(torch.float32)
    plan = tile_plan(case.pattern, problem)
    dout, dlse = contract.cotangents(problem)
    found = []

    @torch.library.custom_op("dilated_attention_tests::flex_backward", mutates_args=())
    def inside(x: torch.Tensor) -> torch.Tensor:
        found.append(run(training, problem, plan, dout, dlse))
        return x.clone()

    inside(torch.zeros(1, requires_grad=True))
    errors = found[0].errors(truth(problem, case.pattern, dout, dlse), dout)
    assert max(errors.values()) < 1e-5


def problem_of(n=40, dtype=torch.float32, device="cpu", **more):
    q = torch.zeros(1, n, 2, more.pop("head_dim", 16), dtype=dtype, device=device)
    return make_problem(q, q, q, scale=1.0, query_start=0, **more)


def reasons(backend, problem, pattern=None):
    plan = tile_plan(Causal() if pattern is None else pattern, replace(problem, bias=None))
    return backend.reasons_against(problem, plan)


def test_limits_are_reasons():
    assert reasons(BACKEND, problem_of()) == []
    assert reasons(FlexBackend(), problem_of()) == [], "the default is eager on the CPU"
    assert reasons(BACKEND, problem_of(needs_grad=True)) == [NO_BACKWARD]
    assert "no dropout (dropout_p is 0.25)" in reasons(BACKEND, problem_of(dropout_p=0.25))[0]
    assert "a bias has no place" in reasons(BACKEND, problem_of(bias=torch.zeros(40, 40)))[0]
    compiled = FlexBackend(FlexOptions(compiled=True))
    (why,) = reasons(compiled, problem_of())
    assert why.startswith("torch compiles FlexAttention on the CPU without lse")
    assert compiled.reasons_against_out(problem_of(), tile_plan(Causal(), problem_of())) == []
    assert "FlexAttention compiles no float64" in reasons(compiled, problem_of(dtype=torch.float64))[0]
    assert reasons(BACKEND, problem_of(dtype=torch.float64)) == []
    q = torch.empty(1, 1, 1, 4).expand(1, 50_000, 1, 4)
    (why,) = reasons(BACKEND, make_problem(q, q, q, scale=1.0, query_start=0), Window(3))
    assert "holds all 2,500,000,000 pairs at once (limit 67,108,864)" in why


def test_limits_of_compiled_kernels_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "_kind", lambda problem: "cuda")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    whys = reasons(FlexBackend(), problem_of(needs_grad=True, head_dim=8))
    assert whys[0] == "Triton is missing; pip install dilated-attention-pytorch[triton]"
    assert whys[1] == "compiled FlexAttention needs head dims of at least 16, got 8; pad them"
    assert len(whys) == 2, "with gradients there"
    chosen, problem = SelectedTiles(BlockSparse(16, torch.eye(3, dtype=torch.bool)), Full()), problem_of()
    (plan,) = (p for p in candidate_plans(chosen, problem) if isinstance(p, TilePlan))
    assert "would join 16 rows with those of another choice, to 128" in FlexBackend().reasons_against(problem, plan)[-1]
    assert not any("choice" in why for why in BACKEND.reasons_against(problem, plan)), "eager joins nothing"
    monkeypatch.setattr(module, "_kind", lambda problem: "mps")
    assert "not mps" in reasons(BACKEND, problem_of())[0]
    monkeypatch.setattr(module, "TABLE_LIMIT", 10)
    assert "block lists would take 0 MiB" in reasons(BACKEND, problem_of())[-1]


def test_options():
    assert FlexOptions() == FlexOptions(compiled=None)
    with pytest.raises(InvalidInput, match=r"expected compiled to be True, False or None\. Got 'eager'"):
        FlexOptions(compiled="eager")


def test_no_keys_at_all(training):
    problem = problem_of()
    problem = replace(problem, k=problem.k[:, :0], v=problem.v[:, :0], key_positions=())
    plan = replace(tile_plan(Full(), problem_of()), pattern=Full())
    out, lse = training.forward(problem, plan)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    assert torch.equal(training.out(problem, plan), out)
    grads = training.backward(problem, plan, out, None, out, lse)
    assert [x.shape for x in grads[:3]] == [x.shape for x in (problem.q, problem.k, problem.v)]


def test_out_alone_is_out(monkeypatch):
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)  # once as users call it
    (case,) = (c for c in CASES if c.name == "longnet_causal-padded")
    problem = replace(case.problem(torch.float32), needs_grad=False)
    plans = small_plans(BACKEND, problem, case.pattern)
    assert [type(p) for p in plans] == [OrderedPlan, TilePlan]
    for plan in plans:
        out, _ = BACKEND.forward(problem, plan)
        assert torch.equal(BACKEND.out(problem, plan), out)
        torch.testing.assert_close(out, DenseBackend().forward(problem, contract.DensePlan(case.pattern))[0])


def test_tables_live_as_long_as_their_plan():
    problem = problem_of()
    plan = tile_plan(longnet([8], [2]) + Documents([20, 20]), problem)
    tables = module.tables_of(plan)
    assert module.tables_of(plan) is tables
    watch = weakref.ref(tables)
    del tables, plan
    gc.collect()
    assert watch() is None
