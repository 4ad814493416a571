"""A thousand random problems through every law, and long windows; `make nightly` runs them."""

from random import Random

import pytest
import torch

from dilated_attention_pytorch import Causal, Window, attend, longnet
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.plans import DensePlan, planner
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.testing import ContractReport
from dilated_attention_pytorch.testing.cases import random_case
from dilated_attention_pytorch.testing.contract import DTYPES, check_case

pytestmark = pytest.mark.nightly


@pytest.mark.usefixtures("flex_without_dynamo")
@pytest.mark.parametrize("block", range(20))
def test_a_thousand_random_problems(block):
    for seed in range(50 * block, 50 * (block + 1)):
        case = random_case(Random(seed), f"seed {seed}")
        for backend in BACKENDS:
            report = ContractReport()
            check_case(backend, case, torch.float32, "cpu", report)
            check_case(backend, case, DTYPES[1 + seed % 3], "cpu", report)
            assert report.checked or backend.name != "dense"


@pytest.mark.parametrize("seed", range(200))
def test_plans_of_long_random_problems(seed):
    random = Random(seed)
    n = random.randint(1000, 3000)
    x = torch.zeros(1, n, 2, 1)
    nq = random.choice((n, random.randint(1, n)))
    problem = make_problem(x[:, :nq], x, x, scale=1.0, query_start=random.randint(0, n))
    pattern = random.choice((Window(random.randint(1, 700)), longnet([random.randint(50, 900)] * 2, [1, 3])))
    pattern = random.choice((pattern, pattern & Causal(), pattern & Window(random.randint(1, 300))))
    plan = planner.strided_plan(pattern, problem)
    assert plan is not None
    assert torch.equal(plan.expand(problem), DensePlan(pattern).expand(problem))


def test_inductor_compiles_it():
    torch._dynamo.reset()
    pattern = longnet([8, 16], [1, 2]) & Causal()

    def step(q):
        return attend(q.sin(), q, q, pattern).cos().sum()

    x = torch.randn(1, 40, 2, 8, requires_grad=True)
    found = torch.compile(step, fullgraph=True)(x)
    torch.testing.assert_close(found, step(x))
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(step(x), x))
