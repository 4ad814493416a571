"""Weights saved by 0.1 and 0.2 load into the layers of now, or the error says which keys cannot and why."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import InvalidInput, LongNet, LongNetLM, longnet, reference_attention
from dilated_attention_pytorch.core.layers import (
    BlockSparseRingMultiheadDilatedAttention,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    MultiheadDilatedAttention,
    RingMultiheadDilatedAttention,
    SparsePatternConfig,
)
from dilated_attention_pytorch.nn.old_keys import (
    DECODER_BLOCK,
    ENCODER_BLOCK,
    refuse_model_keys,
    rename_attention_keys,
    rename_block_keys,
)

WIDTH, HEADS, SEGMENTS, RATES = 16, 2, [8, 16], [1, 2]


def linear(name: str, out: int = WIDTH, inside: int = WIDTH) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(out, inside) / 4, f"{name}.bias": torch.randn(out) / 4}


def norm(name: str, width: int = WIDTH) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.rand(width) + 0.5, f"{name}.bias": torch.randn(width) / 4}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": x for key, x in state.items()}


def separate() -> dict[str, Tensor]:
    return {**linear("q_proj"), **linear("k_proj"), **linear("v_proj"), **linear("out_proj")}


def attended(x: Tensor, old: dict[str, Tensor]) -> Tensor:
    """What 0.1's projections and norm give around the definition."""
    q, k, v = (F.linear(x, old[f"{n}_proj.weight"], old[f"{n}_proj.bias"]).unflatten(-1, (HEADS, -1)) for n in "qkv")
    heads = reference_attention(q, k, v, longnet(SEGMENTS, RATES))[0].float().flatten(2)
    heads = F.layer_norm(heads, (WIDTH,), old["norm.weight"], old["norm.bias"])
    return F.linear(heads, old["out_proj.weight"], old["out_proj.bias"])


def make(kind=MultiheadDilatedAttention):
    branches = (RATES, SEGMENTS) if kind is MultiheadDilatedAttention else (SEGMENTS, RATES)
    return kind(WIDTH, HEADS, *branches)


def test_separate_projections_of_0_1() -> None:
    old, layer, x = {**separate(), **norm("norm")}, make(), torch.randn(2, 20, WIDTH)
    kept = dict(old)
    layer.load_state_dict(old)
    torch.testing.assert_close(layer(x), attended(x, old), rtol=0, atol=1e-5)
    assert old.keys() == kept.keys()
    assert all(old[key] is kept[key] for key in kept)


@pytest.mark.parametrize("wrapper", ["", "attention_core."])
def test_fused_layers_of_0_2_whose_second_norm_was_never_used(wrapper: str) -> None:
    fused = {**linear("qkv_proj", 3 * WIDTH), **linear("out_proj"), **norm("q_ln"), **norm("k_ln")}
    layer, x = make(RingMultiheadDilatedAttention), torch.randn(2, 20, WIDTH)
    layer.load_state_dict({wrapper + key: value for key, value in fused.items()})
    for kind in ("weight", "bias"):
        names = zip("qkv", fused[f"qkv_proj.{kind}"].chunk(3))
        fused |= {f"{n}_proj.{kind}": part for n, part in names} | {f"norm.{kind}": fused[f"q_ln.{kind}"]}
    torch.testing.assert_close(layer(x), attended(x, fused), rtol=0, atol=1e-5)


def test_block_sparse_layers_of_0_2() -> None:
    inside = {**linear("qkv_proj", 3 * WIDTH), **linear("out_proj")}
    layer = BlockSparseRingMultiheadDilatedAttention(WIDTH, HEADS, sparse_config=SparsePatternConfig(block_size=4))
    layer.load_state_dict(under("qkv_projection", inside))
    assert torch.equal(layer.qkv_proj.weight, inside["qkv_proj.weight"])
    assert torch.equal(layer.out_proj.bias, inside["out_proj.bias"])
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"layer_norm\.bias.*result of the output projection"):
        layer.load_state_dict(
            {**under("qkv_projection", {**linear("qkv_proj", 48), **linear("out_proj")}), **norm("layer_norm")}
        )
    assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items())


def test_normalised_queries_and_keys_of_0_2_are_refused_with_the_way_to_the_rest() -> None:
    old, layer = {**separate(), **norm("q_ln"), **norm("k_ln")}, make()
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"k_ln\.bias.*q_ln\.weight.*before attention.*strict=False"):
        layer.load_state_dict(old)
    assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items())
    missing, unexpected = layer.load_state_dict({k: x for k, x in old.items() if "_ln." not in k}, strict=False)
    assert (missing, unexpected) == (["norm.weight", "norm.bias"], [])
    assert torch.equal(layer.qkv_proj.weight[WIDTH : 2 * WIDTH], old["k_proj.weight"])


