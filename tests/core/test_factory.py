"""Each kind makes the layer that it names, on one process and on two; what is not understood is named."""

import copy
import logging
import os
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    DilatedAttention,
    InvalidInput,
    MultiheadAdaptiveSparseAttention,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
)
from dilated_attention_pytorch.core import (
    BaseDilatedAttention,
    BaseMultiheadDilatedAttention,
    DilatedAttentionConfig,
    DistributedConfig,
    MultiheadConfig,
    RingAttentionConfig,
    SparseAttentionConfig,
    create_adaptive_sparse_attention,
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    factory,
    register_attention,
    register_multihead_attention,
)
from dilated_attention_pytorch.core.sparse import MassBetween, global_and_random, square_axial
from dilated_attention_pytorch.parallel import ContextParallel
from dilated_attention_pytorch.patterns import global_local, random_blocks
from dilated_attention_pytorch.selection import Gate, Mass, MeanPooled, Selector, TopBlocks
from parallel.worlds import run_world

BRANCHES = {"segment_lengths": [32, 64], "dilation_rates": [1, 2]}
SPARSE = {**BRANCHES, "block_size": 16, "sparsity_ratio": 0.5}
TABLE = {"kind": "dilated_sparse", "block_size": 16, "density": 0.5, "dilation_rates": (1, 2)}
KINDS = ("auto", "standard", "improved", "ring", "distributed", "block_sparse")
OLD_KINDS = ("ring_distributed", "improved_distributed", "block_sparse_ring", "block_sparse_ring_distributed")


def options_of(kind):
    return SPARSE if kind.startswith("block_sparse") else BRANCHES


def named_layer(kind):
    if kind.startswith("block_sparse"):
        return BlockSparseAttention(**TABLE), MultiheadBlockSparseAttention(32, 4, **TABLE)
    op = ("sdpa", "dense") if kind == "standard" else None
    return DilatedAttention(**BRANCHES, op=op), MultiheadDilatedAttention(32, 4, **BRANCHES, op=op)


def outcome(layer, x):
    """Output and gradients of two passes, one after the other."""
    found = []
    for _ in range(2):
        x = x.detach().requires_grad_()
        out = layer(*(x,) * (3 if x.dim() == 4 else 1), is_causal=True)
        out.square().sum().backward()
        found += [out.detach(), x.grad]
    return found


@pytest.mark.parametrize("kind", [*KINDS, *OLD_KINDS])
def test_a_kind_is_the_layer_that_it_names(kind):
    heads, embeddings = torch.randn(1, 100, 4, 8), torch.randn(2, 100, 32)
    plain, projected = named_layer(kind)
    ours = create_dilated_attention(kind, **options_of(kind))
    assert type(ours) is type(plain)
    assert ours.backend == plain.backend
    for a, b in zip(outcome(ours, heads), outcome(plain, heads)):
        assert torch.equal(a, b)
    ours = create_multihead_dilated_attention(kind, 32, 4, **options_of(kind))
    assert type(ours) is type(projected)
    ours.load_state_dict(projected.state_dict())
    for a, b in zip(outcome(ours, embeddings), outcome(projected, embeddings)):
        assert torch.equal(a, b)
    hidden = torch.rand(100, 100) < 0.5
    for a, b in zip(*(layer(embeddings, need_weights=True, attn_mask=hidden) for layer in (ours, projected))):
        assert torch.equal(a, b)


def test_defaults_are_those_of_0_2():
    layer = create_multihead_dilated_attention()
    assert (layer.embed_dim, layer.num_heads) == (768, 12)
    for attention in (layer.attention, create_dilated_attention()):
        assert (attention.segment_lengths, attention.dilation_rates) == ((2048, 4096, 8192), (1, 2, 4))
    assert create_dilated_attention(attention_type="standard").backend == ("sdpa", "dense")
    assert create_multihead_dilated_attention(attention_type="standard", embed_dim=8, num_heads=2).num_heads == 2
    assert create_block_sparse_attention().attention.options["density"] == 0.1


