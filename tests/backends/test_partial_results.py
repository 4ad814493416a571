"""Results of a share of a larger problem: in the accumulate dtype, as exact as float32, rounded nowhere on the way."""

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import attention
from dilated_attention_pytorch.backends import BACKENDS, reasons
from dilated_attention_pytorch.patterns import BlockSparse, Causal, Dilated, Window, longnet
from dilated_attention_pytorch.plans import DensePlan, StridedPlan, TilePlan
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import LIMITS, cotangents, plans_for, run
from dilated_attention_pytorch.testing.truth import truth

HALVES = (torch.bfloat16, torch.float16)
TABLE = BlockSparse(16, torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.7)
CASES = {
    "one_piece": Case("", Causal(), query_length=33),
    "branches": Case("", longnet([8, 16, 32], [1, 2, 4]) & Causal(), query_length=45, visible=(45, 20)),
    "grouped": Case("", longnet([16, 64], [1, 4]), query_length=64, kv_heads=2),
    "tables": Case("", TABLE & Causal(), query_length=60, kv_heads=2),
    "scattered": Case("", Dilated(24, 2) & Dilated(40, 3) & Window(30), query_length=50),
}
BY_NAME = {b.name: b for b in BACKENDS}


def partial(problem):
    return replace(problem, partial=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["dense", "sdpa", "native"])
def test_shares_of_half_types_are_as_exact_as_float32(name, case, dtype):
    backend, case = BY_NAME[name], CASES[case]
    if backend.import_error() is not None:
        pytest.skip(f"{name} cannot run here: {backend.import_error()}")
    problem = case.problem(dtype)
    dout, dlse = cotangents(problem)
    expected, kinds = truth(problem, case.pattern, dout, dlse), set()
    for plan in plans_for(backend, problem, case.pattern):
        if reasons(backend, problem, (plan,))[0] is None:
            continue
        kinds.add(type(plan))
        found = run(backend, partial(problem), plan, dout, dlse)
        assert {x.dtype for x in found.named().values()} == {torch.float32}
        for part, error in found.errors(expected, dout).items():
            assert error <= LIMITS[torch.float32], (plan, part)
        rounded = backend.forward(problem, plan)[0]
        assert rounded.dtype == dtype
        assert torch.equal(rounded, found.out.to(dtype)), "only the last rounding is left out"
        whole = backend.backward(problem, plan, dout, dlse, found.out, found.lse)
        for x, y in zip(whole[:3], found.grads[:3]):
            assert x.dtype == dtype
            assert torch.equal(x, y.to(dtype))
        halved = backend.backward(partial(problem), plan, dout, dlse, rounded, found.lse)
        assert not torch.equal(halved.q, found.grads.q), "what is given is read: a rounded out is another"
        torch.testing.assert_close(halved.q, found.grads.q, atol=0.05, rtol=0.05)
    assert kinds


def test_every_kind_of_plan_is_among_these():
    kinds = {type(p) for c in CASES.values() for p in plans_for(BY_NAME["sdpa"], c.problem(HALVES[0]), c.pattern)}
    assert {StridedPlan, TilePlan, DensePlan} <= kinds


def test_kernels_that_round_are_cast():
    problem = replace(CASES["tables"].problem(torch.bfloat16), needs_grad=False)
    flex = BY_NAME["flex"]
    (plan,) = (p for p in plans_for(flex, problem, CASES["tables"].pattern) if isinstance(p, TilePlan))
    out, lse = flex.forward(partial(problem), plan)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert torch.equal(out.to(torch.bfloat16), flex.forward(problem, plan)[0])
    empty = replace(problem, k=problem.k[:, :0], v=problem.v[:, :0], key_positions=())
    assert flex.forward(partial(empty), plan)[0].dtype == torch.float32
    assert flex.backward(partial(empty), plan, out, None, out, lse).k.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_through_attention_and_of_nothing(dtype, wide):
    case = CASES["branches"]
    problem = partial(case.problem(dtype))
    dout, dlse = cotangents(problem)
    for given in (
        problem,
        replace(problem, q=problem.q[:, :0], query_positions=()),
        replace(problem, k=problem.k[:, :0], v=problem.v[:, :0], key_positions=()),
    ):
        rows = given.query_length
        out, lse = attention.forward(given, case.pattern)
        grads = attention.backward(given, case.pattern, dout[:, :rows], dlse[..., :rows], out, lse)
        assert {x.dtype for x in (out, lse, *grads[:3])} == {wide}
        assert [x.shape for x in grads[:3]] == [x.shape for x in (given.q, given.k, given.v)]
