"""Small worlds: whatever the method, the layout and the problem, many processes compute what one computes."""

import pytest
import torch

from dilated_attention_pytorch import reference_attention
from dilated_attention_pytorch.backends import DenseBackend, SdpaBackend
from dilated_attention_pytorch.backends.native import NativeBackend
from parallel.world_contract import (
    LAYOUTS,
    METHODS,
    MOST_GROWTH,
    Trial,
    ask,
    ask_for,
    cases,
    half_type_errors,
    judge,
    options,
    refused_with,
    tell,
)
from parallel.worlds import run_world

HEADS = 6  # both 2 and 3 divide it
CORE = ("full", "causal", "longnet", "longnet_causal", "padded", "documents_of")
STEPS = ("causal", "longnet_causal", "not_nesting", "blocks", "fewer_kv_heads", "cross_between")


def test_one_process_is_itself_right():
    for name in ("longnet_causal", "documents_of", "blocks", "cross_beyond", "alibi"):
        a = ask(cases(HEADS)[name])
        out, lse = reference_attention(a.q, a.k, a.v, a.case.pattern, key_padding_mask=a.mask, **options(a.case))
        torch.testing.assert_close(a.truth["out"], out, rtol=0, atol=1e-12)
        torch.testing.assert_close(a.truth["lse"], lse, rtol=0, atol=1e-12)


def trials(size):
    """The core in every way; all else by every method, in one of the two worlds. What "auto" takes is one of them."""
    core = [Trial(case, layout, method) for case in CORE for layout in LAYOUTS for method in METHODS[:3]]
    core += [Trial(case, LAYOUTS[i % 3], "auto") for i, case in enumerate(CORE)]
    rest = enumerate(case for case in cases(HEADS) if case not in CORE)
    ways = [(i, j, Trial(c, LAYOUTS[(i + j) % 3], m)) for i, c in rest for j, m in enumerate(METHODS[:3])]
    return core + [trial for i, j, trial in ways if (i + j) % 2 == size % 2]


@pytest.mark.parametrize("size", [2, 3])
def test_many_processes_compute_what_one_computes(size):
    asked = trials(size)
    judge(asked, run_world(size, tell, ask_for(asked, HEADS), asked, timeout=120), refused_with(HEADS, size))


@pytest.mark.parametrize("backend", [DenseBackend(), SdpaBackend(), NativeBackend()], ids=lambda b: b.name)
def test_any_backend_computes_the_steps_of_a_ring(backend):
    if backend.import_error() is not None:
        pytest.skip(backend.import_error())
    dtype = torch.float32 if backend.name == "native" else torch.float64
    steps = [Trial(c, LAYOUTS[i % 3], "ring", backend.name, dtype=dtype) for i, c in enumerate(STEPS)]
    judge(steps, run_world(2, tell, ask_for(steps, HEADS), steps), refused_with(HEADS, 2))


def test_errors_of_half_types_do_not_grow_with_the_world():
    methods = ("ring", "gather")
    one, *more = (half_type_errors(size, *methods) for size in (1, 2, 3))
    for errors in more:
        for method, alone, many in zip(methods, one, errors, strict=True):
            grown = {x for x in alone if not many[x] <= (1.2 if x == "lse" else MOST_GROWTH) * alone[x]}
            assert not grown, (method, grown, alone, many)
