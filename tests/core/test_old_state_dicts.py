"""Weights saved by 0.1 and 0.2 load into the layers of now, or the error says which keys cannot and why."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import InvalidInput, LongNet, LongNetLM, longnet, reference_attention
from dilated_attention_pytorch.core.layers import (
    BlockSparseRingMultiheadDilatedAttention,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    DistributedMultiheadDilatedAttention,
    ImprovedMultiheadDilatedAttention,
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
    return kind(WIDTH, HEADS, segment_lengths=SEGMENTS, dilation_rates=RATES)


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


def encoder_of_old(attention: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    attention = {**separate(), **norm("norm")} if attention is None else attention
    parts = norm("norm1"), norm("norm2"), norm("norm3", 24), linear("linear1", 24), linear("linear2", WIDTH, 24)
    return {**under("self_attn", attention), **{k: x for part in parts for k, x in part.items()}}


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


def fused() -> dict[str, Tensor]:
    return {**linear("qkv_proj", 3 * WIDTH), **linear("out_proj")}


def block(kind=DilatedTransformerEncoderLayer):
    return kind(WIDTH, HEADS, SEGMENTS, RATES, 24, activation="relu")


def small(kind):
    sizes = (20,) if kind is LongNetLM else ()
    return kind(*sizes, WIDTH, HEADS, 1, 1, segment_lengths=SEGMENTS, dilation_rates=RATES, dim_feedforward=24)


def normed() -> dict[str, Tensor]:
    return {**separate(), **norm("q_ln"), **norm("k_ln")}


def decoder_of_old() -> dict[str, Tensor]:
    return {**encoder_of_old(), **under("multihead_attn", {**separate(), **norm("norm")}), **norm("norm4", 24)}


ROWS = {
    "0.1 `MultiheadDilatedAttention`, `DistributedMultiheadDilatedAttention`": [
        (make, lambda: {**separate(), **norm("norm")}, None),
        (lambda: make(DistributedMultiheadDilatedAttention), lambda: {**separate(), **norm("norm")}, None),
    ],
    "0.2 `ImprovedMultiheadDilatedAttention`, `RingMultiheadDilatedAttention`, ring distributed": [
        (partial(make, kind), lambda: under("attention_core", {**fused(), **norm("q_ln"), **norm("k_ln")}), None)
        for kind in (ImprovedMultiheadDilatedAttention, RingMultiheadDilatedAttention)
    ],
    "0.2 `BlockSparseRingMultiheadDilatedAttention`": [
        (lambda: make(BlockSparseRingMultiheadDilatedAttention), lambda: under("qkv_projection", fused()), None),
        (
            lambda: make(BlockSparseRingMultiheadDilatedAttention),
            lambda: {**under("qkv_projection", fused()), **norm("layer_norm")},
            r"\['layer_norm.bias', 'layer_norm.weight'\].*normalised the result of the output projection",
        ),
    ],
    "0.1 `DilatedTransformerEncoderLayer`": [(block, lambda: encoder_of_old(), None)],
    "0.2 `MultiheadDilatedAttention` with `layer_norm=False`": [
        (lambda: MultiheadDilatedAttention(WIDTH, HEADS, RATES, SEGMENTS, layer_norm=False), separate, None)
    ],
    "0.2 `MultiheadDilatedAttention` with `layer_norm=True`, encoder layers that hold it": [
        (make, normed, r"\['k_ln.bias', 'k_ln.weight', 'q_ln.bias', 'q_ln.weight'\].*normalised queries and keys"),
        (
            block,
            lambda: {
                k: x for k, x in {**encoder_of_old(), **under("self_attn", normed())}.items() if ".norm." not in k
            },
            r"'self_attn.k_ln.bias'.*'self_attn.q_ln.weight'\].*normalised queries and keys",
        ),
    ],
    "decoder layers, `LongNet`, `LongNetLM`": [
        (
            lambda: block(DilatedTransformerDecoderLayer),
            decoder_of_old,
            r"\['multihead_attn.norm.bias', 'multihead_attn.norm.weight'\].*had the sub-LayerNorm in cross-attention",
        ),
        (
            lambda: small(LongNet),
            lambda: {**under("encoder.layers.0", encoder_of_old()), **under("decoder.layers.0", decoder_of_old())},
            r"'encoder.layers.0.norm1.*were encoder and decoder without a LayerNorm",
        ),
        (
            lambda: small(LongNetLM),
            lambda: {**under("long_net.encoder.layers.0", encoder_of_old()), **linear("token_embedding")},
            r"'long_net.encoder.layers.0.*with xPos added to embeddings",
        ),
    ],
}
PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()


def test_the_page_s_rows_are_those_tested_here() -> None:
    table = PAGE[PAGE.index("| saved by |") :].split("\n\n")[0].splitlines()[2:]
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1] for line in table}
    assert list(rows) == list(ROWS)
    for name, cases in ROWS.items():
        assert ("refused" in rows[name]) == all(reason is not None for _, _, reason in cases)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_page_loads_or_says_which_keys_cannot_and_why(name: str) -> None:
    for build, save, reason in ROWS[name]:
        layer, old = build(), save()
        before = {key: x.clone() for key, x in layer.state_dict().items()}
        if reason is None:
            assert str(layer.load_state_dict(old)) == "<All keys matched successfully>"
            kept = [x.flatten() for x in layer.state_dict().values()]
            old = {key: x for key, x in old.items() if "k_ln" not in key}
            assert torch.equal(torch.cat(kept).sort()[0], torch.cat([x.flatten() for x in old.values()]).sort()[0])
        else:
            with pytest.raises(InvalidInput, match=reason):
                layer.load_state_dict(old)
            assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items())
