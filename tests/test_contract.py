"""Every backend keeps every law on every case and dtype, or gives a reason; every wrong backend breaks one."""

from collections import Counter

import pytest
import torch

from dilated_attention_pytorch.backends import BACKENDS, DenseBackend
from dilated_attention_pytorch.backends.base import Backend
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan
from dilated_attention_pytorch.testing import (
    CASES,
    MUTANTS,
    PATTERNS,
    ContractReport,
    ContractViolation,
    check_contract,
)
from dilated_attention_pytorch.testing.contract import DTYPES, check_case, check_large_offsets, check_packed

# Words in the names of cases that a backend may refuse; "scale" is a scale that is not above 0.
NO_RULES = ("bias", "softcap", "dropout")
REFUSED = {
    "native": NO_RULES,
    "sdpa": (*NO_RULES, "score", "slopes", "table", "values_", "scale"),
    "dense": (),
}
"""The backends that run on any CPU; the others keep the contract in their own tests."""
HERE = [b for b in BACKENDS if b.name in REFUSED]


def _skip_without_compiler(backend: Backend) -> None:
    if backend.name == "native" and backend.import_error() is not None:
        pytest.skip(f"native cannot run here: {backend.import_error()}")


def every_day() -> set[tuple[str, torch.dtype]]:
    """(Case, dtype) that are not left to the night.

    All laws are read in float32, of every case. Of the other dtypes a shape that three patterns have meets one with
    each of them; a pattern meets float64 in one of its two places and a half type in the other; other cases meet all.
    """
    others, halves = DTYPES[1:], DTYPES[2:]
    chosen, seen = {(case.name, torch.float32) for case in CASES}, Counter()
    patterns = list(PATTERNS)
    shared = Counter(case.name.partition("-")[2] for case in CASES)
    for case in CASES:
        pattern, _, shape = case.name.partition("-")
        if shape in ("", "placed"):
            turn = patterns.index(pattern) + (shape == "placed")
            chosen.add((case.name, torch.float64 if turn % 2 else halves[turn // 2 % 2]))
        elif shared[shape] == len(others):
            chosen.add((case.name, others[(seen[shape] + list(shared).index(shape)) % len(others)]))
        else:
            chosen |= {(case.name, dtype) for dtype in others}
        seen[shape] += 1
    return chosen


EVERY_DAY = every_day()
CASES_AND_DTYPES = [
    pytest.param(
        case,
        dtype,
        id=f"{case.name}-{str(dtype).removeprefix('torch.')}",
        marks=() if (case.name, dtype) in EVERY_DAY else pytest.mark.nightly,
    )
    for case in CASES
    for dtype in DTYPES
]


def test_every_day_each_pattern_and_shape_meets_the_kinds_of_dtypes():
    met: dict[str, set[torch.dtype]] = {}
    for name, dtype in EVERY_DAY:
        pattern, _, shape = name.partition("-")
        for part in {shape} - {""}, {pattern} & set(PATTERNS):
            for feature in part:
                met.setdefault(feature, set()).add(dtype)
    half = {torch.bfloat16, torch.float16}
    for feature, dtypes in met.items():
        assert {torch.float32, torch.float64} <= dtypes, feature
        assert dtypes & half, feature
        assert dtypes >= half or feature in PATTERNS, feature


@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES)
def test_laws(backend: Backend, case, dtype):
    _skip_without_compiler(backend)
    report = ContractReport()
    check_case(backend, case, dtype, "cpu", report)
    if report.refused and not (backend.name == "native" and dtype == torch.float64):
        assert any(word in case.name for word in REFUSED[backend.name]), report.refused
    assert report.checked or report.refused


@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
def test_packed_documents_equal_documents_alone(backend: Backend):
    _skip_without_compiler(backend)
    report = ContractReport()
    check_packed(backend, "cpu", report)
    assert not report.refused
    assert report.checked >= 3 * len(set(backend.plans) - {OrderedPlan}), "few documents gain from another order"


@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
def test_rows_past_element_two_to_the_31(backend: Backend):
    _skip_without_compiler(backend)
    report = ContractReport()
    check_large_offsets(backend, "cpu", report)
    assert report.checked == 1


def _cheap_first():
    """Cases on which the mutants differ, so that each fails soon; those that break no value need the rest."""
    names = ("longnet", "longnet-placed", "sparse_rows", "longnet_causal-padded")
    return [c for c in CASES if c.name in names]


# What each wrong backend is caught by.
CAUGHT = {
    "head_left_zero": "law 1, .*error of out",
    "scale_forgotten": "law 1, .*error of out",
    "union_for_sum": "law 1, .*error of out",
    "mean_for_merge": "law 1, .*error of out",
    "detached_merge": "law 1, .*error of dq",
    "own_denominator": "law 4, .*error of dq",
    "divided_by_sum": "law 1, .*error of out",
    "offsets_32": "law 1, rows past element 2.31: error of out",
    "padding_ignored": "law 1, .*(placed|padded).*error of out",
    "input_scaled_in_place": "law 6, .*written to",
    "rows_left_unwritten": "error of out is nan",
    "lse_gradient_dropped": "law 1, .*error of dq",
    "lse_in_bits": "law 1, .*error of lse",
    "half_precision_sums": "law 1, .*error of out",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_contract_fails_wrong_backends(mutant: Backend):
    with pytest.raises(ContractViolation, match=CAUGHT[mutant.name]):
        check_contract(mutant, _cheap_first(), dtypes=[torch.float32])


@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
def test_contract_passes_right_backends_on_the_same_cases(backend: Backend):
    _skip_without_compiler(backend)
    report = check_contract(backend, _cheap_first(), dtypes=[torch.float32])
    assert report.checked >= 4 * len(_cheap_first()) + 3 + 1
    assert not report.refused


def test_mutants_are_wrong_in_different_ways():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    wanted = {"head_left_zero", "scale_forgotten", "union_for_sum", "mean_for_merge", "detached_merge"}
    assert wanted | {"divided_by_sum", "offsets_32"} <= {m.name for m in MUTANTS}


class _Refusing(DenseBackend):
    name = "refusing"

    def reasons_against(self, problem, plan):
        return ["not today"]


def test_a_refusal_is_reported_with_its_reason():
    report = check_contract(_Refusing(), [CASES[0]], dtypes=[torch.float32])
    assert report.checked == 0
    assert report.refused["full float32"] == ("not today",)
    assert "not today" in str(report)


def test_a_plan_that_is_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(DensePlan, "expand", lambda self, problem: torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ContractViolation, match="law 7"):
        check_case(DenseBackend(), CASES[0], torch.float32, "cpu", ContractReport())


def test_cases_have_unique_names_and_hold_every_pattern():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    assert set(PATTERNS) <= set(names)
