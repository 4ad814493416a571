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

THREADS, ROUNDS, WIDTH, HEADS = 8, 5, 32, 4
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
    own = torch.randn(2, 20 + 9 * thread, WIDTH, generator=draw)
    calls = [("adaptive, kept", own, {"is_causal": True})] * ROUNDS
    for name in NAMES:
        for number in range(ROUNDS):
            length = int(torch.randint(20, 90, (), generator=draw))
            options = {"is_causal": True}
            if number == 1:
                options = {"key_padding_mask": torch.arange(length) >= torch.tensor([[length], [length - 7]])}
            elif number == 2 and name in ("dilated", "own", "block"):
                options = {"documents": Documents([length // 3, length - length // 3])}
            calls.append((name, torch.randn(2, length, WIDTH, generator=draw), options))
    return calls


def ends_of(layers, calls, meet=lambda: None):
    """Outputs, and of some calls the gradients of inputs and weights; threads ``meet`` before each call."""
    ends = []
    for number, (name, x, options) in enumerate(calls):
        layer, x = layers[name], x.clone().requires_grad_()
        meet()
        with torch.set_grad_enabled(number % ROUNDS == 0):
            out = layer(x, **options)
        ends.append(out.detach())
        if out.requires_grad:
            ends += torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    return ends


@pytest.fixture
def _hurried(monkeypatch):
    """Plans are evicted as soon as they are made, and threads are switched often."""
    monkeypatch.setattr(planner._cache, "size", 5)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hurried")
def test_eight_threads_get_what_one_gets():
    layers, calls = make_layers(), [calls_of(thread) for thread in range(THREADS)]
    alone = make_layers()
    expected = [ends_of(alone, each) for each in calls]
    found, barrier = {}, threading.Barrier(THREADS, timeout=30)

    def work(thread):
        try:
            found[thread] = ends_of(layers, calls[thread], barrier.wait)
        except BaseException:
            barrier.abort()  # nobody waits for this one
            raise

    threads = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert sorted(found) == list(range(THREADS)), "a thread raised, or hangs"
    for thread in range(THREADS):
        for number, (end, right) in enumerate(zip(found[thread], expected[thread], strict=True)):
            assert torch.equal(end, right), (thread, number)
