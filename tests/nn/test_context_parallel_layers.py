"""Layers and models on shards give what they give on whole sequences, gradients included; what cannot says why."""

import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dilated_attention_pytorch import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    DilatedAttention,
    Documents,
    InvalidInput,
    LongNet,
    LongNetEncoder,
    LongNetLM,
    MultiheadAdaptiveSparseAttention,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
)
from dilated_attention_pytorch.nn import LayerCache, ShortConvolution, set_context_parallel
from dilated_attention_pytorch.nn.shards import as_context, over_ranks, shard_rows, whole_lengths, whole_shapes
from dilated_attention_pytorch.parallel import ContextParallel
from dilated_attention_pytorch.parallel import context as engine
from parallel.worlds import ends_of_world, run_world

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worlds are forked")
WIDTH = 32
BRANCHES = {"segment_lengths": [16, 32, 64], "dilation_rates": [1, 2, 4], "dtype": torch.float64}


def language_model(**options):
    return LongNetLM(50, WIDTH, 4, 0, 2, 64, **BRANCHES, **options)


BUILDERS = {
    "lm": lambda: language_model(embedding_width=5, copying_start=True),
    "lm of one token": lambda: language_model(position="alibi"),
    "lm of xpos": lambda: language_model(embedding_width=3, position="xpos", checkpoint_activations=True),
    "lm with dropout": lambda: language_model(attention_dropout=0.2, checkpoint_activations=True),
    "encoder": lambda: LongNetEncoder(WIDTH, 4, 2, 64, **BRANCHES),
    "encoder-decoder": lambda: LongNet(WIDTH, 4, 1, 1, 64, **BRANCHES),
    "dilated": lambda: MultiheadDilatedAttention(WIDTH, 4, **BRANCHES, position="rotary"),
    "cross": lambda: MultiheadDilatedAttention(WIDTH, 4, **BRANCHES, num_kv_heads=2, position="rotary"),
    "blocks": lambda: MultiheadBlockSparseAttention(
        WIDTH, 4, "global_local", block_size=8, window=16, position="rotary", dtype=torch.float64
    ),
    "blocks of a longest": lambda: MultiheadBlockSparseAttention(
        WIDTH, 4, "random_blocks", block_size=8, density=0.3, position="xpos", max_length=128, dtype=torch.float64
    ),
}


class Case(NamedTuple):
    """A model, tokens, and what its call is told besides."""

    model: str
    length: int = 67
    layout: str = "zigzag"
    documents: list | None = None
    padding: int = 0
    position_ids: bool = False


CASES = [
    Case("lm", documents=[30, 20, 17]),
    Case("lm", documents=[[30, 20, 17], [40, 27, 0]], layout="striped"),
    Case("lm", length=2, layout="contiguous"),  # a world of 3 has a rank without tokens
    Case("lm of one token", layout="striped"),
    Case("lm of xpos", padding=7, layout="contiguous"),
    Case("lm of xpos", documents=[30, 37]),
    Case("lm with dropout"),
    Case("encoder", padding=40, layout="striped"),
    Case("encoder", length=100, position_ids=True),
    Case("encoder-decoder", length=50, layout="contiguous"),
    Case("dilated", documents=[30, 20, 17]),
    Case("dilated", length=2),
    Case("cross"),
    Case("cross", length=2, layout="contiguous"),
    Case("blocks", layout="striped"),
    Case("blocks", padding=9),
    Case("blocks of a longest", length=100),
]


def computed(case, context=None):
    """Output and parameters' gradients of a case, of the whole or of this rank's shard."""
    torch.manual_seed(0)
    model = BUILDERS[case.model]()
    set_context_parallel(model, context)
    draw = torch.Generator().manual_seed(5)
    if case.model.startswith("lm"):
        x, channels = torch.randint(50, (2, case.length), generator=draw), 50
    else:
        x, channels = torch.randn(2, case.length, WIDTH, generator=draw, dtype=torch.float64), WIDTH
    weights = torch.randn(2, case.length, channels, generator=draw, dtype=torch.float64)
    options = {"is_causal": True}
    if case.documents:
        options["documents"] = Documents(case.documents)
    if case.padding:
        options["key_padding_mask"] = torch.arange(case.length) >= torch.tensor(
            [[case.length], [case.length - case.padding]]
        )
        weights = weights * ~options["key_padding_mask"].unsqueeze(-1)
    if case.position_ids:
        options["position_ids"] = torch.arange(case.length) * 3 % 71
    if context is not None:
        x, weights = context.shard(x), context.shard(weights)
        for name, dim in (("key_padding_mask", 1), ("position_ids", 0)):
            if name in options:
                options[name] = context.shard(options[name], dim)
    memory = []
    if case.model == "cross":
        memory = [torch.randn(2, case.length + 20, WIDTH, generator=draw, dtype=torch.float64)] * 2
        memory = memory if context is None else [context.shard(memory[0])] * 2
    torch.manual_seed(11)
    out = model(x, *memory, **options)
    (out * weights).sum().backward()
    return out.detach() * (weights != 0), [p.grad for p in model.parameters()]


