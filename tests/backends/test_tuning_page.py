"""docs/tuning.md says what the code does."""

from pathlib import Path

from dilated_attention_pytorch.backends.tuning import PATTERN_CLASSES, keys
from dilated_attention_pytorch.benchmark import tune
from dilated_attention_pytorch.benchmark.grid import GRID

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def test_the_page_names_every_class_and_the_numbers_in_force():
    assert all(f"`{name}`" in PAGE for name in PATTERN_CLASSES)
    assert f"fewer than {keys.SHORT_ROWS} rows" in PAGE
    assert f"within {100 * (tune.TIE - 1):.0f} % are a tie" in PAGE
    assert tune.FAR == 3.0
    assert "three times the fastest" in PAGE
    assert f"on {len(GRID)} shapes" in PAGE
    assert f"{max(s.keys for s in GRID):,} tokens" in PAGE