def test_standard_computes_what_fused_kernels_cannot_by_matrix_products():
    x, hidden = torch.randn(1, 40, 32), torch.rand(40, 40) < 0.5
    for options, call in (({}, {"attn_mask": hidden}), ({"position": "alibi"}, {})):
        layer = create_multihead_dilated_attention("standard", 32, 4, **BRANCHES, **options)
        twin = create_multihead_dilated_attention("improved", 32, 4, **BRANCHES, **options, op="dense")
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x, **call), twin(x, **call))
    layer = create_multihead_dilated_attention("standard", 32, 4, **BRANCHES, dropout=0.5)
    assert not torch.equal(layer(x), layer(x))


def test_auto_says_what_it_chose_and_why(caplog):
    with caplog.at_level(logging.INFO, logger=factory.__name__):
        assert type(create_dilated_attention()) is DilatedAttention
        assert type(create_dilated_attention(density=0.5)) is BlockSparseAttention
        create_multihead_dilated_attention(attention_config=RingAttentionConfig([4], [1]))
        create_multihead_dilated_attention(attention_config=SparseAttentionConfig([4], [1]))
        dealt = create_dilated_attention(distributed_config=DistributedConfig(sequence_parallel=True))
        assert dealt.context_parallel == ContextParallel()
    told = [r.getMessage() for r in caplog.records if "auto is" in r.getMessage()]
    assert [text.split(": ", 2)[1] for text in told] == [
        "auto is 'improved'",
        "auto is 'block_sparse'",
        "auto is 'ring'",
        "auto is 'block_sparse'",
        "auto is 'distributed'",
    ]
    assert "there is one process" in told[0]


def test_options_reach_the_layer():
    layer = create_multihead_dilated_attention(
        "improved",
        32,
        4,
        **BRANCHES,
        dropout=0.1,
        bias=False,
        layer_norm=False,
        gamma_init=0.5,
        dtype=torch.float64,
        position="rotary",
        num_kv_heads=2,
        head_groups=True,
        op="dense",
    )
    assert (layer.attention.attention_dropout, layer.qkv_proj.bias, layer.norm, layer.gamma_init) == (
        0.1,
        None,
        None,
        0.5,
    )
    assert (layer.qkv_proj.weight.dtype, layer.position, layer.num_kv_heads) == (torch.float64, "rotary", 2)
    assert layer.attention.backend == "dense"
    assert layer.attention.pattern == DilatedAttention(**BRANCHES, head_groups=True).pattern
    attention = create_dilated_attention("ring", **BRANCHES, softmax_scale=0.5, attention_dropout=0.2)
    assert (attention.softmax_scale, attention.attention_dropout) == (0.5, 0.2)
    context = ContextParallel(layout="zigzag")
    assert create_dilated_attention("improved", context_parallel=context).context_parallel is context


