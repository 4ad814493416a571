"""Configs are checked when made and when used, go to dicts and JSON and back, and forget nothing they were told."""

import copy
import dataclasses
import json
import logging
import pickle

import pytest
import torch

from dilated_attention_pytorch import InvalidInput, memory
from dilated_attention_pytorch.core import (
    DilatedAttentionConfig,
    DistributedConfig,
    MemoryPoolConfig,
    MultiheadConfig,
    RingAttentionConfig,
    SparseAttentionConfig,
    SparsePatternConfig,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_attention_pytorch.core import config as module
from dilated_attention_pytorch.training.settings import TrainingSettings

BRANCHES = ([32, 64], [1, 2])
CONFIGS = [
    DilatedAttentionConfig(*BRANCHES, dropout=0.1, use_tf32=False, device="cpu", dtype=torch.bfloat16),
    MultiheadConfig(64, 4, False, False, 1e-6, 0.5, "meta", torch.float64),
    RingAttentionConfig(*BRANCHES, block_size=64, ring_size=1, use_checkpointing=False, max_cached_buffers=0),
    SparseAttentionConfig(*BRANCHES, pattern_type="learned", block_size=16, density=0.5, min_sparsity=0.2),
    DistributedConfig(4, 3, "gloo", sequence_parallel=True, gradient_compression_ratio=0.5, zero_stage=3),
    SparsePatternConfig("global_local", None, 16, 256, 32, max_sparsity=0.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_configs_make_the_round_trip(config):
    values = config.to_dict()
    assert type(config).from_dict(json.loads(json.dumps(values))) == config
    assert type(config).from_json(config.to_json()) == config
    for twin in (copy.deepcopy(config.frozen() if not isinstance(config, DistributedConfig) else config), config):
        assert pickle.loads(pickle.dumps(twin)) == config
    with pytest.raises(InvalidInput, match="has no field 'segment_length'"):
        type(config).from_dict({**values, "segment_length": 1})
    with pytest.raises(AttributeError, match="has no field 'colour'"):
        config.colour = "red"


def test_from_dict_wants_what_has_no_default():
    with pytest.raises(InvalidInput, match=r"needs the fields \['num_heads'\]"):
        MultiheadConfig.from_dict({"embed_dim": 8})
    with pytest.raises(InvalidInput, match="this is no JSON"):
        MultiheadConfig.from_json("{")
    with pytest.raises(InvalidInput, match="expected a JSON object"):
        MultiheadConfig.from_json("[1]")


def test_values_are_kept_in_one_form():
    config = DilatedAttentionConfig([2048, 4096], (1, 2), device="cuda:1", dtype="float16")
    assert (config.segment_lengths, config.device, config.dtype) == (
        (2048, 4096),
        torch.device("cuda", 1),
        torch.float16,
    )
    assert (config.num_groups, config.max_segment_length) == (2, 4096)
    assert MultiheadConfig(768, 12).head_dim == 64
    assert DilatedAttentionConfig(*BRANCHES).device is None  # no GPU is looked for


def test_a_layer_uses_a_copy_that_nobody_changes():
    config = DilatedAttentionConfig(*BRANCHES)
    config.dropout = 0.5
    frozen = config.frozen()
    config.dropout = 0.25
    assert frozen.dropout == 0.5
    assert frozen.frozen() is frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.dropout = 0.0
    config.dropout = 2.0  # noticed when used
    with pytest.raises(InvalidInput, match="expected dropout in"):
        config.frozen()
    assert dataclasses.replace(frozen, dropout=0.0).dropout == 0.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DilatedAttentionConfig([1, 2, 4], [1, 2]), "must have the same length: got 3 and 2"),
        (lambda: DilatedAttentionConfig([1.5], [1]), "segment_lengths must be ints"),
        (lambda: DilatedAttentionConfig([4], [0]), r"dilation_rates\[0\] must be positive, got 0"),
        (lambda: DilatedAttentionConfig([4], [1], use_tf32=1), "use_tf32 must be True or False"),
        (lambda: DilatedAttentionConfig([4], [1], dtype="int32"), "dtype must be a floating torch.dtype"),
        (lambda: DilatedAttentionConfig([4], [1], dtype="flaot32"), "dtype must be a floating torch.dtype"),
        (lambda: DilatedAttentionConfig([4], [1], device="gpuu"), "device must be"),
        (lambda: MultiheadConfig(768, 13), r"embed_dim \(768\) must be divisible by num_heads \(13\)"),
        (lambda: MultiheadConfig(8, 2, layer_norm_eps=0), "layer_norm_eps must be positive, got 0"),
        (lambda: MultiheadConfig(8.0, 2), "embed_dim must be an int"),
        (lambda: RingAttentionConfig([4], [1], block_size=0), "block_size must be an int of at least 1, got 0"),
        (lambda: RingAttentionConfig([4], [1], ring_size=0), "ring_size must be an int of at least 1"),
        (lambda: SparseAttentionConfig([4], [1], pattern_type="local_windows"), "did you mean 'local_window'"),
        (lambda: SparseAttentionConfig([4], [1], sparsity_ratio=0.0), "is the share of blocks kept in Sparse"),
        (lambda: SparseAttentionConfig([4], [1], sparsity_ratio=0.5, density=0.1), "leave one out"),
        (lambda: SparseAttentionConfig([4], [1], min_sparsity=0.9), r"min_sparsity \(0.9\) must be less than"),
        (lambda: DistributedConfig(2, 2), r"rank \(2\) must be less than world_size \(2\)"),
        (lambda: DistributedConfig(backend="tcp"), "backend must be one of"),
        (lambda: DistributedConfig(zero_stage=4), "zero_stage must be 0, 1, 2 or 3, got 4"),
        (lambda: DistributedConfig(gradient_compression_ratio=0.0), r"must be in \(0, 1\], got 0.0"),
        (lambda: DistributedConfig(model_parallel="yes"), "model_parallel must be True or False"),
    ],
)
def test_what_is_wrong_is_said_at_construction(make, text):
    with pytest.raises(InvalidInput, match=text):
        make()