def encoder_of_old() -> dict[str, Tensor]:
    parts = norm("norm1"), norm("norm2"), norm("norm3", 24), linear("linear1", 24), linear("linear2", WIDTH, 24)
    return {**under("self_attn", {**separate(), **norm("norm")}), **{k: x for part in parts for k, x in part.items()}}


def test_encoder_layers_load_inside_a_stack_too() -> None:
    old, x = encoder_of_old(), torch.randn(2, 20, WIDTH)
    layer = DilatedTransformerEncoderLayer(WIDTH, HEADS, SEGMENTS, RATES, 24, 0.0, "relu")
    torch.nn.Sequential(torch.nn.Identity(), layer).load_state_dict(under("1", old))
    attention = {key.removeprefix("self_attn."): value for key, value in old.items() if key.startswith("self_attn.")}
    y = x + attended(F.layer_norm(x, (WIDTH,), old["norm1.weight"], old["norm1.bias"]), attention)
    z = F.layer_norm(y, (WIDTH,), old["norm2.weight"], old["norm2.bias"])
    z = F.layer_norm(
        F.linear(z, old["linear1.weight"], old["linear1.bias"]).relu(), (24,), old["norm3.weight"], old["norm3.bias"]
    )
    expected = y + F.linear(z, old["linear2.weight"], old["linear2.bias"])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_decoder_layers_are_refused_before_anything_is_loaded() -> None:
    old = {**encoder_of_old(), **under("multihead_attn", {**separate(), **norm("norm")}), **norm("norm4", 24)}
    layer = DilatedTransformerDecoderLayer(WIDTH, HEADS, SEGMENTS, RATES, 24)
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"multihead_attn\.norm\.bias.*sub-LayerNorm in cross-attention"):
        layer.load_state_dict(old)
    normed = {**encoder_of_old(), **under("self_attn", {**norm("q_ln"), **norm("k_ln")})}
    encoder = DilatedTransformerEncoderLayer(WIDTH, HEADS, SEGMENTS, RATES, 24)
    kept = {key: x.clone() for key, x in encoder.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"self_attn\.k_ln"):
        encoder.load_state_dict(normed)
    assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items())
    assert all(torch.equal(x, kept[key]) for key, x in encoder.state_dict().items())
    plain = {key: x for key, x in old.items() if ".norm." not in key}
    rename_block_keys(plain, "", DECODER_BLOCK)
    assert {"cross_attn.qkv_proj.weight", "cross_norm.bias", "feed_forward.sub_norm.weight"} <= set(plain)


def test_whole_models_are_refused_and_their_encoder_layers_load() -> None:
    old = under("encoder.layers.0", encoder_of_old())
    branches = {"segment_lengths": SEGMENTS, "dilation_rates": RATES, "dim_feedforward": 24}
    model = LongNet(WIDTH, HEADS, 1, 1, **branches)
    with pytest.raises(InvalidInput, match=r"encoder\.layers\.0\.norm1.*one by one"):
        model.load_state_dict(old)
    language = LongNetLM(20, WIDTH, HEADS, 0, 1, **branches)
    with pytest.raises(InvalidInput, match=r"token_embedding.*xPos"):
        language.load_state_dict({"token_embedding.weight": torch.zeros(20, WIDTH), **under("long_net", old)})
    layer = DilatedTransformerEncoderLayer(WIDTH, HEADS, SEGMENTS, RATES, 24)
    layer.load_state_dict({key.removeprefix("encoder.layers.0."): x for key, x in old.items()})


def test_weights_of_now_are_left_alone() -> None:
    branches = {"segment_lengths": SEGMENTS, "dilation_rates": RATES, "dim_feedforward": 24}
    for model in (LongNet(WIDTH, HEADS, 1, 1, **branches), LongNetLM(20, WIDTH, HEADS, 0, 1, **branches)):
        state = model.state_dict()
        for rename in (
            lambda s: rename_attention_keys(s, ""),
            lambda s: rename_block_keys(s, "", ENCODER_BLOCK),
            refuse_model_keys,
        ):
            renamed = dict(state)
            rename(renamed)
            assert renamed.keys() == state.keys()
        model.load_state_dict(state)
