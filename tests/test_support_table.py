"""The table of docs/backends.md is what the backends say of themselves today."""

from pathlib import Path

import pytest

from dilated_attention_pytorch.backends import BACKENDS, DenseBackend, SdpaBackend
from dilated_attention_pytorch.testing.support import FEATURES, support, support_columns, support_table

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"


def test_the_page_holds_the_table():
    start, end = "<!-- table: dilated-attention info --support -->\n", "<!-- end of table -->"
    held = PAGE.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    assert held == support_table(), "copy the output of `dilated-attention info --support` between the page's marks"


def test_every_backend_has_a_row_and_a_column():
    page = PAGE.read_text(encoding="utf-8")
    for backend in BACKENDS:
        assert f"| `{backend.name}` |" in page
    assert {b.name for b, _ in support_columns()} == {b.name for b in BACKENDS}


def by_name(name):
    return next(f for f in FEATURES if f.name == name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_dense_can_do_everything(feature, device):
    assert support(DenseBackend(), feature, device) == []


def test_what_is_refused_is_refused_for_its_own_reason():
    assert "dropout" in support(SdpaBackend(), by_name("dropout"), "cpu")[0]
    assert "64" in support(SdpaBackend(), by_name("value dim unlike head dim"), "cpu")[0]
    assert support(SdpaBackend(), by_name("float64"), "cpu") == []
    assert "float64" in support(SdpaBackend(), by_name("float64"), "cuda")[0]