def test_configs_say_the_same_as_options():
    sizes = MultiheadConfig(32, 4, bias=False, dtype="float64")
    branches = DilatedAttentionConfig([32, 64], [1, 2], dropout=0.1)
    for kind in KINDS:  # plain branches serve every kind
        layer = create_multihead_dilated_attention(kind, multihead_config=sizes, attention_config=branches)
        assert (layer.embed_dim, layer.qkv_proj.bias, layer.qkv_proj.weight.dtype) == (32, None, torch.float64)
        assert layer.attention.attention_dropout == 0.1
    layer = create_multihead_dilated_attention(
        multihead_config=sizes, attention_config=branches, dropout=0.1, bias=False
    )
    assert layer.attention.segment_lengths == (32, 64)
    assert create_dilated_attention("ring", attention_config=RingAttentionConfig([8], [1])).segment_lengths == (8,)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: create_dilated_attention("rings"), "there is no kind 'rings'; did you mean 'ring'"),
        (lambda: create_dilated_attention("ring", attention_type="improved"), "are one option"),
        (lambda: create_dilated_attention("ring", ringsize=2), "has no option 'ringsize'; did you mean 'ring_size'"),
        (lambda: create_dilated_attention("improved", ring_size=1), "kind 'improved' has no option 'ring_size'"),
        (lambda: create_dilated_attention("standard", op="dense"), "kind 'standard' has no option 'op'"),
        (lambda: create_dilated_attention(dtype="float32"), "without parameters has no dtype"),
        (lambda: create_dilated_attention(dropout=0.1, attention_dropout=0.1), "are one option"),
        (lambda: create_dilated_attention("ring", ring_size=2), "ring_size=2: this process is one of 1"),
        (lambda: create_dilated_attention([32], [1]), r"the kind comes first, such as 'auto'. Got \[32\]"),
        (lambda: create_multihead_dilated_attention("improved", 768, 13), r"Got head_dim=59.08"),
        (lambda: create_multihead_dilated_attention(segment_lengths=[4, 8, 16], dilation_rates=[1, 2]), "got 3 and 2"),
        (lambda: create_multihead_dilated_attention(positions="rotary"), "did you mean 'position'"),
        (lambda: create_multihead_dilated_attention(layernorm=True), "did you mean 'layer_norm'"),
        (
            lambda: create_multihead_dilated_attention(embed_dim=96, multihead_config=MultiheadConfig(32, 4)),
            "got embed_dim=96 and multihead_config.embed_dim=32: say it in one place",
        ),
        (
            lambda: create_multihead_dilated_attention(attention_config=DilatedAttentionConfig([4], [1]), dropout=0.1),
            "got dropout=0.1 and attention_config.dropout=0.0",
        ),
        (
            lambda: create_multihead_dilated_attention("improved", attention_config=RingAttentionConfig([4], [1])),
            "kind 'improved' is made of a DilatedAttentionConfig. Got RingAttentionConfig",
        ),
        (
            lambda: create_multihead_dilated_attention(
                multihead_config=MultiheadConfig(8, 2, dtype="float32"),
                attention_config=DilatedAttentionConfig([4], [1], dtype="float64"),
            ),
            "give it in one",
        ),
        (
            lambda: create_dilated_attention("improved", distributed_config=DistributedConfig(sequence_parallel=True)),
            "kind 'improved' does not",
        ),
        (
            lambda: create_dilated_attention(distributed_config=DistributedConfig(zero_stage=3)),
            "no layer's",
        ),
        (lambda: create_dilated_attention(distributed_config={}), "must be a DistributedConfig"),
        (lambda: create_block_sparse_attention(1.0), "the share dropped in create_block_sparse_attention"),
        (lambda: create_block_sparse_attention(0.5, density=0.25), "leave one out"),
        (lambda: create_block_sparse_attention(pattern_type="windows"), "pattern_type must be one of"),
        (
            lambda: create_block_sparse_attention(attention_config=SparseAttentionConfig([4], [1])),
            "leave attention_config",
        ),
        (lambda: create_adaptive_sparse_attention(min_sparsity=1.0), "a share of blocks dropped"),
        (lambda: create_adaptive_sparse_attention(pattern_type="axial"), "is a fixed table"),
        (lambda: create_dilated_attention("block_sparse", pattern_type="learned"), "give num_heads= and head_dim="),
        (lambda: create_dilated_attention("block_sparse", seeds=1), "did you mean 'seed'"),
    ],
)
def test_what_is_not_understood_is_named(make, text):
    with pytest.raises(InvalidInput, match=text):
        make()


def test_torchrun_without_a_process_group_is_an_error_not_a_local_layer(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInput, match="init_process_group before"):
        create_dilated_attention("ring")
    assert create_dilated_attention("improved").context_parallel is None


@pytest.mark.parametrize(
    "pattern_type", ["dilated_sparse", "local_window", "global_local", "axial", "random", "hybrid"]
)
def test_every_pattern_type_is_a_table_of_the_share_kept(pattern_type):
    size = 2 if pattern_type == "axial" else 8  # blocks of most of a row would meet every column
    layer = create_block_sparse_attention(0.7, pattern_type, 32, 4, block_size=size)
    q = torch.randn(1, 144, 4, 8)
    assert layer.attention.choose_pattern(q, q, False, None).density == pytest.approx(0.3, abs=0.09)
    outcome(layer, torch.randn(1, 144, 32))
    twin = create_block_sparse_attention(
        pattern_type=pattern_type, embed_dim=32, num_heads=4, density=0.3, block_size=size
    )
    assert twin.attention.options == layer.attention.options


