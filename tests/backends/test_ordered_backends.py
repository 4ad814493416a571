"""Any backend gives the same in residue order as in row order, the gradient of a bias included."""

from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.backends import DenseBackend
from dilated_attention_pytorch.backends.ordered import backward_in_order, forward_in_order
from dilated_attention_pytorch.plans import DensePlan, orders
from dilated_attention_pytorch.plans.orders import ordered_plan
from dilated_attention_pytorch.testing import CASES
from dilated_attention_pytorch.testing.contract import cotangents


class InAnyOrder(DenseBackend):
    """Dense attention at the positions that it is given."""

    def forward(self, problem, plan):
        return super().forward(problem, DensePlan(plan.pattern))

    def backward(self, problem, plan, *rest):
        return super().backward(problem, DensePlan(plan.pattern), *rest)


NAMES = ("padded", "bias", "bias_of_keys", "bias_of_heads", "bias_padded", "dropout_grouped", "table")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in {f"longnet_causal-{n}" for n in NAMES}], ids=str)
def test_rows_in_order_give_the_same(case, monkeypatch):
    monkeypatch.setattr(orders, "WORTH", 100.0)
    problem = case.problem(torch.float64)
    plan = ordered_plan(case.pattern, replace(problem, bias=None), (8, 8))
    dout, dlse = cotangents(problem)
    backend = InAnyOrder()
    out, lse = backend.forward(problem, plan)
    found = forward_in_order(backend, problem, plan)
    torch.testing.assert_close(found, (out, lse))
    for given in (dlse, None):
        grads = backward_in_order(backend, problem, plan, dout, given, out, lse)
        assert all(x.is_contiguous() for x in grads if x is not None)
        torch.testing.assert_close(tuple(grads), tuple(backend.backward(problem, plan, dout, given, out, lse)))
