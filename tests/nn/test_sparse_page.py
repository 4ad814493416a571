import re
from pathlib import Path

import torch

from dilated_attention_pytorch import Causal, reference_attention

PAGE = Path(__file__).parents[2] / "docs" / "sparse.md"


def test_the_examples_of_the_page_run_and_show_what_it_says():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for number, block in enumerate(blocks):
        exec(block, names)
        if number == 0:
            q = names["q"]
            expected = reference_attention(q, q, q, names["pattern"])[0].float()
            torch.testing.assert_close(names["out"], expected, rtol=0, atol=1e-5)
            own = reference_attention(*[q[:, :500]] * 3, names["pattern"])[0].float()
            torch.testing.assert_close(names["packed"][:, :500], own, rtol=0, atol=1e-5)
        if number == 1:
            visible = torch.ones(8, 8).tril().sum(-1)
            assert torch.equal(names["chosen"].layout.sum(-1)[0, 0], (visible / 4).ceil().clamp(min=1 + (visible > 1)))
            assert 0.2 < names["share"] <= 1
    assert len(names["losses"]) == 3
    assert names["y"].shape == names["z"].shape == (2, 1024, 256)
    assert names["chosen"].layout.shape == (2, 8, 16, 16)
    assert names["chosen"].right.text() == Causal().text()
    assert len(names["overlaps"]) == 1
    assert names["second"].selected is None