def computed_on_shards(cases):
    results = []
    for case in cases:
        context = ContextParallel(layout=case.layout)
        out, grads = computed(case, context)
        for grad in grads:
            dist.all_reduce(grad)
        results.append((context.unshard(out, length=case.length), grads))
    return results


@pytest.fixture(scope="module")
def whole():
    return [computed(case) for case in CASES]


def close(case, found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11, msg=lambda text: f"{case}: {text}")


MODELS = [case.model for case in CASES]
EVERY = range(len(CASES))
SOME = [i for i in EVERY if i % 2 == 0 or MODELS.count(MODELS[i]) == 1]
"""Every other case, and each model: what a world of 2 has shown by day is asked of these in a world of 3."""


@pytest.mark.parametrize(
    ("world", "chosen"),
    [(2, EVERY), (3, SOME), pytest.param(3, EVERY, marks=pytest.mark.nightly)],
    ids=["2", "3", "3, every case"],
)
def test_shards_give_what_the_whole_gives(whole, world, chosen):
    for results in run_world(world, computed_on_shards, [CASES[i] for i in chosen], timeout=120):
        for i, (out, grads) in zip(chosen, results, strict=True):
            case, (expected, expected_grads) = CASES[i], whole[i]
            close(case, out, expected)
            for grad, other in zip(grads, expected_grads, strict=True):
                scale = float(other.abs().max().clamp(min=1))
                close(case, grad / scale, other / scale)


def test_a_world_of_one_is_the_whole(whole):
    for case, (expected, _) in zip(CASES[:3], whole):
        assert torch.equal(computed(case, ContextParallel(layout=case.layout))[0], expected)


def from_a_mesh():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "context"))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, 40, 4, 8, generator=draw, dtype=torch.float64)
    layer = DilatedAttention([16], [1], context_parallel=mesh["context"])
    blocks = BlockSparseAttention("local_window", block_size=8, window=16, context_parallel=mesh["context"])
    twin = BlockSparseAttention("local_window", block_size=8, window=16)
    shard = layer.context_parallel.shard(x)
    found = [each.context_parallel.unshard(each(shard, shard, shard)) for each in (layer, blocks)]
    return [a - b for a, b in zip(found, (DilatedAttention([16], [1])(x, x, x), twin(x, x, x)), strict=True)]


def test_layers_take_a_dim_of_a_mesh():
    for differences in run_world(2, from_a_mesh):
        assert all(float(difference.abs().max()) < 1e-12 for difference in differences)


def agreements():
    """How often ranks agree on a call in one forward of two layers, without and with dropout."""
    counted, agree = [], engine.agree
    engine.agree = lambda *arguments: counted.append(1) or agree(*arguments)
    counts = []
    for name in ("lm", "lm with dropout"):
        model = BUILDERS[name]()
        set_context_parallel(model, ContextParallel())
        model(torch.ones(1, 20, dtype=torch.int64))
        counts.append(len(counted))
    return counts


def test_ranks_agree_once_in_a_stack_or_at_each_drawing_of_dropout():
    assert run_world(2, agreements) == [[1, 3], [1, 3]]


def other_batch():
    model = BUILDERS["lm"]()
    set_context_parallel(model, ContextParallel())
    model(torch.ones(1 + dist.get_rank(), 20, dtype=torch.int64))


def test_ranks_of_one_sequence_share_their_batch():
    assert all("hold [1, 2] samples" in end.text for end in ends_of_world(2, other_batch))


def wrong_shards():
    layer = MultiheadDilatedAttention(WIDTH, 4, [1], [16], position="rotary", context_parallel=ContextParallel())
    layer(torch.zeros(1, 3 + 2 * dist.get_rank(), WIDTH))


def test_shards_of_another_layout_are_refused_on_every_rank():
    for end in ends_of_world(2, wrong_shards):
        assert "InvalidInput" in end.text
        assert "[4, 4]" in end.text
        assert "[3, 5]" in end.text


