"""The C kernel under AddressSanitizer and UndefinedBehaviorSanitizer, on odd shapes and real threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"

# Writes past its own tensors are what the fences of the work memory and the red zones around tensors notice.
PROGRAM = """
import sys
from random import Random
import torch
from dilated_attention_pytorch.backends.native import NativeBackend, NativeOptions
from dilated_attention_pytorch.patterns import Causal, longnet
from dilated_attention_pytorch.plans import StridedPlan, TilePlan, candidate_plans, tile_plan
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.testing import CASES
from dilated_attention_pytorch.testing.cases import random_case

vector = sys.argv[1]
torch.set_num_threads(2)
backends = [NativeBackend(NativeOptions(vector, *size)) for size in ((4096, 4096), (64, 64))]
assert backends[0].import_error() is None, backends[0].import_error()
ran = 0

def run(problem, plans):
    global ran
    for plan in plans:
        for backend in backends:
            if not isinstance(plan, backend.plans) or backend.reasons_against(problem, plan):
                continue
            out, lse = backend.forward(problem, plan)
            backend.backward(problem, plan, torch.randn_like(out), torch.randn_like(lse), out, lse)
            ran += 1

cases = [*CASES[::3], *(random_case(Random(seed)) for seed in range(150))]
for number, case in enumerate(cases):
    problem = case.problem((torch.float32, torch.bfloat16, torch.float16)[number % 3])
    plans = candidate_plans(case.pattern, problem)
    run(problem, [*plans, *(p for p in [tile_plan(case.pattern, problem, (32, 24))] if p is not None)])
for d, dv in ((33, 17), (80, 80)):  # several threads, several parts
    q, v = torch.randn(1, 1100, 1, d), torch.randn(1, 1100, 1, dv)
    pattern = longnet([200, 1000], [1, 3]) & Causal()
    problem = make_problem(q, q, v, scale=0.1, query_start=0)
    run(problem, [*candidate_plans(pattern, problem), tile_plan(pattern, problem)])
assert ran > 500, ran
print("clean", ran)
"""


@pytest.mark.parametrize("vector", ["auto", "avx2", "portable"])
def test_no_sanitizer_finds_anything(vector, tmp_path):
    gcc = shutil.which("gcc")
    if gcc is None or sys.platform != "linux":
        pytest.skip("needs gcc and its sanitizers on Linux")
    found = [
        subprocess.run([gcc, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    if not all(Path(name).is_absolute() for name in found):
        pytest.skip(f"gcc has no sanitizers here: {found}")
    settings = {
        "CC": f"{gcc} {SANITIZE}",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python's own allocations at exit are not ours
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, vector], env=os.environ | settings, capture_output=True, text=True, timeout=1800
    )
    if "this CPU has no" in done.stderr:
        pytest.skip(f"this CPU cannot run {vector}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("clean")
