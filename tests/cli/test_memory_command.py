"""The command shows and draws what a pool held, and tries one where none is named."""

import json

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.cli.memory import MOST_ROWS, tables
from dilated_attention_pytorch.memory import UnifiedMemoryPool
from dilated_attention_pytorch.memory.strategies import SizeClasses
from dilated_attention_pytorch.reports import figures


def call(*arguments):
    return CliRunner().invoke(app, ["memory", *arguments], env={"COLUMNS": "250", "TERM": "dumb"})


@pytest.fixture
def saved(tmp_path):
    pool = UnifiedMemoryPool(strategy=SizeClasses)
    kept = [pool.get_buffer((1000 * (i + 1),), pool_type="ring") for i in range(MOST_ROWS + 2)]
    pool.get_buffer((500_000,))
    snapshot = pool.snapshot()
    assert len(kept) == snapshot.statistics.live_buffers
    snapshot.save(tmp_path / "pool.json")
    return tmp_path / "pool.json", snapshot


def test_a_saved_snapshot_is_shown(saved):
    path, snapshot = saved
    result = call(str(path))
    assert result.exit_code == 0, result.output
    held, live = (f"{n / 2**20:,.3f} MiB" for n in (snapshot.statistics.bytes_held, snapshot.statistics.bytes_live))
    assert held in result.output
    assert live in result.output
    assert "3 smaller ones are not shown" in result.output
    _, allocations = tables(snapshot)
    assert len(allocations.rows) == MOST_ROWS
    assert [row[1] for row in allocations.rows[:2]] == ["default", "ring"]


def test_it_is_drawn(saved, tmp_path, monkeypatch):
    drawn = []
    original = figures.span_figure
    monkeypatch.setattr(figures, "span_figure", lambda *a: (drawn.append(a), original(*a)))
    result = call(str(saved[0]), "--plot", str(tmp_path / "pool.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pool.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (_, _, _, rows) = drawn[0]
    assert len(rows) == MOST_ROWS
    for (name, spans), allocation in zip(rows, saved[1].allocations):
        assert name == allocation.pool_type
        assert sum(length for _, length, _ in spans) == pytest.approx(allocation.size / 2**20)
        live = sum(length for _, length, kind in spans if kind == "live")
        assert live == pytest.approx(sum(span.requested for span in allocation.spans) / 2**20)


def test_without_a_file_a_pool_is_tried():
    result = call("--threads", "2", "--requests", "20")
    assert result.exit_code == 0, result.output
    assert "40 requests of concurrent threads: 0 overwritten, 0 threads unfinished" in result.output
    assert "A hit takes" in result.output
    assert "NUMA nodes" in result.output


def test_what_is_no_snapshot_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"format": 2}))
    result = call(str(tmp_path / "x.json"))
    assert result.exit_code == 2
    result = call("--threads", "0")
    assert result.exit_code == 2
