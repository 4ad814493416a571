"""What half types may be off by: what a rounded out makes of gradients is allowed for, and nothing more is."""

from dataclasses import replace
from random import Random

import pytest
import torch

from dilated_attention_pytorch.backends import BACKENDS, DenseBackend
from dilated_attention_pytorch.scores import Softcap
from dilated_attention_pytorch.testing import CASES, MUTANTS, ContractReport, ContractViolation, check_contract
from dilated_attention_pytorch.testing.cases import Case, random_case
from dilated_attention_pytorch.testing.contract import HalfLimits, check_case, cotangents, plan_of, run
from dilated_attention_pytorch.testing.truth import Result, given_out, plain, truth

LOST = random_case(Random(91), "of one channel")  # here delta is off by more than plain PyTorch's own errors


class DeltaOff(DenseBackend):
    """Differentiates with an out that is 3 % too large: more than any rounding."""

    name = "delta_off"

    def backward(self, problem, plan, dout, dlse, out, lse):
        return super().backward(problem, plan, dout, dlse, out * 1.03, lse)


@pytest.mark.parametrize("name", ["dense", "sdpa", "native"])
def test_what_rounding_out_costs_is_no_fault_of_backward(name):
    backend = next(b for b in BACKENDS if b.name == name)
    if backend.import_error() is not None:
        pytest.skip(f"{name} cannot run here: {backend.import_error()}")
    problem = LOST.problem(torch.bfloat16)
    dout, dlse = cotangents(problem)
    expected = truth(problem, LOST.pattern, dout, dlse)
    found = run(backend, problem, plan_of(backend, problem, LOST.pattern), dout, dlse)
    errors = found.errors(expected, dout)
    yardstick = plain(problem, LOST.pattern, dout, dlse).errors(expected, dout)
    assert errors["dk"] > 2 * yardstick["dk"] + 2**-9, "the case is one that needs it"
    limits = HalfLimits(problem, LOST.pattern, yardstick)
    for part, error in errors.items():
        assert error <= limits.of(part, found, expected, dout, error)
    given = given_out(problem, LOST.pattern, expected, found.out, dout)
    assert found.errors(given, dout)["dk"] < 2**-9, "what is left is the rounding of dk itself"


def test_an_out_that_is_off_shows_as_the_formula_says():
    """Autograd through a delta that reads another out: the definition of what is allowed for."""
    case = Case("", LOST.pattern, query_length=11, kv_heads=2, score=Softcap(2.0), bias_shape=(1, 4, 11, 11))
    problem = case.problem(torch.float64)
    dout, dlse = cotangents(problem)
    expected = truth(problem, case.pattern, dout, dlse)
    other = expected.out + 0.1 * torch.randn(expected.out.shape, generator=torch.Generator().manual_seed(2))
    found = given_out(problem, case.pattern, expected, other, dout)
    again = DenseBackend().backward(
        problem, plan_of(DenseBackend(), problem, case.pattern), dout, dlse, other, expected.lse
    )
    for x, y in zip(found.grads, again):
        torch.testing.assert_close(x, y)
    assert not torch.allclose(found.grads.q, expected.grads.q)
    torch.testing.assert_close(found.grads.v, expected.grads.v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_delta_that_is_off_by_more_fails(dtype):
    for case in (LOST, *(c for c in CASES if c.name in ("longnet", "causal"))):
        with pytest.raises(ContractViolation, match=r"law 1, .*error of d[qk]"):
            check_case(DeltaOff(), case, dtype, "cpu", ContractReport())


@pytest.mark.parametrize("name", [m.name for m in MUTANTS if m.name not in ("own_denominator", "half_precision_sums")])
def test_wrong_backends_fail_in_half_types_too(name):
    """But for one that only a ring shows, which half types do not run, and one that is wrong in float32 only."""
    mutant = next(m for m in MUTANTS if m.name == name)
    cases = [c for c in CASES if c.name in ("longnet", "longnet-placed", "sparse_rows", "longnet_causal-padded")]
    with pytest.raises(ContractViolation):
        check_contract(mutant, cases, dtypes=[torch.bfloat16])


class Rounding(DenseBackend):
    """Rounds the results of shares, so that a ring adds up their errors."""

    name = "rounding"

    def forward(self, problem, plan):
        return super().forward(replace(problem, partial=False), plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shares_in_half_precision_fail(dtype):
    (case,) = (c for c in CASES if c.name == "longnet")
    with pytest.raises(ContractViolation, match=r"law 1 of a share.*: out is .*16, expected .* torch\.float32"):
        check_case(Rounding(), case, dtype, "cpu", ContractReport())


def test_what_is_no_number_is_above_every_limit():
    problem = LOST.problem(torch.bfloat16)
    dout, dlse = cotangents(problem)
    expected = truth(problem, LOST.pattern, dout, dlse)
    wrong = Result(torch.full_like(dout, torch.nan), expected.lse, expected.grads)
    limits = HalfLimits(problem, LOST.pattern, dict.fromkeys(expected.named(), 0.0))
    assert not limits.of("dk", wrong, expected, dout, torch.nan) >= 0
