"""Tables keep their text as it is, pages need no network and run nothing, figures are drawn without a display."""

import base64
import dataclasses
import importlib.util
import re
import struct
from pathlib import Path

import pytest
from rich.console import Console

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.reports.figures import Curve, line_figure
from dilated_attention_pytorch.reports.page import Facts, Heading, Listing, Paragraph, Picture, page
from dilated_attention_pytorch.reports.progress import share_progress, training_progress
from dilated_attention_pytorch.reports.tables import Table
from dilated_attention_pytorch.reports.training import context_figure, context_table, loss_figure, training_page
from dilated_attention_pytorch.training.evaluate import ContextRow, Evaluation
from dilated_attention_pytorch.training.loop import Step
from dilated_attention_pytorch.training.settings import TrainingSettings

SETTINGS = TrainingSettings(steps=40, batch_size=2, window=4096, short_share=0.0)
EVALUATION = Evaluation(
    rows=(
        ContextRow(256, 2.5, 0.02, 0.0, 0.0, 3.9),
        ContextRow(1024, 2.3, 0.03, 0.2, 0.01, 2.9),
        ContextRow(4096, 2.31, 0.03, 0.19, 0.01, 2.4),
    ),
    targets=12,
    target_bytes=1536,
    clusters=7,
    xz_targets=3.25,
    xz_held_out=1.625,
)
METRICS = [{"step": n, "bits_per_byte": 8.0 / n, "seconds": n / 2} for n in range(1, 41)]
RECORD = {
    "started": "2026-01-02T03:04:05+00:00",
    "settings": dataclasses.asdict(SETTINGS),
    "model": {"d_model": 32, "segment_lengths": [256, 1024]},
    "text": {"origin": "the folder <b>books</b>", "train_bytes": 12345, "held_out_bytes": 678},
    "versions": {"torch": "2.13.0"},
    "device": "a <script>device</script>",
}


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def shown(table: Table) -> str:
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table.to_rich())
    return capture.get()


def test_a_table_shows_markup_and_tags_as_text() -> None:
    table = Table("T [red]", ("name", "<i>value"), (("[bold]a[/bold]", "<script>1</script>"),), "note & [x]")
    text, html = shown(table), table.to_html()
    assert "[bold]a[/bold]" in text
    assert "note & [x]" in text
    assert "<script>" not in html
    assert "&lt;script&gt;1&lt;/script&gt;" in html
    assert "note &amp; [x]" in html


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expected 2 cells"):
        Table("T", ("a", "b"), (("1",),))


def test_the_context_table_has_the_figures_and_stresses_the_best() -> None:
    table = context_table(EVALUATION)
    assert table.rows[1] == ("1,024", "2.300 ± 0.030", "0.200 ± 0.010", "2.900")
    assert table.strong == {1}
    for figure in ("1,536", "12 places", "3.250", "1.625"):
        assert figure in table.note


def test_figures_are_png_files_of_useful_size(tmp_path: Path) -> None:
    loss_figure(tmp_path / "loss.png", METRICS)
    context_figure(tmp_path / "context.png", EVALUATION)
    for name in ("loss.png", "context.png"):
        width, height = png_size(tmp_path / name)
        assert width > 1000
        assert height > 500


def test_columns_of_numbers_stand_right_and_words_left():
    rows = (("1", "1.5", "can", ""), ("2", "-3", "no: 4", "12"))
    columns = Table("T", ("n", "figure", "answer", "goal"), rows).to_rich().columns
    assert [column.justify for column in columns] == ["left", "right", "left", "right"]


def test_a_figure_is_drawn_from_its_data(tmp_path: Path) -> None:
    for name, y in (("a", [1.0, 2.0]), ("b", [2.0, 1.0]), ("c", [1.0, 2.0])):
        line_figure(tmp_path / name, "t", "x", "y", [Curve([1, 2], y, "n")])
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == c != b


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"dilated-attention-pytorch\[plots\]"):
        line_figure(tmp_path / "x.png", "t", "x", "y", [])
    assert not (tmp_path / "x.png").exists()


def test_every_part_of_a_page_is_escaped(tmp_path: Path) -> None:
    bad = '<img src=x onerror="alert(1)">'
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    parts = [Facts([(bad, bad)]), Heading(bad), Paragraph(bad), Listing(bad, bad), Picture(picture, bad)]
    html = page(bad, bad, [*parts, Table(bad, (bad,), ((bad,),), bad)])
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") == 14


def test_the_page_of_a_run_needs_no_network_and_runs_nothing(tmp_path: Path) -> None:
    loss_figure(tmp_path / "loss.png", METRICS)
    context_figure(tmp_path / "context.png", EVALUATION)
    html = training_page(tmp_path, RECORD, 16_992, METRICS, EVALUATION, ("given </pre>", "<script>written"))
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", html)
    assert "<script" not in html
    assert "<link" not in html
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [base64.b64decode(image) for image in images] == [
        (tmp_path / name).read_bytes() for name in ("context.png", "loss.png")
    ]
    for text in ("2.300 ± 0.030", "16,992", "12,345", "&lt;b&gt;books", "&lt;script&gt;written", "torch", "2.13.0"):
        assert text in html
    assert f"{40 * 2 * 4096 / 20:,.0f}" in html  # bytes per second over the 20 seconds of the metrics


def test_progress_without_a_terminal_prints_a_line_now_and_then() -> None:
    console = Console(force_terminal=False, width=100)
    with console.capture() as capture, training_progress(console, SETTINGS, 0) as on_step:
        for n in range(1, 41):
            on_step(Step(n, 8.0, 0.1, 1.0, 1000.0, n * 0.5))
    lines = capture.get().splitlines()
    assert len(lines) == 20
    assert lines[-1] == "step 40/40  8.000 bits/byte  1,000 tokens/s  0 s left"
    assert lines[0] == "step 2/40  8.000 bits/byte  1,000 tokens/s  19 s left"
    with console.capture() as capture, share_progress(console, "evaluating") as on_progress:
        on_progress(1.0)
    assert not capture.get().strip()


def test_progress_on_a_terminal_shows_loss_speed_and_steps() -> None:
    console = Console(force_terminal=True, width=120)
    with console.capture() as capture, training_progress(console, SETTINGS, 10) as on_step:
        on_step(Step(11, 3.25, 0.1, 1.0, 12345.0, 5.0))
    for text in ("3.250 bits/byte", "12,345 tokens/s", "11/40"):
        assert text in capture.get()
