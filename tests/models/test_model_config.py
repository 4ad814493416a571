import dataclasses
import json

import pytest
import torch.nn.functional as F

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.models import (
    LongNet,
    LongNetConfig,
    LongNetEncoder,
    LongNetEncoderConfig,
    LongNetLM,
    LongNetLMConfig,
)

SMALL = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "segment_lengths": (8, 24), "dilation_rates": (1, 3)}


def test_defaults_are_the_papers_base_model():
    config = LongNetLMConfig(num_tokens=64_000)
    assert (config.d_model, config.num_layers, config.nhead, config.dim_feedforward) == (768, 12, 12, 3072)
    assert config.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert config.dilation_rates == (1, 2, 4, 6, 12)
    assert (LongNetConfig().num_encoder_layers, LongNetConfig().num_decoder_layers) == (12, 12)
    assert LongNetConfig().cross_attention == "full"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (
            LongNetLM,
            LongNetLMConfig(
                num_tokens=11,
                num_layers=3,
                dropout=0.25,
                activation="relu",
                layer_norm_eps=1e-3,
                attention_dropout=0.5,
                position="xpos",
                num_kv_heads=2,
                head_offset="torchscale",
                head_groups=True,
                tie_embeddings=False,
                checkpoint_activations=True,
                **SMALL,
            ),
        ),
        (LongNetEncoder, LongNetEncoderConfig(num_layers=2, position="alibi", **SMALL)),
        (LongNet, LongNetConfig(num_encoder_layers=1, num_decoder_layers=2, cross_attention="longnet", **SMALL)),
    ],
)
def test_configs_go_to_json_and_to_models_and_back(model, config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert model.from_config(config).config == config


def test_every_option_reaches_the_layers():
    config = LongNetLMConfig(
        num_tokens=11,
        num_layers=1,
        dropout=0.25,
        activation="relu",
        layer_norm_eps=1e-3,
        attention_dropout=0.5,
        position="xpos",
        num_kv_heads=2,
        head_offset="torchscale",
        head_groups=True,
        checkpoint_activations=True,
        **SMALL,
    )
    model = LongNetLM.from_config(config)
    (layer,) = model.decoder.layers
    attention = layer.self_attn
    assert (attention.embed_dim, attention.num_heads, attention.num_kv_heads, attention.position) == (32, 4, 2, "xpos")
    assert (attention.attention.segment_lengths, attention.attention.dilation_rates) == ((8, 24), (1, 3))
    assert "torchscale" in attention.attention.pattern.text()
    assert "heads=(1, 2)" in attention.attention.pattern.text()
    assert attention.attention.attention_dropout == 0.5
    assert (layer.dropout.p, layer.feed_forward.dropout.p, model.dropout.p) == (0.25, 0.25, 0.25)
    assert layer.feed_forward.activation == "relu"
    assert layer.feed_forward.linear1.out_features == 48
    norms = (layer.norm, attention.norm, layer.feed_forward.norm, layer.feed_forward.sub_norm, model.decoder.norm)
    assert {norm.eps for norm in norms} == {1e-3}
    assert model.decoder.checkpoint_activations


def test_positional_constructors_of_0_2():
    model = LongNetLM(11, 32, 4, 1, 2, 48, [8, 24], [1, 3], 0.1, F.relu, 1e-6)
    expected = LongNetLMConfig(
        num_tokens=11, num_layers=3, dropout=0.1, activation="relu", layer_norm_eps=1e-6, **SMALL
    )
    assert model.config == expected
    assert len(model.decoder.layers) == 3
    both = LongNet(32, 4, 1, 2, 48, [8, 24], [1, 3], 0.1, "silu", 1e-6)
    assert (len(both.encoder.layers), len(both.decoder.layers)) == (1, 2)
    assert both.config.activation == "silu"


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LongNetLMConfig(num_tokens=4).d_model = 8


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_tokens": 0}, "num_tokens from 1"),
        ({"num_tokens": 2**40}, "num_tokens from 1"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers of type"),
        ({"num_layers": 2.0}, "num_layers of type"),
        ({"d_model": 30}, "divisible by nhead"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"dim_feedforward": -1}, "dim_feedforward"),
        ({"segment_lengths": (8,)}, "equally long"),
        ({"segment_lengths": [8, 24]}, "segment_lengths of type"),
        ({"segment_lengths": (8, "24")}, "segment_lengths of type"),
        ({"segment_lengths": (8, 0)}, "at least 1"),
        ({"segment_lengths": (1,) * 129, "dilation_rates": (1,) * 129}, "at most 128"),
        ({"dropout": 1.0}, "dropout in"),
        ({"dropout": float("nan")}, "dropout of type"),
        ({"attention_dropout": -0.1}, "attention_dropout in"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"activation": "swish"}, "activation"),
        ({"position": "learned"}, "position"),
        ({"d_model": 12}, "even head dim"),
        ({"head_offset": "odd"}, "head_offset"),
        ({"head_groups": True, "nhead": 1}, "head_groups deals"),
        ({"head_groups": 1}, "head_groups of type"),
        ({"format_version": 2}, "format_version 1. Got 2"),
    ],
)
def test_bad_values_name_their_field(changes, word):
    good = {"num_tokens": 11, **SMALL}
    LongNetLMConfig(**good)
    with pytest.raises(InvalidInput, match=word):
        LongNetLMConfig(**{**good, **changes})


def test_bad_cross_attention():
    with pytest.raises(InvalidInput, match="cross_attention"):
        LongNetConfig(cross_attention="window")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.pop("nhead"), r"missing fields \['nhead'\]"),
        (lambda d: d.update(num_experts=4), r"unknown fields \['num_experts'\]"),
        (lambda d: d.update(model="LongNet"), "model 'LongNetLM'. Got 'LongNet'"),
        (lambda d: d.pop("model"), "Got None"),
        (lambda d: d.update(segment_lengths={"8": 1}), "segment_lengths of type"),
        (lambda d: d.update(segment_lengths=[[8], 24]), "segment_lengths of type"),
    ],
)
def test_from_dict_takes_nothing_but_what_to_dict_wrote(change, word):
    values = LongNetLMConfig(num_tokens=11, **SMALL).to_dict()
    change(values)
    with pytest.raises(InvalidInput, match=word):
        LongNetLMConfig.from_dict(values)


def test_from_config_wants_its_own_config():
    with pytest.raises(InvalidInput, match="LongNetLMConfig"):
        LongNetLM.from_config(LongNetEncoderConfig())
    with pytest.raises(InvalidInput, match=r"-1"):
        LongNetLM(11, 32, 4, -1, 3)
