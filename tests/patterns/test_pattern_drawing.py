"""Pictures of patterns."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, Full, longnet


def test_a_row_per_query_and_counts_as_digits():
    text = (longnet([2, 4], [1, 2]) & Causal()).draw(4)
    assert text.splitlines() == ["2···", "11··", "1·2·", "··11"]


def test_large_counts_are_a_plus():
    pattern = Full()
    for _ in range(10):
        pattern = pattern + Full()
    assert pattern.draw(1) == "+"
    assert longnet([4] * 9, [1] * 9).draw(1) == "9"


def test_heads_differ_and_key_length_counts():
    pattern = longnet([4], [2])
    assert pattern.draw(4, num_heads=2, head=0) != pattern.draw(4, num_heads=2, head=1)
    assert Causal().draw(1, 3) == "111"
    assert Documents([[1, 1], [2, 0]]).draw(2) == "1·\n·1"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_path_writes_an_image(tmp_path, suffix):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / f"picture.{suffix}"
    text = Causal().draw(5, path=path)
    assert text == Causal().draw(5)
    assert path.stat().st_size > 50
    if suffix == "png":
        pixels = torch.as_tensor(image.imread(path))
        assert pixels.shape[:2] == (5, 5)
        seen = torch.ones(5, 5).tril().bool()
        assert len(pixels[seen].unique(dim=0)) == 1
        assert not torch.equal(pixels[0, 0], pixels[0, 1])
