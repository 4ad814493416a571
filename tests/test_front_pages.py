"""The Python in README.md and CONTRIBUTING.md runs, and does what the text around it says."""

import re
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import attend, reference_attention
from dilated_attention_pytorch.testing import CASES, check_contract

ROOT = Path(__file__).parent.parent


def run_blocks(name: str) -> dict[str, object]:
    """The names defined by all Python blocks of a document, run in order."""
    names: dict[str, object] = {"__name__": f"blocks_of_{name.partition('.')[0].lower()}"}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


def test_readme_example_gives_what_it_names() -> None:
    names = run_blocks("README.md")
    assert names["out"].shape == (1, 10_000, 8, 32)
    assert names["lse"].shape == (1, 8, 10_000)
    assert names["y"].shape == (1, 10_000, 256)
    q = names["q"][:, :200]
    expected, _ = reference_attention(q, q, q, names["pattern"])
    torch.testing.assert_close(names["out"][:, :200].double(), expected, rtol=0, atol=1e-5)


def test_readme_names_only_targets_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z]+)", text, re.MULTILINE)) <= targets
    links = re.findall(r"\]\(((?!http)[^)]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def contributing() -> dict[str, object]:
    return run_blocks("CONTRIBUTING.md")


def test_contributed_pattern_is_right_on_every_backend(contributing: dict[str, object]) -> None:
    pattern = contributing["Strided"](3)
    x = torch.randn(1, 20, 2, 8)
    expected, _ = reference_attention(x, x, x, pattern)
    torch.testing.assert_close(attend(x, x, x, pattern).double(), expected, rtol=0, atol=1e-5)
    assert pattern.to_mask(1, 4).tolist() == [[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]]


def test_contributed_backend_passes_the_contract_where_it_does_not_refuse(contributing: dict[str, object]) -> None:
    report = check_contract(contributing["HalfOnly"](), cases=CASES[::10], dtypes=(torch.float32, torch.float16))
    assert report.checked > 0
    assert any("only half types" in reason for why in report.refused.values() for reason in why)


def test_contributed_model_ignores_padding(contributing: dict[str, object]) -> None:
    model = contributing["TileEncoder"](16)
    tiles = torch.randn(1, 30, 16)
    padded = torch.cat((tiles, torch.randn(1, 10, 16)), 1)
    mask = torch.arange(40).unsqueeze(0) >= 30
    torch.testing.assert_close(model(padded, mask), model(tiles), rtol=0, atol=1e-5)
