import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dilated_attention_pytorch import Documents, InvalidInput, longnet
from dilated_attention_pytorch.nn import (
    DilatedTransformer,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    FeedForward,
    KeyValueCache,
    encoder_decoder_gains,
    stack_gain,
)

OPTIONS = {"segment_lengths": (8, 24), "dilation_rates": (1, 3), "dim_feedforward": 64, "dtype": torch.float64}


def encoder_layer(seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    return DilatedTransformerEncoderLayer(32, 4, dropout=dropout, **{**OPTIONS, **options})


def decoder_layer(seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    return DilatedTransformerDecoderLayer(32, 4, dropout=dropout, **{**OPTIONS, **options})


def rows(length=40, seed=1):
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def by_hand(norm, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def shaken(module):
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.add_(torch.linspace(-0.5, 0.5, p.numel(), dtype=p.dtype))
    return module


def test_feed_forward_is_magnetos():
    ff, x = shaken(FeedForward(32, 64, activation="silu", dtype=torch.float64)), rows()
    inner = by_hand(ff.norm, x) @ ff.linear1.weight.T + ff.linear1.bias
    inner = by_hand(ff.sub_norm, inner * torch.sigmoid(inner))
    close(ff(x), inner @ ff.linear2.weight.T + ff.linear2.bias)


def test_feed_forward_starts_with_the_gain():
    ff = FeedForward(256, 512, gamma_init=2.5)
    for linear in (ff.linear1, ff.linear2):
        assert linear.weight.std().item() == pytest.approx(2.5 * (2 / 768) ** 0.5, rel=0.02)
        assert not linear.bias.any()
    before = ff.linear1.weight.clone()
    ff.reset_parameters()
    assert not torch.equal(before, ff.linear1.weight)


def test_gains_of_figure_2():
    assert stack_gain(12) == pytest.approx(math.sqrt(math.log(24)))
    encoder, decoder = encoder_decoder_gains(6, 18)
    assert encoder == pytest.approx(math.sqrt(math.log(54) * math.log(12) / 3))
    assert decoder == pytest.approx(math.sqrt(math.log(54)))


def test_an_encoder_layer_is_pre_norm_with_residuals():
    layer, x = shaken(encoder_layer(position="rotary")), rows()
    middle = x + layer.self_attn(by_hand(layer.norm, x), is_causal=True)
    close(layer(x, is_causal=True), middle + layer.feed_forward(middle))


def test_a_decoder_layer_is_pre_norm_with_residuals():
    layer, x, memory = shaken(decoder_layer()), rows(), rows(25, seed=2)
    middle = x + layer.self_attn(by_hand(layer.norm, x), is_causal=True)
    crossed = by_hand(layer.cross_norm, middle)
    middle = middle + layer.cross_attn(crossed, memory, memory, query_start=0)
    close(layer(x, memory, True), middle + layer.feed_forward(middle))


def test_the_gain_reaches_attention_and_cross_attention():
    layer = DilatedTransformerDecoderLayer(256, 4, [8], [1], 64, gamma_init=3.0)
    for attention in (layer.self_attn, layer.cross_attn):
        assert attention.out_proj.weight.std().item() == pytest.approx(3.0 * (2 / 512) ** 0.5, rel=0.02)
    assert layer.feed_forward.gamma_init == 3.0


def test_sub_layer_norms_are_where_magneto_puts_them():
    layer = decoder_layer()
    assert isinstance(layer.self_attn.norm, nn.LayerNorm)
    assert isinstance(layer.feed_forward.sub_norm, nn.LayerNorm)
    assert layer.cross_attn.norm is None


def test_cross_attention_sees_the_whole_memory_without_order():
    layer, x, memory = decoder_layer(position="rotary"), rows(50), rows(30, seed=2)
    out = layer(x, memory, True)
    close(layer(x, memory.flip(1), True), out)
    changed = memory.clone()
    changed[:, 29] += 1
    assert (layer(x, changed, True) - out).abs().amax((0, 2)).min() > 1e-6


def test_memory_may_be_causal_and_dilated():
    layer = decoder_layer(cross_pattern=longnet((8, 24), (1, 3)))
    x, memory = rows(40), rows(30, seed=2)
    changed = memory.clone()
    changed[:, 17:] += 1
    before, after = (layer(x, m, True, True) for m in (memory, changed))
    assert torch.equal(before[:, :17], after[:, :17])
    assert (before[:, 17:24] - after[:, 17:24]).abs().amax((0, 2)).min() > 1e-6


def test_memory_padding_is_not_seen():
    layer, x, memory = decoder_layer(), rows(20), rows(30, seed=2)
    padding = torch.arange(30) >= torch.tensor([[30], [11]])
    close(layer(x, memory, memory_key_padding_mask=padding)[1], layer(x[1:], memory[1:, :11])[0])


@pytest.mark.parametrize(
    ("layer", "others", "inputs"),
    [
        (encoder_layer(dropout=0.5), [], [rows()]),
        (decoder_layer(dropout=0.5), ["cross_attn"], [rows(), rows(30, seed=2)]),
        (decoder_layer(dropout=0.5), ["self_attn"], [rows(), rows(30, seed=2)]),
    ],
    ids=["encoder", "decoder", "decoder's cross-attention"],
)
def test_residual_dropout_drops_what_attention_adds_in_training_only(layer, others, inputs):
    for silent in (layer.feed_forward.linear2, *(layer.get_submodule(name).out_proj for name in others)):
        nn.init.zeros_(silent.weight)
    added, dropped = (layer.train(mode)(*inputs) - inputs[0] for mode in (False, True))
    zeros = dropped.abs() < 1e-12
    assert 0.4 < zeros.double().mean() < 0.6
    close(dropped[~zeros], 2 * added[~zeros])


def test_feed_forward_drops_inside_and_outside_in_training_only():
    ff, x = FeedForward(32, 64, 0.5, dtype=torch.float64), rows()
    plain, dropped = ff.eval()(x), ff.train()(x)
    zeros = dropped == 0
    assert 0.4 < zeros.double().mean() < 0.6
    assert (dropped - 2 * plain)[~zeros].abs().mean() > 0.1  # the inner one moved what is left


def stack(**options):
    torch.manual_seed(0)
    layers = [encoder_layer(seed, position="rotary", **options.pop("layer", {})) for seed in range(3)]
    return DilatedTransformer(layers, **options)


def test_a_stack_is_its_layers_then_a_norm():
    whole, x = shaken(stack()), rows()
    expected = x
    for layer in whole.layers:
        middle = expected + layer.self_attn(layer.norm(expected), is_causal=True)  # tabulates positions itself
        expected = middle + layer.feed_forward(middle)
    close(whole(x, is_causal=True), by_hand(whole.norm, expected))


def gradients_and_saved_bytes(whole):
    for layer in whole.layers:
        layer.dropout.p, layer.self_attn.attention.attention_dropout = 0.3, 0.2
    x, saved = rows().requires_grad_(), []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        out = whole(x, is_causal=True)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in whole.parameters())], sum(saved)


def test_checkpointed_activations_give_the_same_gradients_with_dropout():
    plain, plain_bytes = gradients_and_saved_bytes(stack())
    checkpointed, checkpointed_bytes = gradients_and_saved_bytes(stack(checkpoint_activations=True))
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)
    assert checkpointed_bytes < plain_bytes / 4


