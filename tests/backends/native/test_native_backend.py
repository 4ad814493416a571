"""The C kernel's results beyond the contract: threads, builds, plans, cuts, scores, what it refuses."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.backends import DenseBackend
from dilated_attention_pytorch.backends.native import NativeBackend, NativeOptions, library
from dilated_attention_pytorch.backends.native.tables import strided_tables
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.plans import DensePlan, StridedPlan, candidate_plans, tile_plan
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.scores import Relative, Softcap
from dilated_attention_pytorch.testing import CASES, ContractReport
from dilated_attention_pytorch.testing.contract import check_case

NATIVE = NativeBackend()
pytestmark = pytest.mark.skipif(NATIVE.import_error() is not None, reason=str(NATIVE.import_error()))


def make(n=300, heads=2, kv_heads=None, d=16, dv=None, batch=1, dtype=torch.float32, **more):
    g = torch.Generator().manual_seed(n)
    kv_heads, dv = kv_heads or heads, dv or d
    q, k, v = (
        torch.randn(batch, n, *size, generator=g).to(dtype) for size in ((heads, d), (kv_heads, d), (kv_heads, dv))
    )
    return make_problem(q, k, v, **{"scale": 1 / math.sqrt(d), "query_start": 0, **more})


def strided(pattern, problem):
    return next(p for p in candidate_plans(pattern, problem) if isinstance(p, StridedPlan))


def run(problem, plan, options=None, seed=1):
    backend = NativeBackend(options)
    assert backend.reasons_against(problem, plan) == []
    out, lse = backend.forward(problem, plan)
    g = torch.Generator().manual_seed(seed)
    dout, dlse = torch.randn(out.shape, generator=g).to(out.dtype), torch.randn(lse.shape, generator=g)
    return (out, lse, *backend.backward(problem, plan, dout, dlse, out, lse)[:3])


def true(problem, pattern, seed=1):
    exact = replace(problem, q=problem.q.double(), k=problem.k.double(), v=problem.v.double())
    plan, dense = DensePlan(pattern), DenseBackend()
    out, lse = dense.forward(exact, plan)
    g = torch.Generator().manual_seed(seed)
    dout, dlse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    return (out, lse, *dense.backward(exact, plan, dout.double(), dlse.double(), out, lse)[:3])


def check(found, expected, limit=1e-5):
    for x, y in zip(found, expected):
        seen = y.isfinite()
        assert torch.equal(x.isfinite(), seen)
        error = (x.double() - y)[seen].abs().max() / max(y[seen].abs().max(), 1.0)
        assert error < limit, error


PROBLEMS = {
    "one head, causal": (Causal(), {"n": 1100, "heads": 1}),
    "non-nesting": (longnet([150, 330], [1, 3]) & Causal(), {"kv_heads": 1, "d": 24, "dv": 10}),
    "no rate of 1": (longnet([128, 256], [2, 4]), {"heads": 3, "d": 5}),
    "window": (Window(70), {"d": 40}),
    "slopes": (longnet([90, 200], [1, 2]), {"score": Relative(slopes=torch.tensor([0.1, 0.01])), "d": 8}),
    "table": (Causal(), {"score": Relative(table=torch.linspace(-1, 1, 101).view(1, 101)), "d": 8}),
    "documents, padding": (
        Documents([100, 0, 150]).of(longnet([64, 128], [1, 2])),
        {"batch": 2, "key_padding_mask": torch.arange(300) >= torch.tensor([[300], [120]])},
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_cut_and_every_plan_gives_the_truth(name):
    pattern, shape = PROBLEMS[name]
    problem = make(**shape)
    expected = true(problem, pattern)
    plans = [strided(pattern, problem), tile_plan(pattern, problem, (96, 40)), tile_plan(pattern, problem)]
    for plan in plans:
        for options in (NativeOptions(), NativeOptions(part_rows=64, pack_keys=128)):
            check(run(problem, plan, options), expected)


def test_lse_is_hardly_worse_than_its_own_rounding():
    problem = make(n=500, heads=8)
    expected = true(problem, Full())[1]
    error, rounding = (x - expected for x in (run(problem, strided(Full(), problem))[1], expected.float()))
    assert error.square().mean() < (1.8 * rounding.square().mean().sqrt()) ** 2  # 2 where powers of two are rounded


@pytest.mark.parametrize("vector", ["avx2", "portable"])
@pytest.mark.parametrize("name", ["non-nesting", "slopes"])
def test_other_builds_give_the_same(vector, name):
    options = NativeOptions(vector=vector)
    missing = NativeBackend(options).import_error()
    if missing is not None:
        pytest.skip(missing)
    pattern, shape = PROBLEMS[name]
    problem = make(**shape)
    for plan in (strided(pattern, problem), tile_plan(pattern, problem)):
        check(run(problem, plan, options), [x.double() for x in run(problem, plan)], 2e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = replace(problem, q=problem.q.to(dtype), k=problem.k.to(dtype), v=problem.v.to(dtype))
        check(run(half, strided(pattern, half), options), [x.double() for x in run(half, strided(pattern, half))], 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_threads_do_not_change_a_bit(dtype, kv_heads):
    problem = make(n=2100, kv_heads=kv_heads, d=8, dtype=dtype)  # few heads: backward is cut in parts
    pattern = longnet([500, 2000], [1, 3]) & Causal()
    plans = (strided(pattern, problem), tile_plan(pattern, problem))
    assert strided_tables(plans[0], problem, 4096).parts > 1
    before = torch.get_num_threads()
    try:
        for plan in plans:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(problem, plan))
            for other in results[1:]:
                assert all(torch.equal(x, y) for x, y in zip(results[0], other))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("longnet-placed", "longnet_causal-values_wider")])
def test_the_contract_holds_without_wide_vectors(case):
    report = ContractReport()
    check_case(NativeBackend(NativeOptions(vector="portable")), case, torch.float16, "cpu", report)
    assert report.checked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padded_keys_may_hold_anything(dtype):
    problem = make(n=200, batch=2, dtype=dtype, key_padding_mask=torch.arange(200) >= torch.tensor([[130], [200]]))
    spoiled = replace(problem, k=problem.k.clone(), v=problem.v.clone())
    for x in (spoiled.k, spoiled.v):
        x[0, 130:] = torch.nan
    for plan in (strided(Full(), problem), tile_plan(Full(), problem)):
        assert all(torch.equal(x, y) for x, y in zip(run(problem, plan), run(spoiled, plan)))


def test_nan_and_large_logits_stay_where_they_are():
    problem = make(n=100, heads=1)
    q = problem.q.clone()
    q[0, 7] = torch.nan
    q[0, 8] *= 1e4
    spoiled = replace(problem, q=q)
    for plan in (strided(Full(), problem), tile_plan(Full(), problem)):
        (out, lse), (clean, clean_lse) = (NATIVE.forward(p, plan) for p in (spoiled, problem))
        assert out[0, 7].isnan().all()
        assert lse[0, 0, 7].isnan()
        rows = [i for i in range(100) if i not in (7, 8)]
        assert torch.equal(out[:, rows], clean[:, rows])
        assert torch.equal(lse[..., rows], clean_lse[..., rows])
        assert out[0, 8].isfinite().all()


def test_memory_does_not_grow():
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm, which only Linux has")
    problem = make(n=1000, heads=2)
    plan = strided(Causal(), problem)

    def pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(5):
        run(problem, plan)
    before = pages()
    for _ in range(40):
        run(problem, plan)
    assert (pages() - before) * 4096 < 4 << 20


def test_what_it_cannot_do_it_says():
    plan = DensePlan(Causal())

    def why(problem):
        return " ".join(NATIVE.reasons_against(problem, plan))

    x = make(n=4)
    assert why(x) == ""
    assert why(replace(x, q=x.q.to("meta"))) == ""
    assert "float64 has no kernel here; use backend='sdpa'" in why(make(n=4, dtype=torch.float64))
    assert "no dropout (dropout_p=0.5)" in why(replace(x, dropout_p=0.5))
    assert "no bias" in why(replace(x, bias=torch.zeros(4)))
    assert "no Softcap score" in why(replace(x, score=Softcap(2.0)))
    far = make(n=4, query_start=2**31, score=Relative(slopes=torch.ones(2)))
    assert "below 2^31" in why(far)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"vector": "mmx"}, "'avx512'"), ({"part_rows": 100}, "multiple of 64"), ({"pack_keys": True}, "multiple of 64")],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        NativeOptions(**options)


def test_candidates_are_options_of_the_same_build():
    options = NativeBackend(NativeOptions(vector="portable")).candidates(make(n=4))
    assert options[0] == NativeOptions(vector="portable")
    assert {o.vector for o in options} == {"portable"}


def test_tables_are_made_once_for_a_plan():
    problem = make()
    plan = strided(longnet([64, 128], [1, 2]), problem)
    first = strided_tables(plan, problem, 4096)
    assert strided_tables(plan, problem, 4096) is first
    assert strided_tables(plan, problem, 64) is not first
    assert first.pairs == plan.issued_pairs(problem)


def test_no_work_memory_is_an_error():
    many = 1 << 44  # rows that share one number: 512 TiB once packed, which no address space holds
    x = torch.zeros(1, 1, 1, 4).expand(1, many, 1, 4)
    problem = make_problem(x[:, :1], x, x, scale=1.0, query_start=0)
    with pytest.raises(MemoryError, match="work buffers"):
        NativeBackend(NativeOptions(pack_keys=many)).forward(problem, StridedPlan(Full(), ()))


def test_the_threads_are_those_of_pytorch(monkeypatch):
    """Where PyTorch brought GNU's OpenMP, its team does the work; elsewhere threads are started, with the same bits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    problem, team, found = make(n=600, heads=4), library.thread_team(), []
    (plan, *_) = candidate_plans(longnet([200, 600], [1, 3]), problem)
    for given in (team, None):
        monkeypatch.setattr(library, "thread_team", lambda given=given: given)
        found.append(NATIVE.forward(problem, plan))
    assert all(torch.equal(x, y) for x, y in zip(*found))
