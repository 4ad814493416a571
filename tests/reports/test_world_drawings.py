"""The drawings of a world show what its layouts and methods do, and the stored ones are those that the code draws."""

from pathlib import Path

import numpy as np
import pytest

from dilated_attention_pytorch import Causal, Full, longnet
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.reports.worlds import (
    ABSENT,
    ARRIVES,
    METHODS,
    OWN,
    keys_of_rank,
    layouts_figure,
    methods_figure,
    ranks_of_rows,
    work_shares,
)

FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def test_each_row_has_the_rank_that_holds_it():
    assert ranks_of_rows(Layout("contiguous", 7, 3)).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert ranks_of_rows(Layout("zigzag", 7, 2)).tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert ranks_of_rows(Layout("striped", 7, 3, start=4)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_work_is_the_pairs_of_a_rank_over_the_mean():
    shares = work_shares(Causal(), Layout("contiguous", 4, 2), num_heads=3)
    assert shares == [2 * 3 / 10, 2 * 7 / 10]  # 1 + 2 and 3 + 4 of 10 pairs
    for name in LAYOUTS:
        assert work_shares(Full(), Layout(name, 12, 3)) == [1, 1, 1]


def test_keys_that_arrive_are_those_of_the_method():
    pattern, layout = longnet([2, 8], [1, 2]), Layout("contiguous", 8, 4)
    held = {method: keys_of_rank(pattern, layout, 1, method, 2) for method in METHODS}
    for keys in held.values():
        assert (keys[:, 2:4] == OWN).all()
    assert (held["ring"][:, [0, 1, 4, 5, 6, 7]] == ARRIVES).all()
    assert held["gather"].tolist() == [[2, 0, 1, 1, 2, 0, 2, 0], [0, 2, 1, 1, 0, 2, 0, 2]]
    heads = keys_of_rank(pattern, layout, 1, "all_to_all", 8)
    assert (heads[2:4, [0, 7]] == ARRIVES).all()
    assert (heads[[0, 1, 4, 7]][:, [0, 7]] == ABSENT).all()
    later = keys_of_rank(Causal(), layout, 1, "ring", 2)
    assert (later[:, :2] == ARRIVES).all()
    assert (later[:, 4:] == ABSENT).all()


@pytest.mark.parametrize(("name", "figure"), [("layouts.png", layouts_figure), ("methods.png", methods_figure)])
def test_stored_figures_are_drawn_anew(name, figure, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="figures are drawn by matplotlib, of the extra 'plots'")
    figure(tmp_path / name)
    drawn, stored = (image.imread(folder / name)[..., :3] for folder in (tmp_path, FIGURES))
    assert drawn.shape == stored.shape, f"draw docs/figures/{name} anew with reports.worlds.{figure.__name__}"
    apart = np.abs(drawn - stored).mean()
    assert apart < 0.01, f"docs/figures/{name} is not what {figure.__name__} draws"  # fonts differ by a little
    assert np.abs(np.roll(stored, 12, axis=1) - stored).mean() > 0.02, "a blank picture would pass"


def test_work_in_zigzag_is_even_where_contiguous_is_not():
    pattern = longnet([8, 24, 48], [1, 2, 4]) & Causal()
    contiguous, zigzag = (work_shares(pattern, Layout(name, 48, 4), 4) for name in ("contiguous", "zigzag"))
    assert max(contiguous) > 1.3
    assert max(zigzag) < 1.02
