"""FlexAttention over every case and dtype, compiled where it compiles; and whether its limits are still there."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from dilated_attention_pytorch.backends.flex import FlexBackend, FlexOptions
from dilated_attention_pytorch.backends.flex.kernel import flex
from dilated_attention_pytorch.backends.flex.tables import tables_of
from dilated_attention_pytorch.patterns import Causal
from dilated_attention_pytorch.plans import orders, tile_plan
from dilated_attention_pytorch.plans.orders import ordered_plan
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.testing import CASES, ContractReport, contract
from dilated_attention_pytorch.testing.contract import DTYPES, LIMITS, check_case
from dilated_attention_pytorch.testing.truth import Result, plain, truth

pytestmark = pytest.mark.nightly

EAGER, COMPILED = (FlexBackend(FlexOptions(compiled=x)) for x in (False, True))


class TrainingOnCpu(FlexBackend):
    """With the eager operator's gradients, which PyTorch hides on the CPU."""

    def reasons_against(self, problem, plan):
        return self.reasons_against_out(problem, plan)


def plans(backend, problem, pattern, block=(8, 8)):
    found = (ordered_plan(pattern, problem, block), tile_plan(pattern, problem, block))
    return tuple(plan for plan in found if plan is not None)


@pytest.fixture
def _eager(monkeypatch):
    monkeypatch.setattr(contract, "plans_for", plans)
    monkeypatch.setattr(orders, "WORTH", 100.0)  # any order, so that all of them are tried
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_laws(case, dtype):
    report = ContractReport()
    forward_only = dtype in (torch.bfloat16, torch.float16)  # eager gradients round to them in between
    check_case(EAGER if forward_only else TrainingOnCpu(), case, dtype, "cpu", report)
    assert report.checked or "bias" in case.name or "dropout" in case.name


NAMES = ("placed", "one_token", "decode_padded", "grouped_heads", "padded_whole", "head_dim_1", "head_dim_24")
NAMES += ("head_dim_80", "values_wider", "values_narrower", "table", "softcap", "dropout", "last_dim_strided")
SOME = [c for c in CASES if c.name in {f"longnet_causal-{name}" for name in NAMES}]
SOME += [c for c in CASES if c.name in ("dilated", "window", "sum_with_window", "documents_batched", "not_nesting")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_compiled_out(case, dtype):
    problem = replace(case.problem(dtype), needs_grad=False)
    plan = plans(COMPILED, problem, case.pattern, (16, 16))[0]
    if dtype == torch.float64 or case.dropout_p > 0:
        assert COMPILED.reasons_against_out(problem, plan)
        return
    with torch.no_grad():
        out = COMPILED.out(problem, plan)
    dout, dlse = contract.cotangents(problem)
    expected = truth(problem, case.pattern, dout, dlse).forward_only()
    error = Result(out, expected.lse, None).errors(expected, dout)["out"]
    limit = LIMITS.get(dtype)
    if limit is None:
        limit = (
            2 * plain(problem, case.pattern, dout, dlse).forward_only().errors(expected, dout)["out"]
            + torch.finfo(dtype).eps / 2
        )
    assert error <= limit


def call(dtype=torch.float32, requires_grad=False, **more):
    x = torch.randn(1, 40, 2, 16, dtype=dtype, requires_grad=requires_grad)
    plan = tile_plan(Causal(), make_problem(x.detach(), x.detach(), x.detach(), scale=1.0, query_start=0))
    return flex(x, x, x, tables_of(plan, training=requires_grad), scale=1.0, **more)


def test_the_limits_that_reasons_name_are_still_there():
    """When torch lifts one of them this fails, and its reason goes."""
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        call(requires_grad=True)
    with torch.no_grad():
        with pytest.raises(Exception, match="only supports inference and `return_lse` is not supported"):
            call(compiled=True)
        with pytest.raises(Exception, match=r"Found input tensors are `torch.float64`"):
            call(torch.float64, compiled=True, with_lse=False)
