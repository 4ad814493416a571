"""Rows past element 2^31 of tensors that are mostly never touched, and work that does not follow their length."""

import resource

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, Documents, Window, attend, longnet
from dilated_attention_pytorch.backends import dense


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "pattern", [Dilated(16, 2) & Causal(), longnet([8, 16], [1, 2]), Documents([2**20, 64]).of(Window(5))]
)
def test_the_last_rows_of_a_long_sequence(pattern):
    n, h, d = 2**20 + 64, 32, 64  # 2^31 elements and 64 rows more: 4 GiB that are never real
    k, v = (torch.empty(1, n, h, d, dtype=torch.bfloat16) for _ in range(2))
    assert k.numel() > 2**31
    last = slice(n - 64, n)
    k[:, last], v[:, last] = torch.randn(1, 64, h, d), torch.randn(1, 64, h, d)
    q = torch.randn(1, 2, h, d).bfloat16()
    before = peak_bytes()
    out, lse = attend(q, k, v, pattern, backend="sdpa", return_lse=True)
    assert peak_bytes() - before < 2**28, "touched memory that belongs to other rows"
    inner = pattern.inner if hasattr(pattern, "inner") else pattern
    expected = attend(q, k[:, last], v[:, last], inner, backend="dense", return_lse=True)
    torch.testing.assert_close(out, expected[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


def test_dense_memory_is_bounded_by_its_chunks(monkeypatch):
    shapes = []
    real = dense._chunk

    def noted(*arguments):
        chunk = real(*arguments)
        shapes.append(chunk.logits.numel())
        return chunk

    monkeypatch.setattr(dense, "_chunk", noted)
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 1000)
    q = torch.randn(3, 50, 4, 2, requires_grad=True)
    k = torch.randn(3, 70, 2, 2)
    attend(q, k, k, Causal(), backend="dense").sum().backward()
    assert max(shapes) <= 1000
    assert sum(shapes) == 2 * 3 * 4 * 50 * 70