def test_one_name_means_kept_in_the_config_and_dropped_in_the_factory():
    kept = create_multihead_dilated_attention("block_sparse", 32, 4, sparsity_ratio=0.2)
    dropped = create_block_sparse_attention(0.2, embed_dim=32, num_heads=4)
    assert (kept.attention.options["density"], dropped.attention.options["density"]) == (0.2, 0.8)
    assert "share kept" in create_multihead_dilated_attention.__doc__
    assert "share of blocks DROPPED" in create_block_sparse_attention.__doc__
    assert "share of blocks KEPT" in SparseAttentionConfig.__doc__


def test_builders_of_two_tables_and_of_squares():
    half = {"block_size": 8, "density": 0.1}
    joined = global_and_random(160, block_size=8, density=0.2, seed=3).layout.bool()
    assert torch.equal(
        joined, global_local(160, **half).layout.bool() | random_blocks(160, **half, seed=3).layout.bool()
    )
    assert square_axial(24, block_size=1, density=0.3).density == pytest.approx(0.3, abs=0.08)
    with pytest.raises(InvalidInput, match="13 tokens make no grid"):
        square_axial(13, block_size=1, density=0.5)


def test_adaptive_layers_choose_within_what_may_be_dropped():
    layer = create_adaptive_sparse_attention(32, 4, min_sparsity=0.25, max_sparsity=0.75, block_size=8)
    assert type(layer) is MultiheadAdaptiveSparseAttention
    assert layer.attention.budget == 0.75
    assert layer.attention.selector == Selector(MeanPooled(), MassBetween(0.95, 0.25), 8)
    outcome(layer, torch.randn(1, 128, 32))
    assert 0.1 < layer.attention.selected.density <= 0.75
    learned = create_adaptive_sparse_attention(32, 4, pattern_type="learned", density=0.5, dtype=torch.float64)
    assert learned.attention.budget == 0.5
    assert isinstance(learned.attention.selector.score, Gate)
    assert {p.dtype for p in learned.parameters()} == {torch.float64}
    heads = create_dilated_attention("block_sparse", enable_adaptive=True, sparsity_ratio=0.5, keep=2)
    assert (type(heads), heads.budget, heads.keep) == (AdaptiveSparseAttention, 0.5, 2)


def test_the_rule_between_two_shares_is_the_larger_choice():
    q, k = torch.randn(2, 1, 128, 2, 8)

    def chosen(rule, budget):
        return Selector(MeanPooled(), rule, 8)(q, k, budget).layout

    least, most = chosen(TopBlocks(), 0.25), chosen(TopBlocks(), 0.75)
    for gamma in (0.05, 0.5, 1.0):
        mass = chosen(Mass(gamma), 0.75)
        assert torch.equal(chosen(MassBetween(gamma, 0.25), 0.75), mass | least)
    assert torch.equal(chosen(MassBetween(0.01, 0.25), 0.75), least)
    assert torch.equal(chosen(MassBetween(1.0, 0.25), 0.75), most)


class Own(BaseDilatedAttention):
    pass


class OwnMultihead(BaseMultiheadDilatedAttention):
    pass


def test_users_register_layers_of_their_own(monkeypatch):
    monkeypatch.setattr(factory, "_ATTENTION", {})
    monkeypatch.setattr(factory, "_MULTIHEAD", {})
    register_attention("mine", Own, RingAttentionConfig)
    register_multihead_attention("multihead_mine", OwnMultihead)
    layer = create_dilated_attention("mine", **BRANCHES, ring_size=1, op="dense")
    assert (type(layer), layer.config.ring_size, layer.backend) == (Own, 1, "dense")
    layer = create_multihead_dilated_attention("mine", 32, 4, **BRANCHES, position="rotary", bias=False)
    assert (type(layer), layer.position, layer.multihead_config.bias) == (OwnMultihead, "rotary", False)
    with pytest.raises(InvalidInput, match="did you mean 'position'"):
        create_multihead_dilated_attention("mine", 32, 4, positions="rotary")
    with pytest.raises(InvalidInput, match="is a kind of this library"):
        register_attention("ring", Own)
    with pytest.raises(InvalidInput, match="expected a class"):
        register_attention("other", Own, dict)


