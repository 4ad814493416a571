"""The page on troubleshooting: its snippet runs, its links lead somewhere, and it quotes errors that exist."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import Documents, InvalidInput, core
from dilated_attention_pytorch.nn import MultiheadDilatedAttention

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()


def test_snippet_runs_and_links_lead_somewhere() -> None:
    test = doctest.DocTestParser().get_doctest(PAGE.replace("\n```", "\n"), {}, "troubleshooting.md", None, 0)
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)
    assert len(test.examples) == 5
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (DOCS / link).exists(), link


def test_what_the_page_says_of_rows_padding_and_masks() -> None:
    torch.manual_seed(0)
    layer, x = MultiheadDilatedAttention(16, 2, [1, 2], [8, 16]), torch.randn(1, 20, 16)
    with pytest.raises(InvalidInput, match="need_weights gives a dense matrix, of at most 8192 tokens"):
        layer(torch.empty(1, 9000, 16), need_weights=True)
    padded = torch.cat((x[:, :12], torch.randn(1, 8, 16)), 1)
    mask = (torch.arange(20) >= 12)[None]
    alone = layer(x[:, :12])
    torch.testing.assert_close(layer(padded, key_padding_mask=mask)[:, :12], alone, rtol=0, atol=1e-5)
    packed = layer(padded, documents=Documents(torch.tensor([12, 8])))
    torch.testing.assert_close(packed[:, :12], alone, rtol=0, atol=1e-5)
    with pytest.raises(InvalidInput, match="right"):
        layer(padded, key_padding_mask=mask.flip(1))
    off = MultiheadDilatedAttention(16, 2, [2], [8], layer_norm=False, bias=False)
    assert (off.attention(*[x.unflatten(-1, (2, 8))] * 3) == 0).any()


def test_names_of_the_page_exist() -> None:
    for name in ("suggest_branches", "get_memory_pool_info", "clear_memory_pool"):
        assert name in PAGE
        assert callable(getattr(core, name))