def test_where_a_shard_stands():
    context = ContextParallel(layout="striped")
    x = torch.zeros(2, 5, 3)
    assert as_context(None) is None
    assert as_context(context) is context
    assert whole_lengths(context, x, x[:, :2]) == (5, 2)
    assert shard_rows(context, x).at.tolist() == [0, 1, 2, 3, 4]
    assert [y.shape for y in whole_shapes(context, x)] == [x.shape]


def test_setting_it_leaves_state_and_config_alone_and_can_be_undone():
    model = language_model(embedding_width=3)
    names, config = list(model.state_dict()), model.config.to_dict()
    set_context_parallel(model, ContextParallel(layout="zigzag"))
    assert model.decoder.context_parallel.layout == "zigzag"
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
    set_context_parallel(model, None)
    assert model.decoder.context_parallel is None


def refusals():
    x = torch.zeros(1, 8, 4, 8)
    adaptive, dilated = AdaptiveSparseAttention(), DilatedAttention([4], [1])
    with pytest.raises(InvalidInput, match="no rank holds"):
        adaptive.context_parallel = ContextParallel()
    with pytest.raises(InvalidInput, match="no rank holds"):
        set_context_parallel(nn.ModuleList([dilated, adaptive]), ContextParallel())
    assert dilated.context_parallel is None
    adaptive._context_parallel = ContextParallel()  # as where it was set before the group was
    with pytest.raises(InvalidInput, match="no rank holds"):
        adaptive(x, x, x)
    dilated.context_parallel = ContextParallel()
    with pytest.raises(InvalidInput, match="mask over pairs"):
        dilated(x, x, x, attention_mask=torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(InvalidInput, match="weights"):
        dilated(x, x, x, need_weights=True)
    model = language_model()
    set_context_parallel(model, ContextParallel())
    with pytest.raises(InvalidInput, match="decode in one process"):
        model.generate(torch.tensor([1, 2]), max_new_tokens=1)


def test_what_needs_whole_sequences_says_why_and_nothing_is_changed():
    run_world(2, refusals)
    with pytest.raises(InvalidInput, match="no attention layer"):
        set_context_parallel(nn.Linear(2, 2), ContextParallel())
    with pytest.raises(InvalidInput, match="a mesh of one dim"):
        DilatedAttention([4], [1], context_parallel="context")


def with_every_option(context=None):
    """What layers and models give for options that need whole sequences."""
    draw = torch.Generator().manual_seed(2)
    x, q = (torch.randn(1, 40, *rest, generator=draw, dtype=torch.float64) for rest in ((WIDTH,), (4, 8)))
    hidden = torch.rand(40, 40, generator=draw) < 0.5
    kinds = {"dilated": BUILDERS["dilated"], "blocks": BUILDERS["blocks"], "lm": BUILDERS["lm"]}
    kinds["adaptive"] = lambda: MultiheadAdaptiveSparseAttention(WIDTH, 4, budget=1.0, dtype=torch.float64)
    found = []
    for kind, build in kinds.items():
        torch.manual_seed(0)
        model = build()
        set_context_parallel(model, context)
        if kind == "lm":
            found.append(model.generate(torch.tensor([3, 1, 2]), max_new_tokens=4, seed=1))
            continue
        found += model(x, need_weights=True, attn_mask=hidden, average_attn_weights=False)
        found.append(model(x[:, 7:9], x, x, query_start=7, is_causal=True))
        found += model.attention(q, q, q, attention_mask=~hidden, need_weights=True)
        cache = LayerCache()
        with torch.no_grad():
            found += [model(part, is_causal=True, cache=cache) for part in x.split((30, 10), 1)]
    return found


def test_a_group_of_one_has_every_option():
    expected = with_every_option()
    (grouped,) = run_world(1, lambda: with_every_option(ContextParallel()))
    for found in (with_every_option(ContextParallel(layout="zigzag", method="ring")), grouped):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert over_ranks(None) is None
    assert over_ranks(ContextParallel()) is None
    context = ContextParallel()
    assert run_world(2, lambda: over_ranks(context) is context) == [True, True]


def test_a_convolution_over_neighbours_that_lie_elsewhere():
    convolution = ShortConvolution(4, width=3).double()
    x = torch.randn(2, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    documents = Documents([[4, 6], [7, 3]])
    at = torch.tensor([2, 5, 8])
    place = documents.locate(at)[1].view(2, 3)
    found = convolution.over(lambda k: x[:, (at - k).clamp(min=0)], place)
    torch.testing.assert_close(found, convolution(x, documents)[:, at])
