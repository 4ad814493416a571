"""The Triton backend without a GPU: what it refuses and why, its options, and the tables that it makes for kernels."""

import importlib.util
import re

import pytest
import torch

from dilated_attention_pytorch.backends.triton import TritonBackend, TritonOptions
from dilated_attention_pytorch.backends.triton.arguments import document_table, power_of_two, unit_stride
from dilated_attention_pytorch.backends.triton.config import FAMILIES, default_blocks, family_of
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Causal, Documents, longnet
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.plans.tiles import tile_plan
from dilated_attention_pytorch.problem import Run, make_problem
from dilated_attention_pytorch.scores import Relative, Softcap

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is not installed: pip install 'dilated-attention-pytorch[triton]'"
)
CPU = torch.device("cpu")


def problem(dtype=torch.float16, head_dim=16, device="meta", **change):
    q = torch.empty(2, 40, 4, head_dim, dtype=dtype, device=device)
    return make_problem(q, q, q, scale=1.0, query_start=0, **change)


def against(given, plan=None) -> str:
    plan = candidate_plans(Causal(), problem(torch.float32, device="cpu"))[0] if plan is None else plan
    return "; ".join(TritonBackend().reasons_against(given, plan))


def test_a_missing_triton_is_a_reason_with_the_line_that_mends_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    error = TritonBackend().import_error()
    assert error is not None
    assert "pip install 'dilated-attention-pytorch[triton]'" in error


def test_the_package_imports_without_triton(fresh_interpreters):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from dilated_attention_pytorch.backends.triton import TritonBackend, TritonOptions\n"
        "assert TritonBackend().options == TritonOptions()\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)\n"
    )
    fresh_interpreters.run(code)


@needs_triton
def test_present_triton_is_no_reason():
    assert TritonBackend().import_error() is None


def test_on_a_cpu_the_reason_says_where_the_kernels_run():
    text = against(problem(device="cpu"))
    assert "cuda and xpu devices, not on cpu" in text
    assert "backend='sdpa'" in text


def test_asking_on_a_cpu_imports_no_triton(fresh_interpreters):
    code = (
        "import sys, torch\n"
        "from dilated_attention_pytorch.backends.triton import TritonBackend\n"
        "from dilated_attention_pytorch.patterns import Causal\n"
        "from dilated_attention_pytorch.plans import candidate_plans\n"
        "from dilated_attention_pytorch.problem import make_problem\n"
        "q = torch.zeros(1, 8, 1, 8)\n"
        "given = make_problem(q, q, q, scale=1.0, query_start=0)\n"
        "assert TritonBackend().reasons_against(given, candidate_plans(Causal(), given)[0])\n"
        "assert 'triton' not in sys.modules\n"
    )
    fresh_interpreters.run(code, TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (problem(), "not on meta"),
        (problem(torch.float64), "float64 has no kernel here"),
        (problem(head_dim=257), r"D \(257\) must be at most 256"),
        (problem(bias=torch.zeros(1, device="meta")), "no bias tensor"),
        (problem(score=Softcap(2.0)), "no score rule Softcap"),
        (problem(torch.bfloat16, head_dim=300, score=Softcap(2.0)), r"(?s)D \(300\).*Dv \(300\).*Softcap"),
    ],
)
def test_reasons_say_the_value_and_the_way_out(given, words):
    text = against(given)
    assert re.search(words, text)
    assert "backend='" in text


def test_nothing_else_is_refused():
    slopes = Relative(slopes=torch.zeros(4))
    for given in (problem(), problem(torch.bfloat16, head_dim=1), problem(torch.float32, head_dim=256, score=slopes)):
        assert len(TritonBackend().reasons_against(given, candidate_plans(Causal(), problem(device="cpu"))[0])) == 1