def test_the_share_kept_has_two_names():
    assert SparseAttentionConfig(*BRANCHES).kept == 0.25
    assert SparseAttentionConfig(*BRANCHES, sparsity_ratio=0.1).kept == 0.1
    assert SparseAttentionConfig(*BRANCHES, density=0.1).kept == 0.1
    assert SparseAttentionConfig(*BRANCHES).fixed_share is None
    assert SparseAttentionConfig(*BRANCHES, density=0.25).fixed_share == 0.25


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (RingAttentionConfig(*BRANCHES, ring_size=4), "ring_size=4: this process is one of 1"),
        (SparseAttentionConfig(*BRANCHES, min_sparsity=0.2), "add enable_adaptive=True"),
        (
            SparseAttentionConfig(*BRANCHES, enable_adaptive=True, pattern_type="axial"),
            "pattern_type='axial' is a fixed table",
        ),
        (
            SparseAttentionConfig(*BRANCHES, enable_adaptive=True, density=0.1, min_sparsity=0.2),
            r"the share kept \(0.1\) must be between min_sparsity \(0.2\) and max_sparsity \(0.9\)",
        ),
        (DistributedConfig(world_size=2), "world_size=2: this process is one of 1"),
        (DistributedConfig(rank=1), "rank=1: this process is rank 0"),
        (DistributedConfig(zero_stage=3), "train with --parallel fsdp"),
        (DistributedConfig(model_parallel=True), "model_parallel=True is not offered"),
        (DistributedConfig(pipeline_parallel=True), "pipeline_parallel=True is not offered"),
        (DistributedConfig(gradient_checkpointing=True), "checkpoint_activations=True"),
        (DistributedConfig(gradient_compression_ratio=0.1), "--gradient-compression"),
    ],
)
def test_what_cannot_be_had_raises_where_it_is_used(config, text):
    with pytest.raises(InvalidInput, match=text):
        config.frozen()


def test_tf32_is_the_process_s_and_forbidding_it_is_checked():
    config = DilatedAttentionConfig(*BRANCHES, use_tf32=False)
    before = torch.get_float32_matmul_precision()
    try:
        config.frozen()
        torch.set_float32_matmul_precision("high")
        with pytest.raises(InvalidInput, match="allows TF32"):
            config.frozen()
        DilatedAttentionConfig(*BRANCHES).frozen()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_fields_that_advise_say_so_when_they_were_set(caplog):
    with caplog.at_level(logging.WARNING):
        RingAttentionConfig(*BRANCHES).frozen()
        DistributedConfig().frozen()
        assert caplog.text == ""
        create_dilated_attention("ring", *BRANCHES, block_size=2048, use_memory_pool=False)
        DistributedConfig(backend="gloo", bucket_size_mb=5).frozen()
        SparsePatternConfig("local_window", None, 16, 256).frozen()
        SparsePatternConfig("local_window", 0.5, 16, 256, 32).frozen()
    told = [record.getMessage() for record in caplog.records]
    names = ("block_size=2048", "use_memory_pool=False", "backend='gloo'", "bucket_size_mb=5")
    for name, text in zip((*names, "local_window_size=256", "global_tokens=32"), told, strict=True):
        assert f"{name} changes no result: " in text


