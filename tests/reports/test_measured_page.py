"""Pages whose tables are drawn from stored results hold what those results give."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.benchmark import run
from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.reports.measured import filled_page
from dilated_attention_pytorch.reports.tables import Table

ROOT = Path(__file__).parents[2]
PAGES = {
    "sparse_speed.md": ("sparse", "selectors", "orders", "winners"),
    "parallel.md": ("parallel",),
    "memory.md": ("pools",),
}
MARKED = "a\n<!-- table: box/{} -->\nold\n<!-- end of table -->\nb\n"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_stored_results_give(name):
    held = (ROOT / "docs" / name).read_text(encoding="utf-8")
    filled = filled_page(held, ROOT / "benchmarks" / "results")
    assert held == filled, f"run `dilated-attention bench --page docs/{name}`"
    assert all(f"<!-- table: amd-epyc/{study}" in held for study in PAGES[name])
    assert all(f"bench --only {study}" in held for study in PAGES[name])


def test_every_study_has_a_page():
    assert sorted(study for studies in PAGES.values() for study in studies) == sorted(run.STUDIES)


@pytest.fixture
def results(tmp_path):
    orders = {
        "raster": {
            "shares": {"3 x 3": 0.5},
            "milliseconds to make": {"median": 2.0, "low": 1.0, "high": 3.0},
            "attention, times as long as raster": {"median": 1.0, "low": 1.0, "high": 1.0},
            "with ordering, times as long as raster": {"median": 1.0, "low": 1.0, "high": 1.0},
        }
    }
    (tmp_path / "box").mkdir()
    stored = run.about(3) | {"shape": "4 x 4", "threads": 1, "orders": orders}
    (tmp_path / "box" / "orders.json").write_text(json.dumps(stored))
    return tmp_path


def test_a_marked_table_is_drawn_anew_and_nothing_else(results):
    filled = filled_page(MARKED.format("orders"), results)
    assert filled.startswith("a\n<!-- table: box/orders -->\n")
    assert filled.endswith("<!-- end of table -->\nb\n")
    assert "old" not in filled
    assert "| raster | 0.500 | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) | 2.00 (1.00-3.00) |" in filled
    assert "3 rounds" in filled
    assert filled_page(filled, results) == filled


def test_what_was_not_measured_says_how_to(results):
    assert "Not measured yet: `dilated-attention bench --only winners`." in filled_page(
        MARKED.format("winners"), results
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [("no marks", "expected a page with marks"), ("speed", "asks for a table of 'speed'"), ("orders 2", "which has 1")],
)
def test_marks_that_name_nothing_are_refused(results, text, words):
    with pytest.raises(InvalidInput, match=words):
        filled_page(text if text == "no marks" else MARKED.format(text), results)


def test_the_command_writes_the_page(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(MARKED.format("orders"))
    found = CliRunner().invoke(app, ["bench", "--page", str(page), "--out", str(results)])
    assert found.exit_code == 0, found.output
    assert page.read_text() == filled_page(MARKED.format("orders"), results)
    missing = CliRunner().invoke(app, ["bench", "--page", str(tmp_path / "none.md")])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output


def test_markdown_tables_escape_bars_and_carry_their_note():
    table = Table("title", ("a", "b"), (("x|y", "1"),), "note")
    assert table.to_markdown() == "| a | b |\n|---|---|\n| x\\|y | 1 |\n\nnote\n"