def test_positions_that_int32_cannot_hold_are_refused():
    q = torch.empty(1, 1, 1, 16, dtype=torch.float16, device="meta")
    far = make_problem(q, q, q, scale=1.0, query_start=1 << 29)
    assert "must stay below 536870912" in against(far)
    assert "must stay below" not in against(make_problem(q, q, q, scale=1.0, query_start=(1 << 29) - 1))


def test_odd_blocks_of_a_tile_plan_are_refused():
    here = problem(torch.float32, device="cpu")
    assert "(48, 16) must be powers of two" in against(here, tile_plan(Causal(), here, (48, 16)))
    assert "powers of two" not in against(here, tile_plan(Causal(), here, (32, 16)))


@pytest.mark.parametrize(
    "wrong",
    [{"block_m": 48}, {"block_n": 0}, {"num_warps": 3}, {"num_stages": 0}, {"backward_block_m": 8}, {"split": "some"}],
)
def test_options_that_no_kernel_takes_raise(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        TritonOptions(**wrong)


def test_options_override_the_table_for_their_kernels_only():
    options = TritonOptions(block_m=32, backward_num_warps=2)
    forward = options.blocks("hopper", "branch", "half", 64)
    assert forward == default_blocks("hopper", "branch", "half", 64)._replace(block_m=32)
    keys = options.blocks("hopper", "keys", "half", 64)
    assert keys == default_blocks("hopper", "keys", "half", 64)._replace(num_warps=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds_legal_values_everywhere(family):
    for kernel in ("branch", "list", "blocks", "queries", "keys"):
        for arithmetic in ("half", "ieee", "tf32"):
            for head_dim in (8, 48, 64, 65, 128, 129, 256):
                blocks = default_blocks(family, kernel, arithmetic, head_dim)
                TritonOptions(**blocks._asdict())
    assert family_of(CPU) == "small"


def test_candidates_are_different_and_start_with_the_options_themselves():
    backend = TritonBackend(TritonOptions(num_stages=2))
    found = backend.candidates(problem())
    assert found[0] == backend.options
    assert len(set(found)) == len(found) > 4
    assert {options.split for options in found} == {"auto", "together", "apart"}
    assert all(options.num_stages == 2 for options in found)


def test_document_table_names_each_rows_document():
    lengths = torch.tensor([[2, 0, 3], [4, 1, 0]])
    table = document_table(Documents(lengths), (Run(1, 1, 5),), CPU)
    assert table.dtype == torch.int32
    assert table[0].tolist() == [[0, 2], [2, 5], [2, 5], [2, 5], [5, 5]]  # the last row is past every document
    assert table[1].tolist() == [[0, 4], [0, 4], [0, 4], [4, 5], [5, 5]]


def test_only_a_strided_last_dim_is_copied():
    x = torch.zeros(1, 3, 2, 8)
    assert unit_stride(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert unit_stride(x[..., ::2]).stride(-1) == 1
    assert [power_of_two(d) for d in (1, 16, 17, 48, 64, 80, 256)] == [16, 16, 32, 64, 64, 128, 256]


def test_longest_branch_lists_are_planned_for_every_split():
    """Each split gives kernels for every branch, the first of which starts from nothing."""
    from dilated_attention_pytorch.backends.triton.calls import calls

    given = problem(torch.float32, device="cpu")
    pattern = longnet([8, 16, 32], [1, 2, 4])
    plan = next(p for p in candidate_plans(pattern, given) if type(p).__name__ == "StridedPlan")
    for split, kernels in (("together", ["forward_list"]), ("apart", ["forward_branch"] * 3)):
        made = calls(given, plan, "forward", TritonOptions(split=split))
        assert [call.kernel for call in made] == kernels
        assert [call.arguments["CARRY"] for call in made] == [i > 0 for i in range(len(made))]
        assert made is calls(given, plan, "forward", TritonOptions(split=split)), "calls are kept with their plan"
    assert calls(given, plan, "forward", TritonOptions())[0].arguments["CARRY"] is False
