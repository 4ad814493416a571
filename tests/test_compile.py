"""torch.compile traces layers whole and serves every length with three graphs; checkpointing can keep attention."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dilated_attention_pytorch import Causal, Documents, attend, attention
from dilated_attention_pytorch.nn import DilatedTransformer, DilatedTransformerEncoderLayer

LENGTHS = (100, 101, 37, 64, 63, 128, 200, 255, 256, 257, 300, 1, 2, 16, 90, 77, 512, 511, 33, 150)
GRAPHS = 3
"""The first length's, one for every other length, and one for a single token, which PyTorch always treats apart."""


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block_of(position="rotary", **options):
    return DilatedTransformerEncoderLayer(32, 4, [16, 64], [1, 2], 64, dropout=0.0, position=position, **options)


def padding(n):
    return torch.arange(n) >= torch.tensor([n, max(1, n // 2)])[:, None]


CALLS = {
    "rotary": (block_of, lambda n: {}),
    "xpos": (partial(block_of, "xpos"), lambda n: {}),
    "alibi": (partial(block_of, "alibi"), lambda n: {}),
    "padded": (block_of, lambda n: {"key_padding_mask": padding(n)}),
    "documents": (block_of, lambda n: {"documents": Documents([n // 2, n - n // 2])}),
    "documents_xpos": (partial(block_of, "xpos"), lambda n: {"documents": Documents([n // 2, n - n // 2])}),
    "grouped_heads": (partial(block_of, num_kv_heads=2, head_groups=True), lambda n: {}),
}


@pytest.mark.parametrize(
    "kind", [k if k in ("padded", "documents_xpos") else pytest.param(k, marks=pytest.mark.nightly) for k in CALLS]
)
def test_a_block_is_one_graph_and_recompiles_twice_over_twenty_lengths(kind):
    make, options = CALLS[kind]
    block, counter = make(), CompileCounterWithBackend("eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)  # a graph break would raise
    for n in LENGTHS:
        x = torch.randn(2, n, 32)
        torch.testing.assert_close(
            compiled(x, is_causal=True, **options(n)), block(x, is_causal=True, **options(n)), msg=f"length {n}"
        )
    assert counter.frame_count <= GRAPHS
    assert len(set(LENGTHS)) == 20


def test_training_compiles_as_often():
    """Forward and backward through AOT autograd; gradients as without compiling."""
    block, counter = block_of(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for n in (100, 37, 300):
        x = torch.randn(2, n, 32, requires_grad=True)
        found = torch.autograd.grad(compiled(x, is_causal=True).square().sum(), (x, *block.parameters()))
        expected = torch.autograd.grad(block(x, is_causal=True).square().sum(), (x, *block.parameters()))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert counter.frame_count == 2


def test_nothing_breaks_the_graph():
    stack = DilatedTransformer([block_of() for _ in range(2)])
    told = torch._dynamo.explain(stack)(torch.randn(2, 50, 32), is_causal=True)
    assert (told.graph_count, told.graph_break_count) == (1, 0)
    names = [str(node.target) for graph in told.graphs for node in graph.graph.nodes]
    assert names.count("dilated_attention_pytorch.attend") == 2


@pytest.mark.nightly
@pytest.mark.parametrize("train", [False, True])
def test_inductor_serves_twenty_lengths(train):
    block, counter = block_of(), CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for n in LENGTHS:
        x = torch.randn(2, n, 32, requires_grad=train)
        found, expected = compiled(x, is_causal=True), block(x, is_causal=True)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        if train:
            grads = (torch.autograd.grad(y.sum(), block.parameters()) for y in (found, expected))
            torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    assert counter.frame_count <= GRAPHS


class Layer(nn.Module):
    """Projections around attention, as small as it goes."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)) for y in self.mix(x).chunk(3, -1))
        return self.out(attend(q, k, v, Causal()).flatten(2))


def keep_attention(ctx, op, *args, **kwargs):
    if op == torch.ops.dilated_attention_pytorch.attend.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("keeps", "runs", "compiled"),
    [
        (None, 2, False),
        (keep_attention, 1, False),
        ([torch.ops.dilated_attention_pytorch.attend.default], 1, False),
        (keep_attention, 1, True),
    ],
)
def test_selective_checkpointing_keeps_attention(monkeypatch, keeps, runs, compiled):
    """With the operator among those kept, backward does not run it again; gradients are the same."""
    calls, real = [], attention.forward

    def counted(*args, **options):
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(attention, "forward", counted)
    layer, x = Layer(), torch.randn(1, 20, 16)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    options = {}
    if keeps is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keeps)
    run = partial(checkpoint, layer, use_reentrant=False, **options)
    if compiled:
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    calls.clear()
    found = torch.autograd.grad(run(x).square().sum(), layer.parameters())
    torch.testing.assert_close(found, expected)
    assert len(calls) == runs
