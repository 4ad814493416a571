"""Random shapes, patterns, cuts and dtypes through the C kernel, against the reference in float64."""

from dataclasses import replace
from random import Random

import pytest
import torch

from dilated_attention_pytorch.backends import DenseBackend
from dilated_attention_pytorch.backends.native import NativeBackend, NativeOptions
from dilated_attention_pytorch.plans import DensePlan, StridedPlan, candidate_plans, tile_plan
from dilated_attention_pytorch.scores import Relative
from dilated_attention_pytorch.testing.cases import Case, random_case, random_pattern
from dilated_attention_pytorch.testing.contract import ContractReport, check_case, cotangents, run
from dilated_attention_pytorch.testing.truth import Result

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(NativeBackend().import_error() is not None, reason=str(NativeBackend().import_error())),
]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


def random_options(random: Random) -> NativeOptions:
    return NativeOptions(part_rows=64 * random.randint(1, 4), pack_keys=64 * random.randint(1, 4))


@pytest.mark.parametrize("block", range(10))
def test_small_problems_keep_every_law(block):
    for seed in range(10_000 + 30 * block, 10_000 + 30 * (block + 1)):
        random = Random(seed)
        case, options = random_case(random, f"seed {seed}"), random_options(random)
        check_case(NativeBackend(options), case, random.choice(list(LIMITS)), "cpu", ContractReport())


def longer_case(random: Random) -> Case:
    """Hundreds of rows: several tiles, blocks and parts."""
    n, kv_heads = random.randint(200, 900), random.randint(1, 2)
    heads = kv_heads * random.randint(1, 2)
    score = random.choice(
        (None, None, Relative(slopes=torch.rand(heads)), Relative(table=torch.randn(heads, 2 * 40 + 1)))
    )
    return Case(
        "longer",
        random_pattern(random, n, depth=1),
        batch=random.randint(1, 2),
        query_length=random.choice((n, random.randint(1, n))),
        key_length=n,
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=random.randint(1, 70),
        value_dim=random.randint(1, 70),
        query_start=random.choice((None, random.randint(0, n))),
        score=score,
        layout=random.choice(("plain", "fused", "expanded")),
    )


@pytest.mark.parametrize("block", range(10))
def test_longer_problems_against_float64(block):
    for seed in range(20 * block, 20 * (block + 1)):
        random = Random(seed)
        case, dtype = longer_case(random), random.choice(list(LIMITS))
        problem = case.problem(dtype)
        exact = replace(problem, q=problem.q.double(), k=problem.k.double(), v=problem.v.double())
        dout, dlse = cotangents(problem)
        expected = run(DenseBackend(), exact, DensePlan(case.pattern), dout.double(), dlse.double())
        blocks = (random.choice((16, 64, 100, 128)), random.choice((16, 40, 64, 128)))
        plans = [p for p in candidate_plans(case.pattern, problem) if isinstance(p, StridedPlan)]
        plans.append(tile_plan(case.pattern, problem, blocks))
        for plan in plans:
            if plan is None:
                continue
            found = run(NativeBackend(random_options(random)), problem, plan, dout, dlse)
            _compare(f"seed {seed}, {case}, {type(plan).__name__} {blocks}", found, expected, dout, LIMITS[dtype])


def _compare(name: str, found: Result, expected: Result, dout: torch.Tensor, limit: float) -> None:
    assert torch.equal(found.lse.isfinite(), expected.lse.isfinite()), name
    largest = float(expected.lse.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.lse.numel() else 0.0
    limit *= max(1.0, largest / 32)  # a weight exp(s - lse) cannot be surer than a float32 of the size of lse
    for part, error in found.errors(expected, dout).items():
        assert error <= limit, f"{name}: {part} {error:.1e}"
