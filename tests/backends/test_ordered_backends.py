"""Any backend gives the same in residue order as in row order, the gradient of a bias included."""

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.backends import DenseBackend, NativeBackend, SdpaBackend
from dilated_attention_pytorch.backends.ordered import backward_in_order, forward_in_order
from dilated_attention_pytorch.patterns import Dilated
from dilated_attention_pytorch.plans import DensePlan, orders
from dilated_attention_pytorch.plans.orders import ordered_plan
from dilated_attention_pytorch.testing import CASES
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import cotangents


class InAnyOrder(DenseBackend):
    """Dense attention at the positions that it is given; ``key_lengths`` stand for the padding that tables know of."""

    key_lengths = None

    def forward(self, problem, plan):
        return super().forward(replace(problem, key_lengths=self.key_lengths), DensePlan(plan.pattern))

    def backward(self, problem, plan, *rest):
        problem = replace(problem, key_lengths=self.key_lengths)
        return super().backward(problem, DensePlan(plan.pattern), *rest)


NAMES = ("padded", "bias", "bias_of_keys", "bias_of_heads", "bias_padded", "dropout_grouped", "table")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in {f"longnet_causal-{n}" for n in NAMES}], ids=str)
def test_rows_in_order_give_the_same(case, monkeypatch):
    monkeypatch.setattr(orders, "WORTH", 100.0)
    problem = case.problem(torch.float64)
    plan = ordered_plan(case.pattern, replace(problem, bias=None), (8, 8))
    dout, dlse = cotangents(problem)
    backend = InAnyOrder()
    backend.key_lengths = problem.key_lengths
    out, lse = backend.forward(problem, plan)
    found = forward_in_order(backend, problem, plan)
    torch.testing.assert_close(found, (out, lse))
    for given in (dlse, None):
        grads = backward_in_order(backend, problem, plan, dout, given, out, lse)
        assert all(x.is_contiguous() for x in grads if x is not None)
        torch.testing.assert_close(tuple(grads), tuple(backend.backward(problem, plan, dout, given, out, lse)))


@pytest.mark.parametrize("backend", [SdpaBackend(), NativeBackend()], ids=lambda b: b.name)
def test_padding_that_order_moves_between_the_keys(backend):
    if backend.import_error() is not None:
        pytest.skip(f"{backend.name}: {backend.import_error()}")
    case = Case("", Dilated(512, 4), query_length=512, visible=(512, 300))
    problem = case.problem(torch.float32)
    problem.k[1, 300:], problem.v[1, 300:] = torch.nan, torch.nan  # the padding may hold anything
    plan, (dout, dlse) = ordered_plan(case.pattern, problem), cotangents(problem)
    out, lse = backend.forward(problem, plan)
    grads = backend.backward(problem, plan, dout, dlse, out, lse)
    clean = case.problem(torch.float32)
    dense = DensePlan(case.pattern)
    torch.testing.assert_close((out, lse), DenseBackend().forward(clean, dense), atol=1e-5, rtol=1e-5)
    expected = DenseBackend().backward(clean, dense, dout, dlse, out, lse)
    torch.testing.assert_close(tuple(grads), tuple(expected), atol=1e-5, rtol=1e-5)
