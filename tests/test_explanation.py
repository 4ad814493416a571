"""What explain says is what attend does; it computes nothing and takes meta tensors."""

import dataclasses

import pytest
import torch

from dilated_attention_pytorch import (
    Causal,
    Explanation,
    Full,
    Softcap,
    TorchscaleCompat,
    Window,
    attend,
    backends,
    explain,
    explanation,
    longnet,
)
from dilated_attention_pytorch.backends import BACKENDS, DenseBackend
from dilated_attention_pytorch.backends.base import NoOptions
from dilated_attention_pytorch.backends.tuning import Choice, Key, Measured, Table, Timing, using
from dilated_attention_pytorch.plans import TilePlan
from dilated_attention_pytorch.testing import CASES, PATTERNS


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_are_the_sum_of_counts(name):
    x = torch.randn(2, 37, 4, 8)
    found = explain(x, x, x, PATTERNS[name])
    total = int(PATTERNS[name].to_mask(4, 37).expand(2, 4, 37, 37).sum())
    assert found.pairs == total
    assert found.pairs_are_exact
    assert found.forward_flops == 2 * (8 + 8) * total
    assert found.backward_flops == 5 * found.forward_flops // 2
    assert list(found.backends) == [b.name for b in BACKENDS]
    assert found.chosen == next(name for name, against in found.backends.items() if not against)
    assert found.backends["sdpa"] == found.backends["dense"] == ()


@pytest.mark.parametrize("case", [c for c in CASES if "placed" in c.name], ids=lambda c: c.name)
def test_places_and_padding_enter_the_count(case):
    p = case.problem(torch.float32)
    mask = torch.arange(p.key_length) >= torch.tensor(case.visible)[:, None]
    found = explain(p.q, p.k, p.v, case.pattern, query_start=case.query_start, key_padding_mask=mask)
    counts = case.pattern.to_mask(p.num_heads, p.query_length, p.key_length, query_start=case.query_start)
    assert found.pairs == int((counts * ~mask[:, None, None]).expand(2, 4, 11, 40).sum())


def test_text_shows_plan_work_and_every_reason():
    x = torch.randn(1, 20, 2, 8)
    found = explain(x, x, x[..., :3], longnet([4, 8], [1, 2]), dropout_p=0.1, score=Softcap(1.0))
    text = str(found)
    assert found.chosen == "dense"
    assert found.chosen_plan == "dense"
    assert found.because.startswith("nothing like it was measured")
    assert len(found.backends["sdpa"]) == 3
    assert found.backends["dense"] == ()
    for words in (
        "Dv 3",
        "strided: ",
        "dense: 20 x 20",
        "dropout",
        f"{found.pairs:,}",
    ):
        assert words in text
    assert all(reason in text for reason in found.backends["sdpa"])
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()[7:]}
    assert lines["dense"] == "ok"
    assert lines["sdpa"].startswith("no: ")


def test_a_measured_choice_is_named_with_its_table():
    x = torch.randn(1, 40, 2, 8)
    choice = Choice("dense", "DensePlan", NoOptions())
    key = Key("float32", 8, "causal", 64, False, False)
    table = Table("cpu", {key: (Measured(choice, Timing(1.0, 1.0, 1.0, 3)),)}, source="some/file.json")
    with using(table):
        found = explain(x, x, x, Causal())
        assert explain(x, x, x, Causal(), backend="sdpa").chosen == "sdpa"
        trained = explain(x.clone().requires_grad_(), x, x, Causal())
    assert found.chosen == "dense"
    assert "dense dense is the fastest measured for float32, D 8, causal, queries on 64 keys, forward" in str(found)
    assert "some/file.json" in str(found)
    assert "nothing like it was measured" in trained.because


class _TilesOnly(DenseBackend):
    name = "tiles_only"
    plans = (TilePlan,)


def test_a_backend_of_tables_is_asked_where_they_cost_little(monkeypatch):
    for module in (backends, explanation):
        monkeypatch.setattr(module, "BACKENDS", (*BACKENDS, _TilesOnly()))
    x = torch.randn(1, 40, 2, 8)
    assert explain(x, x, x, Causal()).backends["tiles_only"] == ()
    long = torch.empty(1, 40_000, 2, 8, device="meta")
    assert "by name" in explain(long, long, long, Causal()).backends["tiles_only"][0]


def test_a_named_backend_that_cannot():
    x = torch.randn(1, 6, 2, 8)
    found = explain(x, x, x, Causal(), backend="sdpa", score=Softcap(1.0))
    assert found.chosen is None
    assert "backend   none" in str(found)
    assert explain(x, x, x, Causal(), backend="dense").chosen == "dense"


def test_meta_tensors_cost_nothing():
    x = torch.empty(1, 3_000_000, 12, 64, device="meta", dtype=torch.bfloat16)
    found = explain(x, x, x, longnet([2048, 32768], [1, 12]) & Causal())
    assert found.chosen is not None
    pairs, segments = 0, {2048: 1, 32768: 12}
    for w, r in segments.items():
        for h in range(12):
            whole, rest = divmod(3_000_000, w)
            sizes = [(-(-(w - h % r) // r), whole), (max(0, -(-(rest - h % r) // r)), 1)]
            pairs += sum(n * (n + 1) // 2 * times for n, times in sizes)
    assert found.pairs == pairs
    assert found.bytes_moved == 4 * x.numel() * 2 + 4 * 12 * 3_000_000
    masked = explain(x, x, x, Causal(), key_padding_mask=torch.zeros(1, 3_000_000, dtype=torch.bool, device="meta"))
    assert "unknown on meta" in str(masked)


def test_without_a_closed_form_long_counts_are_a_bound():
    x = torch.empty(1, 100_000, 2, 8, device="meta")
    found = explain(x, x, x, longnet([8], [2]) & longnet([12], [3]))
    assert found.chosen is not None
    assert not found.pairs_are_exact
    assert found.pairs == 2 * 100_000**2
    assert "at most" in str(found)


def test_frozen_and_complete():
    x = torch.randn(1, 6, 2, 8)
    found = explain(x, x, x, Window(3))
    assert isinstance(found, Explanation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.pairs = 3
    noted = explain(x, x, x, longnet([4], [1]), compat=TorchscaleCompat(zero_keys=True))
    assert "zero_keys=True" in str(noted)


def test_it_takes_the_arguments_of_attend():
    import inspect

    mine, theirs = (list(inspect.signature(f).parameters) for f in (explain, attend))
    assert mine == theirs


def test_empty_problems():
    x = torch.randn(1, 0, 2, 8)
    found = explain(x, x, x, Full())
    assert found.pairs == 0
    assert found.bytes_moved == 0
    assert str(found)
