import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import (
    Causal,
    Documents,
    Full,
    InvalidInput,
    NoBackend,
    Relative,
    Window,
    longnet,
    reference_attention,
)
from dilated_attention_pytorch.nn import (
    DilatedAttention,
    LayerCache,
    MultiheadDilatedAttention,
    alibi_slopes,
    rotate,
)
from dilated_attention_pytorch.nn.positions import make_positions

SEGMENTS, RATES = (8, 24), (1, 3)


def heads(length=50, num_heads=4, dim=8, kv_heads=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (num_heads, kv_heads or num_heads, kv_heads or num_heads)
    return tuple(torch.randn(2, length, h, dim, generator=g, dtype=torch.float64) for h in sizes)


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return MultiheadDilatedAttention(32, 4, RATES, SEGMENTS, dtype=torch.float64, **options).eval()


def rows(length=50, batch=2, seed=1):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


# DilatedAttention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"head_offset": "torchscale"}, {"head_groups": True}], ids=str)
def test_heads_against_the_reference(is_causal, options):
    q, k, v = heads(kv_heads=2)
    pattern = longnet(SEGMENTS, RATES, **options)
    expected, _ = reference_attention(q, k, v, pattern & Causal() if is_causal else pattern, scale=0.3)
    close(DilatedAttention(SEGMENTS, RATES, 0.3, **options)(q, k, v, is_causal), expected)


def test_attention_mask_is_that_of_sdpa():
    q, k, v = heads(20)
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    attention = DilatedAttention(pattern=Full())
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    close(attention(q, k, v, attention_mask=mask), expected.transpose(1, 2))
    bias = torch.randn(20, 20, dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias)
    close(attention(q, k, v, attention_mask=bias), expected.transpose(1, 2))
    with pytest.raises(InvalidInput, match="bool or float"):
        attention(q, k, v, attention_mask=mask.long())


def test_dropout_acts_in_training_only():
    q, k, v = heads()
    attention, plain = DilatedAttention(SEGMENTS, RATES, None, 0.5), DilatedAttention(SEGMENTS, RATES)
    assert torch.equal(attention.eval()(q, k, v), plain(q, k, v))
    torch.manual_seed(0)
    first, second = attention.train()(q, k, v), attention(q, k, v)
    assert (first - plain(q, k, v)).abs().max() > 0.1
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v), first)


def test_op_names_a_backend():
    q, k, v = heads()
    close(DilatedAttention(SEGMENTS, RATES, op="dense")(q, k, v), DilatedAttention(SEGMENTS, RATES, op="sdpa")(q, k, v))
    with pytest.raises(NoBackend):  # sdpa has no dropout on the CPU, so the name was heeded
        DilatedAttention(SEGMENTS, RATES, None, 0.5, "sdpa")(q, k, v)

    class FlashOperator:
        pass

    for op in (FlashOperator, FlashOperator(), (FlashOperator, FlashOperator), "cutlass"):
        with pytest.raises(InvalidInput, match="dense"):
            DilatedAttention(SEGMENTS, RATES, op=op)


