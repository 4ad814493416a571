import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"tokens": torch.randint(256, (1, 20))}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (2, 100, 256)
    assert names["weights"].shape == (2, 100, 100)
    assert names["longer"].shape == (1, 40)
    assert names["logits"].shape == (1, 20, 256)
    assert names["model"].decoder.context_parallel is None
    assert (tmp_path / "run" / "model.safetensors").exists()