def test_a_cache_of_a_stack_changes_nothing():
    whole, x = stack().eval(), rows(75)
    cache = KeyValueCache(3)
    with torch.no_grad():
        parts = [whole(part, is_causal=True, cache=cache) for part in x.split((30, 1, 1, 43), 1)]
        close(torch.cat(parts, 1), whole(x, is_causal=True))
    assert cache.length == 75


def test_a_failing_layer_leaves_the_cache_as_it_was():
    whole, x = stack().eval(), rows(10)
    cache = KeyValueCache(3)
    with torch.no_grad():
        whole(x, is_causal=True, cache=cache)
        broken = copy.deepcopy(whole)
        broken.layers[2].forward = lambda *_, **__: 1 / 0
        with pytest.raises(ZeroDivisionError):
            broken(x, is_causal=True, cache=cache)
    assert [layer.length for layer in cache.layers] == [10, 10, 10]


def test_documents_and_position_ids_reach_every_layer():
    whole, x = stack().eval(), rows(40)
    packed = whole(x, is_causal=True, documents=Documents([15, 25]))
    close(packed[:, 15:], whole(x[:, 15:], is_causal=True))
    close(whole(x, position_ids=torch.arange(40) + 77), whole(x))
    assert not torch.allclose(whole(x, position_ids=torch.arange(40) * 3), whole(x))


def test_activations_by_name_and_by_function():
    ff = FeedForward(8, 16, activation=F.relu)
    assert ff.activation == "relu"
    assert FeedForward(8, 16).activation == "gelu"
    with pytest.raises(InvalidInput, match="gelu"):
        FeedForward(8, 16, activation="swish")
    with pytest.raises(InvalidInput, match="gelu"):
        FeedForward(8, 16, activation=lambda x: x)


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (lambda: DilatedTransformer([]), "at least one"),
        (lambda: stack()(rows(), rows()), "no cross-attention"),
        (lambda: stack()(rows(), memory_is_causal=True), "no cross-attention"),
        (lambda: DilatedTransformer([decoder_layer()])(rows()), "memory"),
        (lambda: DilatedTransformer([decoder_layer()])(rows(), rows(), cache=KeyValueCache(1)), "neither cache"),
        (lambda: stack()(rows(), cache=KeyValueCache(2)), "3 layers"),
        (lambda: DilatedTransformer([encoder_layer()])(rows(), position_ids=torch.arange(40)), "no use"),
        (lambda: encoder_layer(dropout=-0.1), "dropout"),
    ],
)
def test_bad_use_of_blocks(run, word):
    with pytest.raises(InvalidInput, match=word):
        run()
