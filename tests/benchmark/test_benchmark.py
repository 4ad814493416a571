"""What the benchmark compares is the same computation, and its figures are arithmetic on measured seconds."""

import pytest
import torch
from typer.testing import CliRunner

from dilated_attention_pytorch import backends, explain, longnet, longnet_attention
from dilated_attention_pytorch.backends import DenseBackend, SdpaBackend
from dilated_attention_pytorch.benchmark import attention, baselines, run
from dilated_attention_pytorch.benchmark.cases import CASES, Case
from dilated_attention_pytorch.benchmark.measure import Spread, interleaved_seconds, times_faster
from dilated_attention_pytorch.cli.app import app

TINY = Case("A", 128, 4, 16, (32, 64), (1, 2))


def test_gather_scatter_computes_the_same_attention() -> None:
    q, k, v = (torch.randn(1, TINY.tokens, TINY.heads, TINY.head_dim) for _ in range(3))
    out, lse = baselines.gather_scatter(TINY, q, k, v)
    ours, our_lse = longnet_attention(q, k, v, TINY.segment_lengths, TINY.dilation_rates, return_lse=True)
    torch.testing.assert_close(out, ours, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, our_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [*CASES, TINY], ids=lambda c: c.describe())
def test_useful_flops_are_those_of_the_plan(case: Case) -> None:
    x = torch.empty(1, case.tokens, case.heads, case.head_dim, device="meta")
    explained = explain(x, x, x, longnet(case.segment_lengths, case.dilation_rates))
    assert explained.pairs == case.pairs
    assert explained.forward_flops == case.flops()
    assert explained.forward_flops + explained.backward_flops == case.flops(with_backward=True)


@pytest.mark.parametrize(("one_head", "causal"), [(False, False), (True, False), (False, True)])
def test_ready_made_pieces_issue_the_same_pairs(one_head: bool, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(baselines.CpuFlash):
        pairs = 0
        backward_pairs = 0

        def forward(self, q, k, v, scale, is_causal, mask):
            assert is_causal == causal
            Recorder.pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
            return super().forward(q, k, v, scale, is_causal, mask)

        def backward(self, dout, q, k, v, *rest):
            Recorder.backward_pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
            return super().backward(dout, q, k, v, *rest)

    monkeypatch.setattr(baselines, "KERNEL", Recorder())
    baselines.ready_made_pieces(TINY, True, one_head, causal)()
    assert Recorder.pairs == Recorder.backward_pairs == TINY.pairs


def test_rounds_interleave_the_candidates() -> None:
    order: list[str] = []
    seconds = interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3  # a warm-up round and two measured ones
    assert len(seconds["a"]) == len(seconds["b"]) == 2
    order.clear()
    interleaved_seconds({"a": lambda: order.append("a")}, rounds=2, warm_up=False)
    assert order == ["a", "a"]


def test_ratios_are_taken_within_rounds() -> None:
    spread = times_faster({"base": [2.0, 9.0, 4.0], "ours": [1.0, 3.0, 8.0]}, "ours", "base")
    assert spread == Spread(2.0, 0.5, 3.0, 3)


class Doubled(SdpaBackend):
    name = "native"


def test_speed_of_a_tiny_shape_and_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GEMM_SIZE", 32)
    for module in (attention, backends):
        monkeypatch.setattr(module, "BACKENDS", (SdpaBackend(), Doubled(), DenseBackend()))
    calls: list[int] = []
    figures = [attention.speed(TINY, count, 2, lambda: calls.append(1)) for count in (1, 2)]
    assert len(calls) == run.total_runs((TINY,), (1, 2), 2) - 2 * len(attention.SCALING_LENGTHS)
    assert torch.get_num_threads() == 1
    for name in ("sdpa", "native"):
        ratios = figures[0]["backends"][name]
        assert ratios["forward / pieces"]["rounds"] == 2
        assert set(run.GOALS[name]) - {run.ON_THREADS} <= set(ratios)
        assert run.ON_THREADS in figures[1]["backends"][name]
    assert all(rate > 0 for rate in figures[0]["GFLOP/s"].values())
    rows = run.speed_rows({"speed": {"A": figures}})
    goals = {(row[1], row[2], row[3]): row[5] for row in rows}
    assert goals["1", "sdpa", "forward / pieces"] == "0.93"
    assert goals["1", "native", "forward / pieces"] == "1.15"
    assert goals["2", "native", "forward / pieces"] == ""
    assert goals["2", "native", run.ON_THREADS] == "1.90"


def test_a_backend_that_is_absent_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GEMM_SIZE", 32)
    monkeypatch.setattr(Doubled, "import_error", lambda self: "no C compiler found")
    monkeypatch.setattr(attention, "BACKENDS", (SdpaBackend(), Doubled()))
    figures = attention.speed(TINY, thread_count=1, rounds=1)
    assert figures["backends"]["native"] == {"absent": "no C compiler found"}
    assert ("A", "1", "native", "no C compiler found", "", "") in run.speed_rows({"speed": {"A": [figures]}})
    monkeypatch.setattr(attention, "BACKENDS", (SdpaBackend(),))
    assert attention.absent("native") == "there is no backend 'native'"


def test_memory_of_a_forward_includes_its_output() -> None:
    measured = attention.memory(Case("M", 65536, 2, 64, (256, 512), (1, 2)))
    if "skipped" in measured:
        pytest.skip(measured["skipped"])
    assert 1.0 <= measured["peak / output bytes"] < 2.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shapes", "AX"), "letters of A, B, C"),
        (("--threads", "1,0"), "numbers of at least 1"),
        (("--only", "memory"), "one of all, speed, grid"),
    ],
)
def test_bench_refuses_what_it_does_not_know(arguments: tuple[str, ...], expected: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert expected in result.output
