"""Profilers see the backend and every piece by name, and nothing is named when none listens."""

import torch
from torch.profiler import profile

from dilated_attention_pytorch import Causal, Window, attend, longnet
from dilated_attention_pytorch.backends.sdpa import backend
from dilated_attention_pytorch.patterns import BlockSparse


def test_ranges_name_backend_and_pieces() -> None:
    q = torch.randn(1, 4096, 4, 16, requires_grad=True)
    with profile() as profiler:
        attend(q, q, q, longnet([512, 1024], [1, 2]) & Causal(), backend="sdpa").sum().backward()
        attend(q, q, q, Window(64), backend="sdpa")
        attend(q, q, q, BlockSparse(128, torch.arange(1024).view(32, 32) % 3 == 0) & Causal(), backend="sdpa")
    names = {event.key: event.count for event in profiler.key_averages()}
    assert names["dilated_attention_pytorch::sdpa::forward"] == 3
    assert names["dilated_attention_pytorch::sdpa::backward"] == 1
    assert any("causal" in n and "(512 x 512), every 1" in n for n in names)
    assert any("causal" in n and "(512 x 512), every 2" in n for n in names)
    assert any("banded" in n for n in names)
    assert any("full tiles" in n and "gathered" in n for n in names)
    assert any("partial tiles" in n and "in place" in n for n in names)


def test_nothing_is_named_without_a_profiler(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a range was named")

    q = torch.randn(1, 1024, 2, 16)
    monkeypatch.setattr(backend.torch.profiler, "record_function", _Only("dilated_attention_pytorch::", refuse))
    attend(q, q, q, longnet([256, 512], [1, 2]), backend="sdpa")


class _Only:
    """record_function for names that start with a prefix; other names are refused."""

    def __init__(self, prefix: str, refuse) -> None:
        self.prefix, self.refuse, self.real = prefix, refuse, torch.profiler.record_function

    def __call__(self, name: str):
        return self.real(name) if name.startswith(self.prefix) else self.refuse(name)