def test_a_training_run_is_asked_for_what_no_layer_does():
    sharded = DistributedConfig(world_size=4, sequence_parallel=True, zero_stage=3).train_settings()
    assert sharded == {"parallel": "fsdp", "context_parallel": 4}
    assert TrainingSettings(**DistributedConfig().train_settings()).parallel == "ddp"
    for config in (DistributedConfig(zero_stage=1), DistributedConfig(sequence_parallel=True)):
        with pytest.raises(InvalidInput):
            config.train_settings()


def test_the_pool_s_config_is_the_pool_s():
    assert MemoryPoolConfig is memory.MemoryPoolConfig is module.MemoryPoolConfig
    assert MemoryPoolConfig().max_pool_size_mb == 1024
    config = MemoryPoolConfig(5, max_pool_size_mb=200, device="cpu")
    assert MemoryPoolConfig.from_json(config.to_json()) == config == MemoryPoolConfig.from_dict(config.to_dict())
    for text, words in (("{", "this is no JSON"), ("[1]", "expected a JSON object"), ('{"hot": 1}', "Got hot")):
        with pytest.raises(InvalidInput, match=words):
            MemoryPoolConfig.from_json(text)


SIZES, BLOCKS = {"embed_dim": 32, "num_heads": 4}, {"segment_lengths": [32, 64], "dilation_rates": [1, 2]}
OTHER_VALUES = {
    MultiheadConfig: {
        "embed_dim": 64,
        "num_heads": 8,
        "bias": False,
        "layer_norm": False,
        "layer_norm_eps": 1e-3,
        "gamma_init": 0.5,
        "device": "meta",
        "dtype": "float64",
    },
    DilatedAttentionConfig: {
        "segment_lengths": [16, 64],
        "dilation_rates": [1, 4],
        "dropout": 0.1,
        "use_tf32": False,
        "device": "meta",
        "dtype": "float64",
    },
    RingAttentionConfig: {
        "block_size": 64,
        "ring_size": 2,
        "use_checkpointing": False,
        "use_memory_pool": False,
        "max_cached_buffers": 7,
    },
    SparseAttentionConfig: {
        "pattern_type": "local_window",
        "sparsity_ratio": 0.5,
        "block_size": 16,
        "enable_adaptive": True,
        "min_sparsity": 0.2,
        "max_sparsity": 0.5,
        "density": 0.5,
    },
    DistributedConfig: {
        "world_size": 2,
        "rank": 1,
        "backend": "gloo",
        "sequence_parallel": True,
        "model_parallel": True,
        "pipeline_parallel": True,
        "gradient_checkpointing": True,
        "communication_optimization": False,
        "bucket_size_mb": 5,
        "enable_async_communication": False,
        "gradient_compression_ratio": 0.5,
        "zero_stage": 3,
    },
}


def seen_of(kind, values, caplog):
    """All that a user sees of a layer made with these fields: the layer, or the error, and what is logged."""
    caplog.clear()
    torch.manual_seed(0)
    options = {} if kind in (MultiheadConfig, DistributedConfig) else dict(BLOCKS)
    config, sizes = kind(**{**(SIZES if kind is MultiheadConfig else options), **values}), MultiheadConfig(**SIZES)
    words = {"multihead_config": config if kind is MultiheadConfig else sizes}
    words["distributed_config" if kind is DistributedConfig else "attention_config"] = config
    if kind is MultiheadConfig:
        words["attention_config"] = DilatedAttentionConfig(**BLOCKS)
    try:
        layer = create_multihead_dilated_attention("auto", **words)
    except InvalidInput as error:
        return str(error)
    weights = [(x.device, x.dtype, None if x.is_meta else x.double().norm().item()) for x in layer.parameters()]
    inside = layer.attention
    return repr(layer), weights, inside.attention_dropout, inside.context_parallel, caplog.messages


FIELDS = [(kind, name) for kind, values in OTHER_VALUES.items() for name in values]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_field_is_stored_and_forgotten(kind, name, caplog, monkeypatch):
    assert set(OTHER_VALUES[kind]) == set(vars(kind)["__annotations__"]) - {"ADVICE"}  # all that are its own
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with caplog.at_level(logging.WARNING):
        assert seen_of(kind, {name: OTHER_VALUES[kind][name]}, caplog) != seen_of(kind, {}, caplog)
