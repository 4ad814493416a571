"""Threads that call the same layers at once get, to the bit, what each gets alone."""

import sys
import threading

import pytest
import torch

from dilated_attention_pytorch import Documents
from dilated_attention_pytorch.core import (
    BaseMultiheadDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    DilatedAttentionConfig,
    DilatedTransformerEncoderLayer,
    MultiheadConfig,
    MultiheadDilatedAttention,
    RingMultiheadDilatedAttention,
    SparsePatternConfig,
    create_adaptive_sparse_attention,
)
from dilated_attention_pytorch.plans import planner

THREADS, WIDTH, HEADS = 8, 32, 4
SEGMENTS, RATES = [16, 32], [1, 2]


def make_layers():
    """Layers of every sort, by name; in evaluation mode, so that no generator is shared."""
    torch.manual_seed(0)
    layers = {
        "dilated": MultiheadDilatedAttention(WIDTH, HEADS, RATES, SEGMENTS, position="rotary"),
        "alibi": MultiheadDilatedAttention(WIDTH, HEADS, RATES, SEGMENTS, position="alibi"),
        "ring": RingMultiheadDilatedAttention(WIDTH, HEADS, SEGMENTS, RATES),
        "blocks": BlockSparseRingMultiheadDilatedAttention(
            WIDTH, HEADS, sparse_config=SparsePatternConfig("global_local", 0.5, 8, global_tokens=8)
        ),
        "adaptive": create_adaptive_sparse_attention(WIDTH, HEADS, density=0.5, block_size=8),
        "adaptive, kept": create_adaptive_sparse_attention(WIDTH, HEADS, density=0.5, block_size=8, keep=2),
        "own": BaseMultiheadDilatedAttention(MultiheadConfig(WIDTH, HEADS), DilatedAttentionConfig(SEGMENTS, RATES)),
        "block": DilatedTransformerEncoderLayer(WIDTH, HEADS, SEGMENTS, RATES, 64, position="xpos"),
    }
    return {name: layer.eval() for name, layer in layers.items()}


NAMES = ("dilated", "alibi", "ring", "blocks", "adaptive", "own", "block")


def calls_of(thread):
    """What one thread asks for: (layer, input, options). A kept choice is its own: no other thread has its length."""
    draw = torch.Generator().manual_seed(thread)
    own = torch.randn(2, 40 + 9 * thread, WIDTH, generator=draw)
    calls = [("adaptive, kept", own, {"is_causal": True})] * 4
    for name in NAMES:
        lengths = torch.randint(20, 130, (2,), generator=draw).tolist()
        first, second = (torch.randn(2, length, WIDTH, generator=draw) for length in lengths)
        padding = torch.arange(lengths[1]) >= torch.tensor([[lengths[1]], [lengths[1] - 7]])
        options = {"key_padding_mask": padding}
        if name in ("dilated", "own", "block") and thread % 2:
            options = {"documents": Documents([lengths[1] // 3, lengths[1] - lengths[1] // 3])}
        calls += [(name, first, {"is_causal": True}), (name, second, options)]
    return [calls[i] for i in torch.randperm(len(calls), generator=draw).tolist()]


def ends_of(layers, calls):
    """Outputs, and of every other call the gradients of inputs and weights."""
    ends = []
    for number, (name, x, options) in enumerate(calls):
        layer, x = layers[name], x.clone().requires_grad_()
        with torch.set_grad_enabled(number % 2 == 0):
            out = layer(x, **options)
        ends.append(out.detach())
        if out.requires_grad:
            ends += torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    return ends


@pytest.fixture
def _hurried(monkeypatch):
    """Plans are evicted as soon as they are made, and threads are switched often."""
    monkeypatch.setattr(planner, "_CACHE_SIZE", 5)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hurried")
def test_eight_threads_get_what_one_gets():
    layers, calls = make_layers(), [calls_of(thread) for thread in range(THREADS)]
    alone = make_layers()
    expected = [ends_of(alone, each) for each in calls]
    found, start = {}, threading.Barrier(THREADS)

    def work(thread):
        start.wait()
        found[thread] = ends_of(layers, calls[thread])

    threads = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert sorted(found) == list(range(THREADS)), "a thread raised, or hangs"
    for thread in range(THREADS):
        for number, (end, right) in enumerate(zip(found[thread], expected[thread], strict=True)):
            assert torch.equal(end, right), (thread, number)
