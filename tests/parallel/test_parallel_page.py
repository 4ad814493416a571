"""The Python of docs/parallel.md runs, in a world of one and in one of two, and its links lead somewhere."""

import re
from pathlib import Path

import torch

from dilated_attention_pytorch import Causal, attend, longnet
from parallel.worlds import run_world

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"


def _run_blocks():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    return {name: x for name, x in names.items() if isinstance(x, torch.Tensor)}, len(blocks)


def test_the_example_of_the_page_gives_the_same_on_any_world():
    alone, blocks = _run_blocks()
    assert blocks == 1
    assert alone["out"].shape == (2, 1000, 4, 16)
    expected = attend(*[alone["q"]] * 3, longnet([128, 512], [1, 4]) & Causal())
    torch.testing.assert_close(alone["whole"], expected)
    torch.manual_seed(0)
    (alone, _), *ranks = [_run_blocks(), *run_world(2, _run_blocks)]
    for names, _ in ranks:
        assert names["out"].shape == (2, 500, 4, 16)
        torch.testing.assert_close(names["whole"], alone["whole"])


def test_links_lead_somewhere():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert {"figures/layouts.png", "figures/methods.png"} <= set(links)
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
