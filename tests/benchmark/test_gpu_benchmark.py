"""The parts of `bench --gpu` on the CPU with tiny sizes: what they compare, count, skip and refuse."""

import math
import types
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

from dilated_attention_pytorch import InvalidInput, TorchscaleCompat, explain, longnet, longnet_attention
from dilated_attention_pytorch.backends import DenseBackend, SdpaBackend
from dilated_attention_pytorch.benchmark import gpu, parts
from dilated_attention_pytorch.benchmark.baselines import gather_scatter
from dilated_attention_pytorch.benchmark.cases import GIGAPATH, PAPER, Case
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.testing import CASES, MUTANTS

CPU = torch.device("cpu")
TINY = Case("paper", 64, 4, 8, (16, 32), (1, 2))
FLASH = {"flash": SDPBackend.FLASH_ATTENTION}
SIZES = gpu.Sizes(
    cases=(TINY, replace(TINY, name="GigaPath", segment_lengths=(10, 64))),
    tokens=(40, 64),
    dataflow=64,
    dense=(64,),
    slope=(64, 128),
    contract_seconds=0.0,
    dtype=torch.float32,
)


@pytest.mark.parametrize(
    "case", [PAPER, GIGAPATH, TINY, replace(TINY, segment_lengths=(10, 100), dilation_rates=(3, 7))]
)
@pytest.mark.parametrize("tokens", [37, 10_000])
def test_pairs_of_ragged_lengths_are_those_of_the_plan(case, tokens):
    x = torch.empty(1, tokens, case.heads, case.head_dim, device="meta")
    expected = explain(x, x, x, longnet(case.segment_lengths, case.dilation_rates)).pairs
    assert replace(case, tokens=tokens).pairs == expected


def test_the_dataflow_fills_up_with_zeros_as_torchscale_does():
    case = replace(TINY, segment_lengths=(6, 32), dilation_rates=(4, 3))
    q, k, v = parts.inputs(case, CPU, torch.float32)
    out, lse = gather_scatter(case, q, k, v)
    wanted, wanted_lse = longnet_attention(
        q, k, v, case.segment_lengths, case.dilation_rates, compat=TorchscaleCompat(zero_keys=True), return_lse=True
    )
    seen = wanted_lse > -math.inf
    torch.testing.assert_close(lse[seen], wanted_lse[seen], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.transpose(1, 2)[seen], wanted.transpose(1, 2)[seen], rtol=0, atol=1e-5)


def test_the_yardstick_is_the_best_kernel_at_every_branch(monkeypatch):
    shapes = []

    def seconds(shape, device, dtype, with_backward, rounds, kernels):
        shapes.append(shape)
        return {"slow": parts.Spread(4.0, 4, 4, 1), "fast": parts.Spread(2.0, 2, 2, 1)}

    monkeypatch.setattr(parts, "dense_seconds", seconds)
    case = replace(TINY, tokens=40, segment_lengths=(16, 100))
    found = parts.yardstick(case, CPU, torch.float32, True, 1, FLASH)
    assert shapes == [(2, 4, 16, 8), (1, 4, 20, 8)]
    assert found == {"FLOP/s": 3.5 * 4 * 8 * 4 * (2 * 16**2 + 20**2) / 4.0, "kernels": ["fast", "fast"]}


def test_dense_kernels_that_do_not_take_it_are_passed_over():
    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, **FLASH}
    assert list(parts.dense_seconds((1, 2, 8, 8), CPU, torch.float32, True, 1, kernels)) == ["flash"]
    with pytest.raises(InvalidInput, match="no dense kernel"):
        parts.dense_seconds((1, 2, 8, 8), CPU, torch.float32, kernels={"cudnn": SDPBackend.CUDNN_ATTENTION})


def test_the_slope_of_linear_time_is_one(monkeypatch):
    monkeypatch.setattr(parts, "spread_of", lambda run, *rest: parts.Spread(run() / 1000, 0, 0, 1))
    monkeypatch.setattr(parts, "attend_run", lambda case, *rest: lambda: case.tokens)
    found = parts.slope(TINY, (64, 128, 512), CPU, torch.float32, "sdpa", 1)
    assert found["slope"] == 1.0
    assert found["seconds"]["512"] == 0.512

    def full(case, *rest):
        if case.tokens > 100:
            raise torch.OutOfMemoryError("full")
        return lambda: case.tokens

    monkeypatch.setattr(parts, "attend_run", full)
    found = parts.slope(TINY, (64, 128), CPU, torch.float32, "sdpa", 1)
    assert found["slope"] is None
    assert found["skipped"] == {"128": "out of memory"}


