"""The Python of docs/orders.md runs and gives what the page says."""

import re
from pathlib import Path

import torch

from dilated_attention_pytorch.orderings import hilbert_order, mean_segment_distance, morton_order

PAGE = Path(__file__).parents[2] / "docs" / "orders.md"


def test_the_examples_of_the_page_run() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert torch.equal(names["back"], names["x"])
    order, layer, x = names["order"], names["layer"], names["x"]
    torch.testing.assert_close(names["y"][:, order.permutation], layer(x[:, order.permutation]))
    own, points = names["tiles"][1, :400], names["points"][1]
    places = hilbert_order(points=points).permutation
    torch.testing.assert_close(names["encoded"][1, :400][places], layer(own[places][None])[0])
    read = names["hours"].permutation
    assert torch.equal(read.sort().values, torch.arange(24 * 365))
    steps = torch.stack((read // 24, read % 24)).diff(dim=1).abs().sum(0)
    assert (steps == 1).all(), "to the next hour, or to the same hour of the next day"


def test_morton_is_as_compact_only_where_the_page_says_so() -> None:
    def apart(make, shape, length):
        return mean_segment_distance(make(shape), shape, length)

    def in_windows(make, shape, lag):
        cells = torch.stack(torch.unravel_index(make(shape).permutation, shape), 1).double()
        return (cells[lag:] - cells[:-lag]).norm(dim=1).mean()

    for length in (64, 256):
        assert apart(hilbert_order, (64, 64), length) == apart(morton_order, (64, 64), length)
    for shape in ((64, 64), (50, 60), (37, 91)):
        for length in (48, 100, 200):
            assert apart(hilbert_order, shape, length) < 0.85 * apart(morton_order, shape, length)
        for lag in (1, 16, 64):
            assert in_windows(hilbert_order, shape, lag) < 0.95 * in_windows(morton_order, shape, lag)


def test_the_page_shows_a_figure_that_exists() -> None:
    links = re.findall(r"\]\(((?!http)[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert "figures/hilbert.png" in links
    for link in links:
        assert (PAGE.parent / link).exists()