def test_positional_order_of_0_2():
    def names(function):
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    assert names(DilatedAttention.__init__) == [
        *("segment_lengths", "dilation_rates", "softmax_scale", "attention_dropout", "op")
    ]
    assert names(DilatedAttention.forward) == ["query", "key", "value", "is_causal", "attention_mask"]
    assert names(MultiheadDilatedAttention.__init__) == [
        *("embed_dim", "num_heads", "dilation_rates", "segment_lengths", "dropout", "bias", "layer_norm"),
        *("layer_norm_eps", "gamma_init", "device", "dtype", "op"),
    ]
    assert names(MultiheadDilatedAttention.forward) == [
        *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "is_causal"),
        "average_attn_weights",
    ]
    with pytest.raises(TypeError, match="colour"):
        MultiheadDilatedAttention(8, 2, [1], [4])(torch.zeros(1, 5, 8), colour="red")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "pattern="),
        ({"segment_lengths": [8]}, "pattern="),
        ({"segment_lengths": [8, 16], "dilation_rates": [1]}, "equally long"),
        ({"segment_lengths": [0], "dilation_rates": [1]}, "at least 1"),
        ({"segment_lengths": [8], "dilation_rates": [1], "pattern": Full()}, "replaces"),
        ({"head_groups": True, "pattern": Full()}, "replaces"),
        ({"head_offset": "torchscale", "pattern": Full()}, "replaces"),
        ({"pattern": "full"}, "Pattern"),
        ({"segment_lengths": [8], "dilation_rates": [1], "attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_bad_options_of_heads(arguments, word):
    with pytest.raises(InvalidInput, match=word):
        DilatedAttention(**arguments)


# MultiheadDilatedAttention against a composition by hand


def by_hand(module, x, pattern, position="none", memory=None, query_start=None, sub_norm=True, **options):
    memory = x if memory is None else memory
    embed, kv = module.embed_dim, module.kv_dim
    w, b = module.qkv_proj.weight, module.qkv_proj.bias
    bounds = {"q": (0, embed), "k": (embed, embed + kv), "v": (embed + kv, embed + 2 * kv)}
    q, k, v = (
        (source @ w[lo:hi].T + b[lo:hi]).view(source.shape[0], source.shape[1], -1, module.head_dim)
        for source, (lo, hi) in zip((x, memory, memory), bounds.values())
    )
    start = memory.shape[1] - x.shape[1] if query_start is None else query_start
    positions = make_positions(position, module.head_dim, SEGMENTS)
    if positions is not None:
        mine, other = (positions.table(n, start=s, dtype=x.dtype) for n, s in ((x.shape[1], start), (k.shape[1], 0)))
        q, k = rotate(q, mine.query_cos, mine.query_sin), rotate(k, other.key_cos, other.key_sin)
    score = Relative(slopes=alibi_slopes(module.num_heads)) if position == "alibi" else None
    out, _ = reference_attention(q, k, v, pattern, score=score, query_start=query_start, **options)
    out = out.reshape(x.shape[0], x.shape[1], embed)
    if sub_norm:
        out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        out = out * module.norm.weight + module.norm.bias
    return out @ module.out_proj.weight.T + module.out_proj.bias


def shaken(module):
    """Biases and norms away from 0 and 1, so that leaving one out shows."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_layer_against_a_composition_by_hand(position, is_causal, num_kv_heads):
    module = shaken(layer(position=position, num_kv_heads=num_kv_heads))
    pattern = longnet(SEGMENTS, RATES)
    close(
        module(rows(), is_causal=is_causal),
        by_hand(module, rows(), pattern & Causal() if is_causal else pattern, position),
    )


@pytest.mark.parametrize("position", ["none", "rotary"])
@pytest.mark.parametrize(("queries", "query_start"), [(20, None), (20, 0), (70, 3)])
def test_cross_attention_against_a_composition_by_hand(position, queries, query_start):
    module, x, memory = shaken(layer(position=position)), rows(queries), rows(50, seed=2)
    options = {"memory": memory, "query_start": query_start}
    expected = by_hand(module, x, longnet(SEGMENTS, RATES), position, **options)
    close(module(x, memory, memory, query_start=query_start), expected)


def test_keys_and_values_may_differ():
    module, x, values = layer(), rows(), rows(seed=5)
    with torch.no_grad():
        module.qkv_proj.weight[:64] = 0  # all logits 0: the output is a mean of values
    close(module(x, x, values), module(values, values, values))
    assert not torch.allclose(module(x, x, values), module(x))


def test_a_pattern_of_ones_own():
    torch.manual_seed(0)
    module = MultiheadDilatedAttention(32, 4, pattern=Window(5), layer_norm=False, dtype=torch.float64)
    assert module.norm is None
    close(module(rows()), by_hand(module, rows(), Window(5), sub_norm=False))


def torch_layer(module):
    """nn.MultiheadAttention with the same weights."""
    other = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    other.load_state_dict(
        {
            "in_proj_weight": module.qkv_proj.weight,
            "in_proj_bias": module.qkv_proj.bias,
            "out_proj.weight": module.out_proj.weight,
            "out_proj.bias": module.out_proj.bias,
        }
    )
    return other.eval()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "padding"])
def test_masks_and_weights_are_those_of_torch(mask, average):
    torch.manual_seed(0)
    module = shaken(MultiheadDilatedAttention(32, 4, pattern=Full(), layer_norm=False, dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    forbidden = torch.rand(13, 17, generator=g) < 0.3
    options = {
        "none": {},
        "bool": {"attn_mask": forbidden},
        "float": {"attn_mask": torch.randn(8, 13, 17, generator=g, dtype=torch.float64)},
        "padding": {"key_padding_mask": torch.arange(17) >= torch.tensor([[17], [9]])},
    }[mask]
    x, memory = rows(13), rows(17, seed=2)
    both = {"need_weights": True, "average_attn_weights": average, **options}
    out, weights = module(x, memory, memory, **both)
    expected, expected_weights = torch_layer(module)(x, memory, memory, **both)
    close(out, expected)
    close(weights, expected_weights)
    close(module(x, memory, memory, **options), expected)


def test_weights_count_a_key_as_often_as_branches_bring_it():
    module = layer()
    _, weights = module(rows(), need_weights=True, average_attn_weights=False, is_causal=True)
    counts = (longnet(SEGMENTS, RATES) & Causal()).to_mask(4, 50).double()
    q, k, _ = module.qkv_proj(rows()).unflatten(-1, (3, 4, 8)).unbind(2)
    mass = counts * torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5)
    assert counts.max() == 2
    close(weights, mass / mass.sum(-1, keepdim=True))


# What a layer promises


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi"])
def test_causal_rows_do_not_move_when_later_rows_change(position):
    module, x = layer(position=position), rows()
    changed = x.clone()
    changed[:, 31:] += 1
    before, after = module(x, is_causal=True), module(changed, is_causal=True)
    assert torch.equal(before[:, :31], after[:, :31])
    assert (before[:, 31:] - after[:, 31:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("position", ["none", "rotary"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_padded_sample_equals_the_sample_alone(position, is_causal):
    module, x = layer(position=position), rows()
    padding = torch.arange(50) >= torch.tensor([[50], [29]])
    close(module(x, key_padding_mask=padding, is_causal=is_causal)[1, :29], module(x[1:, :29], is_causal=is_causal)[0])


@pytest.mark.parametrize("position", ["none", "rotary", "xpos"])
def test_a_packed_sample_equals_the_sample_alone(position):
    module, x = layer(position=position), rows()
    packed = module(x, is_causal=True, documents=Documents([19, 31]))
    close(packed[:, :19], module(x[:, :19], is_causal=True))
    close(packed[:, 19:], module(x[:, 19:], is_causal=True))


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi"])
def test_a_cache_changes_nothing(position):
    module, x = layer(position=position, num_kv_heads=2), rows(90)
    cache, parts = LayerCache(), []
    with torch.no_grad():
        for start, end in [(0, 7), (7, 8), (8, 40), (40, 41), (41, 90)]:
            parts.append(module(x[:, start:end], is_causal=True, cache=cache))
        close(torch.cat(parts, 1), module(x, is_causal=True))
    assert cache.length == 90


def test_position_ids_reach_the_rotation():
    module, x = layer(position="rotary"), rows()
    close(module(x, position_ids=torch.arange(50) + 1000), module(x))
    assert not torch.allclose(module(x, position_ids=torch.arange(50) * 2), module(x))


def test_magneto_initialisation():
    module = MultiheadDilatedAttention(256, 4, [1], [8], gamma_init=3.0, num_kv_heads=2)
    q, k, v = module.qkv_proj.weight.split((256, 128, 128))
    for weight, gain in ((q, 1.0), (k, 1.0), (v, 3.0), (module.out_proj.weight, 3.0)):
        expected = gain * (2 / sum(weight.shape)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not module.qkv_proj.bias.any()
    assert not module.out_proj.bias.any()
    before = q.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.qkv_proj.weight[:256])


def test_sub_layer_norm_hides_the_scale_of_values():
    for layer_norm, hidden in ((True, True), (False, False)):
        module = layer(layer_norm=layer_norm, bias=False)
        before = module(rows())
        with torch.no_grad():
            module.qkv_proj.weight[64:] *= 100
        assert (torch.allclose(module(rows()), before, rtol=1e-2, atol=1e-2)) is hidden


def test_second_forward_copies_and_pickles_agree():
    module = layer(position="alibi")
    first = module(rows(), is_causal=True)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(rows(), is_causal=True), first)
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.out_proj.weight.zero_()
    assert torch.equal(module(rows(), is_causal=True), first)


def test_gradients_are_those_of_the_composition():
    module = shaken(layer(position="rotary"))
    pattern = longnet(SEGMENTS, RATES) & Causal()
    weights = torch.randn(2, 50, 32, dtype=torch.float64)
    (module(rows(), is_causal=True) * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    (by_hand(module, rows(), pattern, "rotary") * weights).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9)


def test_autocast_gives_half_outputs_near_the_float_ones():
    module, x = layer(position="rotary").float(), rows().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, is_causal=True)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    expected = module(x, is_causal=True)
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


def test_device_and_dtype_are_heeded():
    module = MultiheadDilatedAttention(32, 4, RATES, SEGMENTS, device="meta", dtype=torch.bfloat16, position="rotary")
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"embed_dim": 768, "num_heads": 13}, r"embed_dim \(768\) must be divisible by num_heads \(13\).*59.08"),
        ({"num_heads": 0}, "at least 1"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"num_kv_heads": 0}, "at least 1"),
        ({"head_groups": True, "segment_lengths": [2] * 5, "dilation_rates": [1] * 5}, "5 branches"),
        ({"dropout": 1.5}, "attention_dropout"),
        ({"position": "sinusoid"}, "one of"),
        ({"position": "rotary", "embed_dim": 12}, "even head dim"),
        ({"position": "xpos", "segment_lengths": None, "dilation_rates": None, "pattern": Full()}, "rotary"),
        ({"op": object}, "xformers"),
    ],
)
def test_bad_options_of_a_layer(arguments, word):
    defaults = {"embed_dim": 32, "num_heads": 4, "dilation_rates": RATES, "segment_lengths": SEGMENTS}
    with pytest.raises(InvalidInput, match=word):
        MultiheadDilatedAttention(**{**defaults, **arguments})


def call(**options):
    return lambda: layer()(rows(), **options)


def cached(**options):
    def run():
        cache = LayerCache()
        try:
            with torch.no_grad():
                layer()(rows(), cache=cache, **options)
        finally:
            assert cache.length == 0

    return run


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (lambda: layer()(rows()[0]), r"x\[None\]"),
        (lambda: layer()(rows()[..., :8]), "embed_dim = 32"),
        (lambda: layer()([1.0]), "Got list"),
        (call(key=rows()[..., :8]), "key of shape"),
        (call(position_ids=torch.arange(50)), "no use for position_ids"),
        (lambda: layer(position="rotary")(rows(), rows(seed=2), position_ids=torch.arange(50)), "self-attention"),
        (call(attn_mask=torch.zeros(49, 50)), r"\(Nq, Nk\) = \(50, 50\)"),
        (call(attn_mask=torch.zeros(50, 50).long()), "bool or float"),
        (call(key=rows(seed=2), documents=Documents([50])), "self-attention"),
        (call(key_padding_mask=torch.arange(50).expand(2, 50) < 3), "right"),
        (cached(attn_mask=torch.zeros(3, 3)), "attn_mask"),
        (cached(key=rows(seed=2)), "self-attention"),
        (cached(query_start=0), "self-attention"),
        (cached(documents=Documents([50])), "between cached rows"),
        (cached(key_padding_mask=torch.zeros(2, 50, dtype=torch.bool)), "between cached rows"),
    ],
)
def test_bad_calls_of_a_layer(run, word):
    with pytest.raises(InvalidInput, match=word):
        run()
