"""The parts on sparse and adaptive attention: their figures are what they claim, and misses are shown."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dilated_attention_pytorch import Causal, attend, explain, longnet
from dilated_attention_pytorch.backends import BACKENDS
from dilated_attention_pytorch.backends.tuning import using
from dilated_attention_pytorch.backends.tuning.files import SHIPPED, load_table
from dilated_attention_pytorch.benchmark import (
    heads,
    locality,
    parallel,
    pools,
    quality,
    run,
    selectors,
    sparse,
    winners,
)
from dilated_attention_pytorch.benchmark.cases import Case
from dilated_attention_pytorch.benchmark.heads import Heads
from dilated_attention_pytorch.benchmark.measure import Spread, goal_text, spread_text
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.models.config import LongNetLMConfig
from dilated_attention_pytorch.models.longnet import LongNetLM
from dilated_attention_pytorch.nn import MultiheadDilatedAttention
from dilated_attention_pytorch.patterns import BlockSparse, random_blocks
from dilated_attention_pytorch.plans import planner
from dilated_attention_pytorch.selection import MeanPooled, Oracle, Selector, TopBlocks, block_mass, mass_recall
from dilated_attention_pytorch.training.run import Run
from dilated_attention_pytorch.training.settings import TrainingSettings

SPARSE = sparse.SparseSizes(256, 2, 16, 32, (0.25, 0.5), 64, (1,))
SELECTORS = selectors.SelectorSizes(256, 2, 16, 32, 0.25, (1,), (0.25, 0.5), 128, 2, 2, 16)
GRID = locality.GridSizes((16, 24), (64, 128), (1, 2), share_segments=(64, 60), thread_count=1)
WINNERS = winners.WinnerSizes((128, 256), (0.1, 0.25), 2, 16, 32, 1, once=4e6, too_long=4e9)
SMALL = Case("", 128, 2, 8, (16, 128), (1, 2))
PARALLEL = parallel.ParallelSizes(64, 2, 8, 2, SMALL, SMALL, 2, (2,), 1)
POOLS = (pools.PoolCase("results", "tiny", 700, 2, 8, longnet([32, 128], [1, 4]), "sdpa"),)
TINY = {
    name: {"sizes": sizes}
    for name, sizes in (
        ("sparse", SPARSE), ("selectors", SELECTORS), ("orders", GRID), ("winners", WINNERS), ("parallel", PARALLEL)
    )
} | {"pools": {"cases": POOLS}}  # fmt: skip


class Clock:
    """Stands for measuring: every run takes the seconds that its name says, or a second."""

    def __init__(self, seconds):
        self.seconds = seconds

    def rounds(self, runs, rounds, progress=None, warm_up=True):
        return {name: [self.seconds.get(name, 1.0)] * rounds for name in runs}


def test_cells_say_median_and_reach_and_whether_a_goal_is_met():
    spread = Spread.of([2.0, 1.0, 4.0]).times(0.5)
    assert spread == Spread(1.0, 0.5, 2.0, 3)
    assert spread_text(asdict(spread)) == str(spread) == "1.00 (0.50-2.00)"
    for figure, goal, at_most, words in (
        (0.59, 0.6, False, ", goal 0.60 missed"),
        (0.6, 0.6, False, ", goal 0.60"),
        (0.15, 0.15, True, ", goal at most 0.15"),
        (0.16, 0.15, True, ", goal at most 0.15 missed"),
        (0.16, None, False, ""),
    ):
        measured = Spread.of([figure]).to_dict()
        assert goal_text(measured, goal, at_most) == f"{spread_text(measured)}{words}"


@pytest.mark.parametrize("per_head", [True, False])
def test_pairs_of_a_table_are_those_of_its_mask(per_head):
    layout = torch.randint(0, 3, (3, 4, 4) if per_head else (4, 4))
    blocks = BlockSparse(8, layout)
    assert sparse.block_pairs(blocks, 27, 3) == int(blocks.to_mask(3, 27).sum())


def test_useful_rates_are_flops_over_seconds_over_those_of_the_dense_kernel(monkeypatch):
    clock = Clock({"auto forward": 0.5, "dense forward": 2.0, "auto forward + backward": 4.0})
    monkeypatch.setattr(sparse, "interleaved_seconds", clock.rounds)
    monkeypatch.setattr(sparse, "seconds_of", lambda one: 10.0)
    monkeypatch.setattr(sparse, "BACKENDS", ("auto", "nobody"))
    calls = []
    results = sparse.measure_sparse(3, lambda: calls.append(1), SPARSE)
    assert len(calls) == sparse.sparse_steps(3, SPARSE)
    assert json.loads(json.dumps(results)) == results
    measured = results["runs"][0]
    pairs = int(SPARSE.layout(0.25).to_mask(2, 256).sum())
    assert measured["pairs"] == pairs
    assert measured["density held"] == pytest.approx(0.25, abs=1e-5)
    q = torch.empty(1, 64, 2, 16, device="meta")
    dense = explain(q, q, q, Causal()).forward_flops * 64 * 64 / (64 * 65 / 2)
    flops = 4 * 16 * pairs
    figures = measured["backends"]["auto"]
    assert figures["forward"]["rate / dense kernel"]["median"] == pytest.approx(flops / 0.5 / (dense / 2), rel=1e-3)
    both = figures["forward + backward"]
    assert both["rate / dense kernel"]["median"] == pytest.approx(flops / 4 / dense, rel=1e-3)
    assert figures["forward"]["times faster than dense"]["median"] == 20.0
    assert both["times faster than dense"]["median"] == 2.5
    assert figures["forward"]["GFLOP/s"] == round(flops / 0.5 / 1e9, 1)
    both_threads = sparse.measure_sparse(1, None, replace(SPARSE, densities=(0.5,), thread_counts=(1, 2)))
    lone, last = (run["backends"]["auto"]["forward + backward"] for run in both_threads["runs"])
    assert lone["times faster than dense"] is None  # dense attention's backward pass runs once only
    assert last["times faster than dense"]["median"] == 2.5
    assert measured["backends"]["nobody"] == {"absent": "there is no backend 'nobody'"}
    ((_, columns, rows, note),) = sparse.sparse_tables(results)
    assert all(len(row) == len(columns) for row in rows)
    assert "forward 10.0 s, forward + backward 10.0 s" in note
    assert ("25 %", "1", "nobody", "there is no backend 'nobody'", "", "", "", "") in rows


def test_goals_of_block_sparse_attention_are_shown_with_misses():
    spread = Spread.of([0.62]).to_dict()
    faster = Spread.of([9.0]).to_dict()
    figures = {"rate / dense kernel": spread, "times faster than dense": faster, "GFLOP/s": 70.0}
    backends = {"auto": dict.fromkeys(sparse.RATE_GOALS, figures), "native": {"absent": sparse.TAKEN}}
    at = {"threads": 1, "density": 0.05, "auto takes": {"forward": "native"}, "backends": backends}
    rows = list(sparse.sparse_rows({"runs": [at, at | {"density": 0.1}]}))
    assert rows[0][2:] == (
        "auto (native)",
        "0.62 (0.62-0.62), goal 0.60",
        "0.62 (0.62-0.62), goal 0.65 missed",
        *["9.00 (9.00-9.00), goal 10.00 missed"] * 2,
        "70, 70",
    )
    assert rows[1][5:7] == ("9.00 (9.00-9.00)",) * 2
    assert len(rows) == 2  # what auto takes has no row of its own


@pytest.fixture
def trained(tmp_path):
    """The folder of a run whose model was never trained; windows of 128 bytes."""
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(6000))))
    config = LongNetLMConfig(
        num_tokens=256,
        d_model=32,
        nhead=2,
        num_layers=2,
        dim_feedforward=32,
        segment_lengths=(32, 128),
        dilation_rates=(1, 2),
    )
    made = Run.create(tmp_path / "run", TrainingSettings(window=128, short_window=64), config.to_dict(), tmp_path)
    LongNetLM.from_config(config).save_pretrained(made.path)
    return made.path


def test_heads_are_what_the_layers_attend_with(trained):
    layers = heads.trained_heads(trained, 4096, 3)
    assert [len(of) for of in layers] == [3, 3]
    assert layers[0][0].q.shape == (1, 128, 2, 16)
    model = LongNetLM.from_pretrained(trained)
    seen = []
    for module in model.modules():
        if isinstance(module, MultiheadDilatedAttention):
            module.attention.register_forward_hook(lambda _, given, out: seen.append(out))
    text = Run.open(trained).corpus.held_out
    with torch.no_grad():
        model(heads.spread_windows(text, 128, 3))
    for of, out in zip(layers, seen):
        for heads_of_sample, expected in zip(of, out):
            again = attend(*heads_of_sample, longnet([32, 128], [1, 2]) & Causal())
            torch.testing.assert_close(again[0], expected, rtol=0, atol=1e-5)
    other = heads.trained_heads(trained, 128, 1, held_out=False)
    assert not torch.equal(other[0][0].q, layers[0][0].q)


def test_without_a_trained_run_the_table_says_what_to_run(tmp_path):
    with pytest.raises(InvalidInput, match=r"run `make run` first .*not a run folder"):
        heads.trained_heads(tmp_path / "none", 128, 1)
    found = selectors._judged(replace(SELECTORS, budgets=(0.5,)), tmp_path / "none", None)
    results = {"timed": "", "times": [], "budgets": [0.5], "judged": "", "quality": found}
    _, (_, columns, rows, note) = selectors.selector_tables(results)
    assert rows[0][:2] == ("the trained model", "run `make run` first")
    assert "not a run folder" in note
    assert all(len(row) == len(columns) for row in rows)
    with pytest.raises(InvalidInput, match="has 10 bytes"):
        heads.spread_windows(torch.zeros(10, dtype=torch.uint8).numpy(), 11, 1)


def layers_of(tokens=192, samples=2):
    return [[Heads(*(2 * torch.randn(1, tokens, 2, 8) for _ in range(3))) for _ in range(samples)] for _ in range(2)]


def test_recall_and_held_share_are_the_exact_ones():
    layers = layers_of()
    of = layers[0][0]
    chosen = Selector(MeanPooled(), TopBlocks(), block_size=16)(of.q, of.k, 0.4, Causal())
    (row,) = quality.judge([[of]], [quality.top_blocks("x", MeanPooled(), 16, False)], [0.4], 16)
    exact = mass_recall(chosen, block_mass(of.q, of.k, Causal(), 16))
    assert row["recall"]["mean"] == pytest.approx(float(exact.mean()), abs=1e-4)
    mask = chosen.to_mask(2, 192)
    visible = Causal().to_mask(2, 192)
    assert row["held"]["mean"] == pytest.approx(int((mask > 0).sum()) / (int(visible.sum())), rel=0.02)
    whole, part = (attend(*of, p) for p in (Causal(), chosen))
    error = [float((part - whole)[:, :, h].norm() / whole[:, :, h].norm()) for h in range(2)]
    assert (row["error"]["low"], row["error"]["high"]) == pytest.approx((min(error), max(error)), abs=1e-4)


def test_all_blocks_hold_all_mass_and_the_oracle_is_the_limit():
    layers = layers_of()
    ways = quality.plain_ways({"MeanPooled": MeanPooled()}, 16)
    calls = []
    judged = quality.judge(layers, ways, [0.2, 1.0], 16, lambda: calls.append(1))
    assert len(calls) == len(judged) == 2 * len(ways)
    for row in judged:
        if row["budget"] == 1.0 and row["rule"] == "TopBlocks":
            assert row["recall"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
            assert row["error"]["high"] == 0.0
            assert row["held"]["mean"] == 1.0
    small = [r for r in judged if r["budget"] == 0.2]
    top = {(r["score"], r["lookahead"]): r["recall"]["mean"] for r in small if r["rule"] == "TopBlocks"}
    assert top["Oracle", True] > max(mean for way, mean in top.items() if way[0] != "Oracle")
    by_rule = {r["rule"]: r for r in judged if r["score"] in ("MeanPooled", "none") and not r["lookahead"]}
    assert by_rule["TopBlocks + pooled blocks"]["recall"] is None
    assert by_rule["TopBlocks + pooled blocks"]["error"]["high"] < 1e-5  # all are chosen
    assert by_rule["local window"]["held"]["mean"] == pytest.approx(0.75, abs=0.1)  # half the length back
    for rule in ("Mass", "Threshold"):
        (row,) = (r for r in judged if r["rule"] == rule and r["budget"] == 0.2)
        assert row["held"]["mean"] == pytest.approx(0.25, abs=0.06)  # 0.23 are always chosen
    table = list(quality.quality_rows("text", judged, [0.2, 1.0]))
    assert len(table) == len(ways)
    assert {len(row) for row in table} == {len(quality.quality_columns([0.2, 1.0]))}
    assert [row[5] for row in table if row[2] == "TopBlocks"] == ["1.000 (1.00-1.00)"] * 3


def test_a_budget_below_one_block_is_left_out():
    ways = [quality.top_blocks("x", MeanPooled(), 64, False)]
    judged = quality.judge([[layers_of()[0][0]]], ways, [0.2, 0.4], 64)
    assert judged[0]["error"] is None
    assert judged[1]["error"]["mean"] > 0
    (row,) = quality.quality_rows("text", judged, [0.2, 0.4])
    assert row[4] == "-"
    assert row[-1].startswith("-, ")


def test_choosing_is_measured_against_what_it_saves(monkeypatch, trained):
    warm, rounds = [0.1] * 6, [0.5, 0.5, 2.0] * 2  # choosing, tables and attention of MeanPooled, and of the gate
    seconds = iter([*warm, 12.0, *rounds, *warm, 2.0, *rounds])

    def clock(one):
        one()
        return next(seconds)

    monkeypatch.setattr(selectors, "seconds_of", clock)
    monkeypatch.setattr(selectors, "SCORES", {"MeanPooled": MeanPooled()})
    calls = []
    results = selectors.measure_selectors(1, lambda: calls.append(1), trained, SELECTORS)
    assert len(calls) == selectors.selector_steps(1, SELECTORS)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    full, gate, causal, _ = results["times"]
    assert (full["score"], gate["score"]) == ("MeanPooled", "Gate")
    assert full["share of what it saves"]["median"] == 0.1
    assert full["times faster than dense"]["median"] == 4.0
    assert causal["share of what it saves"] is None
    (_, columns, rows, _), (_, _, lost, _) = selectors.selector_tables(results)
    assert all(len(row) == len(columns) for row in rows)
    assert [row[3] for row in rows] == [
        *["0.10 (0.10-0.10), goal at most 0.15"] * 2,
        *["it saves nothing, goal at most 0.15 missed"] * 2,
    ]
    assert rows[0][4:] == ("4.00 (4.00-4.00)", "500", "500", "2000", "12000")
    assert {row[0] for row in lost} == {"the trained model", "random numbers"}
    assert [row[0] for row in lost if row[1] == "Gate"] == ["the trained model"]


def test_each_layer_has_a_gate_that_learnt_from_it():
    layers = layers_of(96)
    gates = quality.distilled_gates(layers, 16, epochs=2)
    assert len(gates) == 2
    (fresh,) = quality.distilled_gates(layers[:1], 16, epochs=0)
    assert not torch.equal(gates[0].key_weight, fresh.key_weight)
    choose = quality.gated(gates, 16).prepare(layers, 0.4)
    of = layers[0][0]
    for layer, gate in enumerate(gates):
        expected = Selector(gate, TopBlocks(), block_size=16)(of.q, of.k, 0.4, Causal())
        assert choose(layer, of).overlap(expected) == 1.0


def test_new_data_has_its_tables_made_and_they_are_counted(monkeypatch):
    made = []
    monkeypatch.setattr(planner, "_tiled", lambda *a, tiled=planner._tiled, **b: made.append(1) or tiled(*a, **b))
    selector = Selector(MeanPooled(), TopBlocks(), block_size=32)
    measured = load_table(SHIPPED["cpu"], torch.device("cpu"), BACKENDS)
    with using(measured):  # its choices ask for tables of tiles by name
        for _ in range(2):
            q, k, v = torch.randn(3, 1, 1024, 2, 64)
            assert min(selectors.chosen_seconds(selector, q, k, v, 0.3, Causal())) > 0
    assert len(made) == 2  # once for each, before attend asks for them


def test_branches_have_the_pairs_that_a_density_asks_for():
    for density in (0.05, 0.1, 0.25, 0.5):
        case = winners.dilated_case(4096, density, 4, 64)
        assert case.dilation_rates == (1, 2, 4)
        assert case.pairs / (4 * 4096**2) == pytest.approx(density, rel=0.06)


@pytest.mark.parametrize("training", [False, True])
def test_adaptive_attention_chooses_for_new_data_each_time(training):
    chosen = []

    class Recorder(Selector):
        def __call__(self, q, k, budget, *rest, **options):
            found = super().__call__(q, k, budget, *rest, **options)
            chosen.append((q, budget, found))
            return found

    x = torch.randn(1, 128, 2, 8)
    selector = Recorder(MeanPooled(), TopBlocks(), block_size=16)
    call = winners.adaptive_run(x, x, x, torch.randn_like(x) if training else None, selector, 0.3, fresh=3)
    for _ in range(4):
        call()
    assert [budget for _, budget, _ in chosen] == [0.3] * 4
    queries = [q for q, _, _ in chosen]
    assert not any(torch.equal(queries[i], queries[j]) for i in range(3) for j in range(i))
    assert torch.equal(queries[3], queries[0])
    assert min(a.overlap(b) for _, _, a in chosen[:3] for _, _, b in chosen[:3]) < 1


def test_where_each_way_wins(monkeypatch):
    clock = Clock({"dilated 0.25": 0.2, "block-sparse 0.25": 0.202})
    monkeypatch.setattr(winners, "interleaved_seconds", clock.rounds)
    monkeypatch.setattr(winners, "seconds_of", lambda one: 4.0)
    calls = []
    results = winners.measure_winners(2, lambda: calls.append(1), WINNERS)
    assert len(calls) == winners.winner_steps(2, WINNERS)
    assert json.loads(json.dumps(results)) == results
    assert len(results["cells"]) == 8
    by = {(c["tokens"], c["work"], c["density"]): c for c in results["cells"]}
    short = by[128, "forward", 0.1]["ways"]
    assert short["adaptive"] == short["block-sparse"] == {"left out": "less than one of 4 blocks"}
    cell = by[128, "forward", 0.25]
    assert cell["ways"]["dilated"]["median"] == 200.0
    assert winners.fastest(cell) == ["dilated", "block-sparse"]  # within a tie
    assert cell["held"]["block-sparse"] == pytest.approx(0.25, abs=1e-3)
    assert by[256, "forward", 0.25]["ways"]["dense"]["rounds"] == 1  # long problems run once
    rows = list(winners.winner_rows(results))
    assert rows[1] == ("128", "25 %", "forward", "1 s", "200 ms", "202 ms", "1 s", "dilated, block-sparse", "1.00")
    assert winners.times_faster_by_tokens(results, 0.25)["dilated"] == {128: 5.0, 256: 1.0}
    ((_, columns, shown, note),) = winners.winner_tables(results)
    assert all(len(row) == len(columns) for row in shown)
    assert "selection and its tables included" in note


def test_where_dense_attention_would_take_too_long_nothing_is_measured():
    sizes = replace(WINNERS, tokens=(128,), densities=(0.25,), too_long=4e6)
    results = winners.measure_winners(1, None, sizes)
    forward, both = results["cells"]
    assert forward["ways"]["dense"]["median"] > 0
    assert both["ways"] == {"dense": {"left out": "too long: 7.34e-06 TFLOP"}}
    assert winners.fastest(both) == []
    rows = list(winners.winner_rows(results))
    assert rows[1] == ("128", "all", "forward + backward", "too long: 7.34e-06 TFLOP", "", "", "", "", "")
    assert winners.times_faster_by_tokens(results, 0.25).keys() == {"dilated", "block-sparse", "adaptive"}


def test_densities_that_keep_too_much_of_a_long_problem_are_left_out():
    sizes = replace(WINNERS, tokens=(128,), densities=(0.25, 0.5), once=1e6)
    few, many = winners.measure_winners(1, None, sizes)["cells"][:2]
    assert few["ways"]["dilated"]["median"] > 0
    assert many["ways"]["dense"] == few["ways"]["dense"]
    assert many["ways"]["dilated"] == {"left out": "too long: 1.05e-06 TFLOP"}


def test_orders_are_as_local_and_take_as_long_as_measured(monkeypatch):
    clock = Clock({"Hilbert": 1.2, "raster": 1.0, "Hilbert, ordering": 1.8})
    monkeypatch.setattr(locality, "interleaved_seconds", lambda runs, rounds, _: clock.rounds(runs, rounds))
    results = locality.measure_orders(2, None, GRID)
    assert json.loads(json.dumps(results)) == results
    shares = {name: list(figures["shares"].values()) for name, figures in results["orders"].items()}
    assert all(hilbert > raster for hilbert, raster in zip(shares["Hilbert"], shares["raster"]))
    hilbert = results["orders"]["Hilbert"]
    assert hilbert["attention, times as long as raster"]["median"] == 1.2
    assert hilbert["with ordering, times as long as raster"]["median"] == 1.5
    ((_, columns, rows, _),) = locality.order_tables(results)
    assert all(len(row) == len(columns) for row in rows)
    at = columns.index("attention, times as long as in raster order")
    once = "1.00 (1.00-1.00)"
    assert {row[0]: row[at] for row in rows} == {
        "Hilbert": "1.20 (1.20-1.20), goal at most 1.05 missed",
        "Morton": f"{once}, goal at most 1.05",
        "snake": f"{once}, goal at most 1.05",
        "raster": once,
    }


def test_layouts_that_are_measured_are_random_with_the_diagonal():
    layout = SPARSE.layout(0.25).layout
    assert layout.shape == (2, 8, 8)
    assert bool(layout.diagonal(dim1=-2, dim2=-1).all())
    assert not torch.equal(layout[0], layout[1])
    assert type(SPARSE.layout(0.5)) is type(random_blocks(64, block_size=32, density=1.0))


@pytest.mark.parametrize("name", run.STUDIES)
def test_each_part_is_printed_and_stored(name, monkeypatch, tmp_path, trained):
    study, less = run.STUDIES[name], TINY[name]
    tiny = replace(study, measure=partial(study.measure, **less), steps=partial(study.steps, **less))
    monkeypatch.setitem(run.STUDIES, name, tiny)
    words = ["bench", "--only", name, "--rounds", "1", "--out", str(tmp_path), "--run", str(trained)]
    monkeypatch.setattr("dilated_attention_pytorch.cli.bench.out", Console(width=400))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (stored,) = tmp_path.rglob(f"{name}.json")
    results = json.loads(stored.read_text())
    assert results["rounds"] == 1
    for title, columns, rows, _ in study.tables(results):
        assert f"{title}, {results['device']}, 1 rounds" in result.output
        assert columns[-1] in result.output
        assert rows
    assert (stored.parent / "winners.png").exists() == (name == "winners")
    help_text = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert f"{name}:" in help_text


def test_the_oracle_reads_the_block_itself():
    (way,) = [w for w in quality.plain_ways({}, 16) if w.score == "Oracle"]
    assert way.lookahead
    with pytest.raises(InvalidInput, match="lookahead"):
        quality.top_blocks("Oracle", Oracle(), 16, False).prepare([], 0.5)(0, layers_of()[0][0])