def every_layer():
    """A layer of each kind of both factories, and of those with a pattern type, by name; equal weights every time."""
    ways = {
        "dropped": lambda: create_block_sparse_attention(0.5, "local_window", 32, 4, block_size=16),
        "dropped, over ranks": lambda: create_block_sparse_attention(
            0.5, "global_local", 32, 4, block_size=16, context_parallel=ContextParallel(layout="zigzag")
        ),
        "alibi, over ranks": lambda: create_multihead_dilated_attention(
            "standard", 32, 4, **BRANCHES, position="alibi", context_parallel=ContextParallel()
        ),
        "adaptive": lambda: create_adaptive_sparse_attention(32, 4, block_size=16),
        "learned": lambda: create_adaptive_sparse_attention(32, 4, pattern_type="learned", density=0.5, block_size=16),
    }
    for kind in (*KINDS, *OLD_KINDS):
        ways[kind] = partial(create_dilated_attention, kind, **options_of(kind))
        ways[f"multihead {kind}"] = partial(create_multihead_dilated_attention, kind, 32, 4, **options_of(kind))
    layers = {}
    for name, make in ways.items():
        torch.manual_seed(0)
        layers[name] = make()
    return layers


def context_of(layer):
    return getattr(layer, "attention", layer).context_parallel


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_every_layer_compute_the_same_before_a_forward_and_after(copier):
    heads, embeddings = torch.randn(1, 40, 4, 8), torch.randn(2, 40, 32)
    for name, layer in every_layer().items():
        rows = (embeddings,) if hasattr(layer, "attention") else (heads,) * 3
        before = copier(layer)
        out = layer(*rows, is_causal=True)
        for twin in (before, copier(layer)):
            assert torch.equal(twin(*rows, is_causal=True), out), name


def _on_two_ranks(heads, embeddings):
    """What this rank gets of each layer, joined; and what auto chose."""
    records = []
    logger = logging.getLogger(factory.__name__)
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found = {}
    for name, layer in every_layer().items():
        x, context = embeddings if hasattr(layer, "attention") else heads, context_of(layer)
        if context is None:
            found[name] = outcome(layer, x)
        else:
            found[name] = [context.unshard(piece) for piece in outcome(layer, context.shard(x))]
    methods = {name: context.method for name, layer in every_layer().items() if (context := context_of(layer))}
    ring = create_dilated_attention("auto", **BRANCHES, ring_size=2)
    assert (ring.context_parallel.method, create_dilated_attention().context_parallel.method) == ("ring", "auto")
    create_dilated_attention("ring", distributed_config=DistributedConfig(2, dist.get_rank(), sequence_parallel=True))
    with pytest.raises(InvalidInput, match="no rank holds"):
        create_dilated_attention("block_sparse_ring", enable_adaptive=True)
    return found, methods, [text for text in records if "auto is" in text]


@pytest.mark.skipif(os.name != "posix", reason="worlds are forked")
def test_on_two_processes_every_factory_and_kind_computes_the_same_twice():
    heads, embeddings = torch.randn(1, 100, 4, 8), torch.randn(2, 100, 32)
    (found, methods, told), (others, _, told_there) = run_world(2, _on_two_ranks, heads, embeddings)
    for name, layer in every_layer().items():
        expected = outcome(layer, embeddings if hasattr(layer, "attention") else heads)
        for a, b, right in zip(found[name], others[name], expected, strict=True):
            torch.testing.assert_close(a, right, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(a, b)
    rings, shares = ("ring", "ring_distributed", "block_sparse_ring"), ("auto", "distributed", "improved_distributed")
    expected = dict.fromkeys(rings, "ring") | dict.fromkeys((*shares, "block_sparse_ring_distributed"), "auto")
    expected |= {f"multihead {k}": v for k, v in expected.items()}
    assert methods == {**expected, "dropped, over ranks": "auto", "alibi, over ranks": "auto"}
    assert told == told_there
    assert "auto is 'distributed': the default process group has 2 ranks" in told[0]
    assert any("auto is 'ring'" in text for text in told)
