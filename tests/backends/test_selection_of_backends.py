"""`auto` takes the first backend that can; a named one that cannot lists every reason."""

import pytest
import torch

from dilated_attention_pytorch import Causal, InvalidInput, NoBackend, Softcap, attend, backends, longnet
from dilated_attention_pytorch.backends import BACKENDS, DenseBackend, SdpaBackend, reasons, select
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan, StridedPlan, TilePlan, candidate_plans
from dilated_attention_pytorch.problem import make_problem

GRIDS = longnet([4], [2]) & longnet([6], [3])  # a product without closed form


@pytest.fixture(autouse=True)
def _two_backends_and_no_measurements(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (SdpaBackend(), DenseBackend()))
    monkeypatch.setattr(backends, "ranking", lambda *_: ((), None))


def problem_of(dv=8, **options):
    q = torch.zeros(1, 6, 2, 8)
    return make_problem(q, q, torch.zeros(1, 6, 2, dv), scale=1.0, query_start=0, **options)


def chosen(problem, pattern=None, name="auto"):
    pattern = Causal() if pattern is None else pattern
    backend, plan = select(problem, candidate_plans(pattern, problem), name)
    return backend.name, type(plan)


def test_auto_takes_the_fast_one_when_it_can():
    assert chosen(problem_of())[0] == "sdpa"
    assert chosen(problem_of(), name="dense") == ("dense", DensePlan)


def test_long_problems_take_the_strided_plan():
    x = torch.zeros(1, 4096, 2, 8)
    problem = make_problem(x, x, x, scale=1.0, query_start=0)
    assert chosen(problem, longnet([256, 1024], [1, 4])) == ("sdpa", StridedPlan)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": torch.zeros(6)},
        {"score": Softcap(1.0)},
        {"dropout_p": 0.1, "seed": torch.tensor([1])},
        {"dv": 4},
    ],
)
def test_on_a_cpu_auto_never_refuses(options):
    problem = problem_of(**options)
    assert chosen(problem) == ("dense", DensePlan)
    with pytest.raises(NoBackend, match=r"sdpa: .*use backend='dense'"):
        chosen(problem, name="sdpa")
    with pytest.raises(NoBackend, match=r"backend='dense' can, or backend='auto'"):
        chosen(problem, name="sdpa")


def test_long_patterns_without_a_closed_form():
    x = torch.zeros(1, 1024, 2, 8)
    problem = make_problem(x, x, x, scale=1.0, query_start=0)
    assert chosen(problem, GRIDS) == ("sdpa", OrderedPlan)
    long = make_problem(*[torch.zeros(1, 1024, 2, 8)] * 3, scale=1.0, query_start=0, bias=torch.zeros(1024))
    assert chosen(long, GRIDS) == ("dense", DensePlan)
    with pytest.raises(NoBackend, match=r"sdpa: .*gradient of a bias.*too long for one masked call"):
        chosen(long, GRIDS, "sdpa")


def test_a_pattern_that_gives_no_plan_of_a_kind_is_a_reason():
    strided = type("Strided", (SdpaBackend,), {"plans": (StridedPlan,)})
    problem = problem_of()
    plan, against = reasons(strided(), problem, candidate_plans(GRIDS, problem))
    assert plan is None
    assert against == ["this pattern gives no StridedPlan: it has no closed form on these positions"]


def test_every_reason_is_given():
    problem = problem_of(dv=4, bias=torch.zeros(6), score=Softcap(1.0), dropout_p=0.1)
    plan, against = reasons(SdpaBackend(), problem, candidate_plans(Causal(), problem))
    assert plan is None
    assert len(against) == 4


class _Absent(DenseBackend):
    name = "absent"

    def import_error(self):
        return "No module named 'absent'"


def test_an_import_error_is_a_reason():
    plan, against = reasons(_Absent(), problem_of(), candidate_plans(Causal(), problem_of()))
    assert plan is None
    assert against == ["No module named 'absent'"]


def test_unknown_names_are_refused():
    with pytest.raises(InvalidInput, match="'auto', 'sdpa', 'dense'"):
        chosen(problem_of(), name="cuda")


def test_the_order_of_all_backends():
    """Our own kernels first, then others' on pieces; what may start slowly stands behind what can do anything."""
    names = [b.name for b in BACKENDS]
    assert names == ["triton", "native", "flash_attn", "sdpa", "xformers", "dense", "flex"]


def test_names_are_unique_and_reasons_are_pure():
    assert len({b.name for b in BACKENDS}) == len(BACKENDS)
    problem = problem_of()
    for backend in BACKENDS:
        for plan in (p for p in candidate_plans(Causal(), problem) if isinstance(p, backend.plans)):
            assert backend.reasons_against(problem, plan) == backend.reasons_against(problem, plan)


class _TilesOnly(DenseBackend):
    name = "tiles_only"
    plans = (TilePlan,)


def test_a_backend_that_walks_tiles_only_gets_them(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (_TilesOnly(), SdpaBackend()))
    assert [backends.needs_tiles(name) for name in ("tiles_only", "sdpa", "auto", "unknown")] == [True, *[False] * 3]
    q = torch.randn(1, 9, 2, 4)
    assert torch.allclose(attend(q, q, q, Causal(), backend="tiles_only"), attend(q, q, q, Causal()), atol=1e-5)
