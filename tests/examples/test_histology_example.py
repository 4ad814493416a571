"""The histology example attends along the curve, maps back, and draws what it says."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage", reason="the picture is scikit-image's, of the extra 'images'")
pytest.importorskip("matplotlib", reason="the figure is drawn by matplotlib, of the extra 'images'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "histology.py"


@pytest.fixture(scope="module")
def example() -> dict:
    return runpy.run_path(str(EXAMPLE))


def test_patches_along_the_curve_lose_more_noise(example, tmp_path, capsys) -> None:
    path = tmp_path / "new" / "figure.png"
    figures = example["main"](path)
    assert figures["noise"] + 7 < figures["rows"]
    assert figures["rows"] + 0.4 < figures["Hilbert"]
    text = capsys.readouterr().out
    assert f"attended {figures['Hilbert']:.2f} dB" in text
    assert 50_000 < path.stat().st_size < 200_000


def test_logits_are_distances_and_patches_come_back(example) -> None:
    picture = torch.rand(512, 512, 3)
    patches = example["cut"](picture)
    assert torch.equal(example["paste"](patches), picture)
    queries, keys, _ = (x[0, :50, 0] for x in example["heads_of"](patches))
    colours = patches[0, :50].view(50, -1, 3).mean(1)
    logits = queries @ keys.T
    expected = -(colours[:, None] - colours).square().sum(-1) / 2
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1))


def test_the_attention_drawn_is_that_of_the_layer(example) -> None:
    order, patch = example["hilbert_order"](example["GRID"]), 5 * 128 + 77
    heads = example["heads_of"](torch.rand(1, 128 * 128, 48))
    weights = example["attention_of"](patch, order, heads).flatten()
    attended = example["Ordered"](example["segment_attention"](), order)(*heads)
    torch.testing.assert_close(weights @ heads[2][0, :, 0], attended[0, patch, 0])
