"""Worlds of one to eight processes: every method, layout, backend and mesh on every kind of problem."""

from random import Random

import pytest
import torch

from dilated_attention_pytorch.testing.cases import random_case
from parallel.world_contract import (
    LAYOUTS,
    METHODS,
    MOST_GROWTH,
    Trial,
    ask,
    ask_for,
    ask_many,
    cases,
    judge,
    refused_with,
    rms_errors,
    tell,
)
from parallel.worlds import run_world

pytestmark = pytest.mark.nightly

HEADS = {1: 6, 2: 6, 3: 6, 4: 8, 8: 8}
MESHES = {4: ((2, 2),), 8: ((2, 4), (4, 2))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", HEADS)
def test_every_way_computes_what_one_process_computes(size, layout):
    names = cases(HEADS[size])
    trials = [Trial(case, layout, method) for case in names for method in METHODS]
    trials += [Trial(case, layout, "ring", backend) for case in names for backend in ("dense", "sdpa")]
    trials += [
        Trial(case, layout, method, mesh=mesh)
        for mesh in MESHES.get(size, ())
        for case in names
        for method in ("ring", "gather", "auto")
    ]
    told = run_world(size, tell, ask_for(trials, HEADS[size]), trials, timeout=900)
    judge(trials, told, refused_with(HEADS[size], size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_do_not_grow_with_the_world(dtype):
    names = ("full", "causal", "longnet", "longnet_causal")
    trials = [Trial(name, "zigzag", method, dtype=dtype) for name in names for method in METHODS[:3]]
    asked = ask_many(names, (dtype,), 500, 8)
    two, *more = (rms_errors(size, asked, trials) for size in (2, 4, 8))
    most = MOST_GROWTH if dtype == torch.bfloat16 else 1.2
    grown = [
        (str(trial), x, few[x], many[x])
        for errors in more
        for trial, few, many in zip(trials, two, errors, strict=True)
        for x in few
        if not many[x] <= (1.2 if x == "lse" else most) * few[x]
    ]
    assert not grown, grown


@pytest.mark.parametrize("block", range(5))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_random_problems(size, block):
    """Gather and all-to-all may refuse, each for one reason on all ranks; a ring and "auto" refuse nothing."""
    asked, trials = {}, []
    for seed in range(40 * block, 40 * (block + 1)):
        random = Random(1000 * size + seed)
        case = random_case(random, f"seed {1000 * size + seed}")
        if case.query_start is None and case.query_length > (case.key_length or 0):
            continue
        asked[case.name, torch.float64] = ask(case)
        trials += [Trial(case.name, random.choice(LAYOUTS), method) for method in METHODS]
    told = run_world(size, tell, asked, trials, timeout=600)
    refused = {t: told[0][i] for i, t in enumerate(trials) if isinstance(told[0][i], str)}
    assert {t.method for t in refused} <= {"gather", "all_to_all"}
    judge(trials, told, refused.__contains__)