def test_the_peak_is_what_a_call_adds(monkeypatch):
    state = {"now": 100, "peak": 0}

    def run():
        state["peak"] = state["now"] + 50

    module = types.SimpleNamespace(
        synchronize=lambda device: None,
        reset_peak_memory_stats=lambda device: state.update(peak=state["now"]),
        memory_allocated=lambda device: state["now"],
        max_memory_allocated=lambda device: state["peak"],
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert parts.peak_bytes(run, torch.device("cuda")) == 50
    with pytest.raises(InvalidInput, match="accelerators"):
        parts.peak_bytes(run, CPU)


def test_the_contract_comes_first():
    few = (torch.float32,)
    good = parts.contract_on(SdpaBackend(), CPU, 0.0, few)
    assert good["passed"]
    assert good["cases"] == 1
    assert good["of"] == len(CASES)
    wrong = next(m for m in MUTANTS if m.name == "head_left_zero")
    found = parts.contract_on(wrong, CPU, 60.0, few, CASES[:9])
    assert not found["passed"]
    assert "error of out" in found["violation"]


def test_a_whole_run_and_its_tables(monkeypatch):
    monkeypatch.setattr(gpu, "BACKENDS", (SdpaBackend(), DenseBackend()))
    shares = []
    results = gpu.run_gpu(CPU, 1, shares.append, SIZES)
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert results["contract"]["sdpa"]["passed"]
    assert not results["skipped"]
    assert [(row["case"], row["tokens"], row["work"]) for row in results["speed"][:2]] == [
        ("paper", 40, "forward"),
        ("paper", 40, "forward + backward"),
    ]
    assert len(results["speed"]) == 8
    assert all(row["backends"]["sdpa"]["ratio"] > 0 for row in results["speed"])
    assert [row["goal"] for row in results["gather-scatter"]] == [1.8, 1.2]
    assert results["dense"][0]["times fewer FLOPs"] == round(4 * 64**2 / replace(TINY, tokens=64).pairs, 3)
    assert set(results["slope"]["seconds"]) == {"64", "128"}
    tables = gpu.gpu_tables(results)
    assert all(len(row) == len(columns) for _, columns, rows in tables for row in rows)
    assert len(tables[1][2]) == 8
    assert any("slope" in row[0] for row in tables[2][2])


def test_no_speed_for_what_fails_the_contract(monkeypatch):
    class Wrong(SdpaBackend):
        name = "wrong"

        def forward(self, problem, plan):
            out, lse = super().forward(problem, plan)
            return out * 1.01, lse

    monkeypatch.setattr(gpu, "BACKENDS", (Wrong(),))
    results = gpu.run_gpu(CPU, 1, None, SIZES)
    assert not results["contract"]["wrong"]["passed"]
    assert results["speed"] == []
    assert "no fused backend passes" in results["skipped"][0]
    rows = gpu.gpu_tables(results)[0][2]
    assert rows[0][:1] == ("wrong",)
    assert "error of out" in rows[0][1]


def test_time_and_memory_that_run_out_are_named(monkeypatch):
    monkeypatch.setattr(gpu, "BACKENDS", (SdpaBackend(),))
    results = gpu.run_gpu(CPU, 1, None, replace(SIZES, seconds=-1.0))
    assert results["speed"] == []
    assert "speed of paper at 40: out of time" in results["skipped"]

    def full(*_):
        raise torch.OutOfMemoryError("full")

    course = gpu.Course(CPU, 1, SIZES, end=math.inf)
    assert course.each("large", full) is None
    assert course.skipped == ["large: out of memory"]


def test_backends_that_cannot_run_there_say_why(monkeypatch):
    class Absent(SdpaBackend):
        name = "absent"

        def import_error(self):
            return "not installed: pip install absent"

    monkeypatch.setattr(gpu, "BACKENDS", (Absent(), SdpaBackend(), DenseBackend()))
    able, against = gpu.backends_on(CPU, torch.float32)
    assert [b.name for b in able] == ["sdpa"]
    assert against == {"absent": ["not installed: pip install absent"]}


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--gpu", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "expected a GPU" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
