"""The migration page: its snippets run, its table of paths is the table, and its old numbers are those of old."""

import doctest
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import longnet_attention
from dilated_attention_pytorch.old_paths import TABLE

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
SEGMENTS, RATES = (16, 32, 64), (1, 2, 4)


def test_snippets_run() -> None:
    sys.modules.pop("dilated_attention_pytorch.ring_dilated_attention", None)  # it warns when it is imported first
    test = doctest.DocTestParser().get_doctest(PAGE.replace("\n```", "\n"), {}, "migration.md", None, 0)
    assert len(test.examples) > 20
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


def test_the_page_names_every_old_path() -> None:
    named = set()
    for text in re.findall(r"`\.([\w.{},]+)`", PAGE):
        room, _, rest = text.partition("{")
        named |= {room + name for name in rest.rstrip("}").split(",")} if rest else {text}
    assert set(TABLE) - {"utils"} <= named


def dealt(heads: int, groups: int) -> list[tuple[int, int]]:
    """The first and one past the last head of each branch, in 0.1 and 0.2."""
    sizes = [heads // groups + (i < heads % groups) for i in range(groups)]
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(groups)]


def of_old(q: Tensor, k: Tensor, v: Tensor, version: str) -> Tensor:
    """What DilatedAttention of 0.1 or 0.2, or ImprovedDilatedAttention of 0.2 ("improved"), computed."""
    batch, length, heads, dim = q.shape
    out = torch.zeros_like(q)
    for i, ((low, high), size, rate) in enumerate(zip(dealt(heads, len(SEGMENTS)), SEGMENTS, RATES)):
        cut = (batch, length // size, size, heads, dim)
        rows = [x.view(cut)[:, :, i % rate :: rate, low:high].flatten(0, 1) for x in (q, k, v)]
        if version == "improved":
            x = F.scaled_dot_product_attention(*rows)  # heads stand where tokens should
        else:
            x = F.scaled_dot_product_attention(*(r.transpose(1, 2) for r in rows)).transpose(1, 2)
        x = x.unflatten(0, (batch, -1))
        if version == "0.1":
            x = x / x.sum((1, 2), keepdim=True)
        out.view(cut)[:, :, i % rate :: rate, low:high] += x
    return out / len(SEGMENTS)


def rows(seed: int, heads: int = 12) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(1, 64, heads, 8) for _ in range(3)]


def test_ones_of_old_and_of_now() -> None:
    q, k, _ = rows(0)
    ones = torch.ones_like(q)
    first, second, third = (of_old(q, k, ones, version) for version in ("0.1", "0.2", "improved"))
    for out in (first, second, third):
        assert float((out == 0).float().mean()) == pytest.approx(0.417, abs=1e-3)
    assert [float((first[:, :, h] == 0).float().mean()) for h in (0, 4, 8)] == [0, 0.5, 0.75]
    assert float(first[first > 0].min()) == pytest.approx(0.0052, abs=1e-4)
    assert float(first.max()) == pytest.approx(0.0208, abs=1e-4)
    assert float(second.max()) == pytest.approx(1 / 3)
    assert float(second.mean()) == pytest.approx(0.194, abs=1e-3)
    torch.testing.assert_close(longnet_attention(q, k, ones, SEGMENTS, RATES), ones)
    largest = sorted(float(of_old(*rows(seed), "0.1").abs().max()) for seed in range(20))
    assert (largest[9] + largest[10]) / 2 == pytest.approx(3.3, abs=0.05)
    assert largest[-1] == pytest.approx(59.8, abs=0.5)


def test_improved_attended_over_heads() -> None:
    changed = [x.clone() for x in rows(0)]
    for x in changed:
        x[:, 10] += 5
    moved = (of_old(*changed, "improved") != of_old(*rows(0), "improved")).flatten(2).any(2)
    assert moved.nonzero()[:, 1].tolist() == [10]
    q, k, v = rows(0, heads=3)
    assert torch.equal(of_old(q, k, v, "improved")[:, :, 0], v[:, :, 0] / 3)
    assert sum(high - low for (low, high), size in zip(dealt(12, 3), (2048, 4096, 8192)) if size > 2048) == 8


def test_blocks_of_old_were_added_and_looked_ahead() -> None:
    blocks, kept = 16, 4
    table = torch.eye(blocks, dtype=torch.bool)
    for i in range(blocks):
        near = [j for r in (1, 2, 4, 8) for j in (i + r, i - r) if 0 <= j < blocks]
        table[i, near[: kept - 1]] = True
    assert table.sum(1).tolist() == [4] * blocks
    assert int(table.triu(1).sum()) == 30
    assert int(table.sum()) == 64


def test_utilities_of_old() -> None:
    assert [2.0 ** (-8 * h / 8) for h in range(2)] == [1, 0.5]
    table = (10000.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(2)
    torch.testing.assert_close(table.view(-1, 2)[:, 0], torch.tensor([1, 0.01, 1, 0.01]))
    first, last = 5 - 4 // 2 * 2, min(8, 5 + 4 // 2 * 2 + 1)
    assert list(range(first, last, 2)) == [1, 3, 5, 7]
    assert 64 // 128 == 0
