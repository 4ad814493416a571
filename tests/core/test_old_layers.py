"""The layers of 0.1 and 0.2 are those of nn and models, with the old signatures and defaults."""

import inspect

import pytest
import torch

from dilated_attention_pytorch import Causal, ContextParallel, InvalidInput, longnet, nn, reference_attention
from dilated_attention_pytorch.core import layers
from dilated_attention_pytorch.core.layers import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingDistributedDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    DilatedAttention,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    DistributedMultiheadDilatedAttention,
    ImprovedDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    LongNet,
    LongNetLM,
    MultiheadDilatedAttention,
    RingDilatedAttention,
    RingMultiheadDilatedAttention,
    SparsePatternConfig,
)
from dilated_attention_pytorch.patterns import dilated_sparse, global_local, hierarchical, local_window
from parallel.worlds import run_world

SEGMENTS, RATES, LENGTH = [16, 32], [1, 2], 50
BLOCKS = SparsePatternConfig("dilated_sparse", 0.4, block_size=8)
HEADS = {
    "plain": lambda: DilatedAttention(SEGMENTS, RATES),
    "improved": lambda: ImprovedDilatedAttention(SEGMENTS, RATES, 0.0, True),
    "ring": lambda: RingDilatedAttention(SEGMENTS, RATES, 0.0, True, 16),
    "blocks": lambda: BlockSparseRingDilatedAttention(SEGMENTS, RATES, BLOCKS),
    "blocks, distributed": lambda: BlockSparseRingDistributedDilatedAttention(SEGMENTS, RATES, BLOCKS),
}
EMBEDDED = {
    "plain": lambda: MultiheadDilatedAttention(32, 4, RATES, SEGMENTS),
    "improved": lambda: ImprovedMultiheadDilatedAttention(32, 4, RATES, SEGMENTS),
    "ring": lambda: RingMultiheadDilatedAttention(32, 4, SEGMENTS, RATES),
    "distributed": lambda: DistributedMultiheadDilatedAttention(32, 4, RATES, SEGMENTS),
    "blocks": lambda: BlockSparseRingMultiheadDilatedAttention(32, 4, SEGMENTS, RATES, BLOCKS),
}


def pattern_of(kind: str):
    if kind.startswith("blocks"):
        return dilated_sparse(LENGTH, block_size=8, density=0.4, dilation_rates=RATES)
    return longnet(SEGMENTS, RATES)


@pytest.mark.parametrize("kind", HEADS)
def test_layers_of_heads_compute_the_definition_twice_forward_and_backward(kind: str) -> None:
    torch.manual_seed(0)
    layer, rows = HEADS[kind](), [torch.randn(1, LENGTH, 4, 8, requires_grad=True) for _ in range(3)]
    expected, _ = reference_attention(*rows, pattern_of(kind) & Causal())
    wanted = torch.autograd.grad(expected.sum(), rows)
    for _ in range(2):
        out = layer(*rows, is_causal=True)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), rows), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_multihead_layers_project_the_definition(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = EMBEDDED[kind](), torch.randn(2, LENGTH, 32)
    q, k, v = (y.unflatten(-1, (4, 8)) for y in layer.qkv_proj(x).chunk(3, -1))
    heads = reference_attention(q, k, v, pattern_of(kind))[0].float().flatten(2)
    expected = layer.out_proj(heads if layer.norm is None else layer.norm(heads))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    gradient = torch.autograd.grad(layer(x).square().sum(), layer.qkv_proj.weight)[0]
    wanted = torch.autograd.grad(expected.square().sum(), layer.qkv_proj.weight)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)
    assert (layer.norm is None) == (kind == "blocks")


def with_masks() -> dict[str, list[torch.Tensor]]:
    """What every layer gives for masks, padding and weights, of the same numbers; and those of nn with blocks."""
    torch.manual_seed(0)
    rows, x = [torch.randn(2, LENGTH, 4, 8) for _ in range(3)], torch.randn(2, LENGTH, 32)
    hidden = torch.rand(LENGTH, LENGTH) < 0.4
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 11]])
    table = BLOCKS.make_table(SEGMENTS, RATES)
    found = {}
    for kind, make in {**HEADS, "blocks of nn": lambda: nn.BlockSparseAttention(**table)}.items():
        layer = make()
        found[kind] = [*layer(*rows, attention_mask=~hidden, need_weights=True)]
        found[kind] += layer(*rows, True, (~hidden).float().log(), key_padding_mask=padding, need_weights=True)
    twin = {"blocks of nn": lambda: nn.MultiheadBlockSparseAttention(32, 4, layer_norm=False, **table)}
    for kind, make in {**EMBEDDED, **twin}.items():
        torch.manual_seed(1)
        layer, ends = make(), []
        added = torch.rand(8, LENGTH, LENGTH)
        for masks in ({"attn_mask": hidden}, {"attn_mask": added}, {"key_padding_mask": padding}):
            ends += layer(x, is_causal=True, need_weights=True, **masks)
            ends += layer(x, need_weights=True, average_attn_weights=False, **masks)
        ends.append(layer(x, key_padding_mask=padding, attn_mask=added))
        ends.append(layer(x, attn_mask=added.masked_fill(padding.repeat_interleave(4, 0).unsqueeze(1), -torch.inf)))
        found[f"embedded {kind}"] = ends
    return found


def test_on_one_process_and_in_a_group_of_one_every_layer_has_masks_and_weights() -> None:
    alone = with_masks()
    (grouped,) = run_world(1, with_masks)
    for kind, ends in alone.items():
        embedded = "embedded " if kind.startswith("embedded") else ""
        plain = alone[embedded + ("blocks of nn" if "blocks" in kind else "plain")]
        for found, there, expected in zip(ends, grouped[kind], plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(there, expected, rtol=0, atol=1e-6)
    for ends in (ends for kind, ends in alone.items() if "embedded" in kind):  # padding joined with a mask is -inf
        torch.testing.assert_close(ends[-1], ends[-2], rtol=0, atol=1e-6)
    mean, each = alone["embedded ring"][1], alone["embedded ring"][3]
    assert (mean.shape, each.shape) == ((2, LENGTH, LENGTH), (2, 4, LENGTH, LENGTH))


def test_two_processes_give_what_one_does() -> None:
    # A shard of each rank, on a ring of two; `unshard` joins them.
    def work():
        ends = {}
        for kind, make in {**HEADS, **{f"embedded {k}": v for k, v in EMBEDDED.items()}}.items():
            if kind.endswith(("plain", "improved")):
                continue
            torch.manual_seed(1)
            layer = make()
            rows = [torch.randn(1, LENGTH, 32) for _ in range(3)]
            shards = [ContextParallel().shard(x) for x in rows]
            if not kind.startswith("embedded"):
                shards = [x.unflatten(-1, (4, 8)).requires_grad_() for x in shards]
            for _ in range(2):
                out = layer(*shards, is_causal=True)
                if out.requires_grad:
                    out.sum().backward()
            ends[kind] = ContextParallel().unshard(out.detach()), [x.detach() for x in rows]
        return ends

    first, second = run_world(2, work)
    for kind, (out, rows) in first.items():
        assert torch.equal(out, second[kind][0])
        torch.manual_seed(1)
        layer = EMBEDDED[kind.removeprefix("embedded ")]() if kind.startswith("embedded") else HEADS[kind]()
        whole = rows if kind.startswith("embedded") else [x.unflatten(-1, (4, 8)) for x in rows]
        torch.testing.assert_close(out, layer(*whole, is_causal=True).detach(), rtol=0, atol=1e-5)


SIGNATURES = {
    DilatedAttention: "segment_lengths dilation_rates softmax_scale attention_dropout op",
    MultiheadDilatedAttention: "embed_dim num_heads dilation_rates segment_lengths dropout bias layer_norm "
    "layer_norm_eps gamma_init device dtype op",
    ImprovedDilatedAttention: "segment_lengths dilation_rates dropout use_tf32",
    ImprovedMultiheadDilatedAttention: "embed_dim num_heads dilation_rates segment_lengths dropout bias layer_norm "
    "layer_norm_eps gamma_init device dtype use_tf32",
    RingDilatedAttention: "segment_lengths dilation_rates dropout use_tf32 block_size ring_size use_checkpointing "
    "device dtype",
    RingMultiheadDilatedAttention: "embed_dim num_heads segment_lengths dilation_rates dropout bias layer_norm "
    "layer_norm_eps gamma_init block_size ring_size use_checkpointing use_tf32 use_flash_attention compile_model "
    "device dtype",
    DistributedMultiheadDilatedAttention: "embed_dim num_heads dilation_rates segment_lengths dropout op",
    BlockSparseRingDilatedAttention: "segment_lengths dilation_rates sparse_config use_adaptive_sparsity",
    BlockSparseRingDistributedDilatedAttention: "segment_lengths dilation_rates distributed_config",
    BlockSparseRingMultiheadDilatedAttention: "embed_dim num_heads segment_lengths dilation_rates sparse_config "
    "dropout bias batch_first use_adaptive_sparsity ring_size device dtype",
    SparsePatternConfig: "pattern_type sparsity_ratio block_size local_window_size global_tokens adaptation_rate "
    "min_sparsity max_sparsity density",
    DilatedTransformerEncoderLayer: "d_model nhead segment_lengths dilation_rates dim_feedforward dropout activation "
    "layer_norm_eps gamma_init device dtype",
    DilatedTransformerDecoderLayer: "d_model nhead segment_lengths dilation_rates dim_feedforward dropout activation "
    "layer_norm_eps gamma_init device dtype",
    LongNet: "d_model nhead num_encoder_layers num_decoder_layers dim_feedforward segment_lengths dilation_rates "
    "dropout activation layer_norm_eps device dtype",
    LongNetLM: "num_tokens d_model nhead num_encoder_layers num_decoder_layers dim_feedforward segment_lengths "
    "dilation_rates dropout activation layer_norm_eps device dtype",
}


@pytest.mark.parametrize("name", layers.__all__)
def test_positional_signatures_are_those_of_old(name: str) -> None:
    kind = getattr(layers, name)
    parameters = inspect.signature(kind).parameters.values()
    assert " ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD) == SIGNATURES[kind]
    assert set(SIGNATURES) == {getattr(layers, other) for other in layers.__all__}


def test_need_weights_gives_the_mean_over_heads_or_each() -> None:
    torch.manual_seed(0)
    layer, x = EMBEDDED["improved"](), torch.randn(2, LENGTH, 32)
    out, mean = layer(x, need_weights=True)
    _, each = layer(x, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(each.mean(1), mean)
    torch.testing.assert_close(each.sum(-1), torch.ones(2, 4, LENGTH), rtol=0, atol=1e-5)
    assert isinstance(layer(x), torch.Tensor)


def test_weights_of_too_many_tokens_are_refused_with_the_way_to_chosen_rows(monkeypatch) -> None:
    long = torch.empty(1, 8193, 32, device="meta")
    meta = ImprovedMultiheadDilatedAttention(32, 4, RATES, SEGMENTS, device="meta")
    with pytest.raises(InvalidInput, match=r"8193 queries.*query_start=i"):
        meta(long, need_weights=True)
    monkeypatch.setattr(nn.base, "WEIGHTS_LIMIT", 20)
    torch.manual_seed(0)
    layer, x = EMBEDDED["improved"](), torch.randn(2, LENGTH, 32)
    with pytest.raises(InvalidInput, match="chosen rows, up to 8 at once"):
        layer(x, need_weights=True)
    out, weights = layer(x[:, 10:18], x, x, query_start=10, need_weights=True, is_causal=True)  # in parts of 8 columns
    torch.testing.assert_close(out, layer(x, is_causal=True)[:, 10:18], rtol=0, atol=1e-5)
    monkeypatch.setattr(nn.base, "WEIGHTS_LIMIT", 8192)
    torch.testing.assert_close(weights, layer(x, need_weights=True, is_causal=True)[1][:, 10:18], rtol=0, atol=1e-6)


def test_sparse_configs_say_which_blocks() -> None:
    for config, table in (
        (SparsePatternConfig(block_size=8), dilated_sparse(96, block_size=8, density=0.25, dilation_rates=RATES)),
        (SparsePatternConfig("local_window", None, 8, 16), local_window(96, block_size=8, window=16)),
        (SparsePatternConfig("local_window", block_size=8, density=0.5), local_window(96, block_size=8, density=0.5)),
        (
            SparsePatternConfig("global_local", 0.5, 8, global_tokens=12),
            global_local(96, block_size=8, density=0.5, global_blocks=2),
        ),
        (SparsePatternConfig("hierarchical", 0.5, 8), hierarchical(96, block_size=8, density=0.5)),
    ):
        layer = BlockSparseRingDilatedAttention(SEGMENTS, RATES, config)
        x = torch.empty(1, 96, 2, 4)
        assert torch.equal(layer.choose_pattern(x, x, False, None).layout, table.layout)


REFUSED = [
    (lambda: SparsePatternConfig("adaptive"), "AdaptiveSparseAttention"),
    (lambda: SparsePatternConfig(sparsity_ratio=0.99), "share of blocks kept.*share dropped"),
    (lambda: SparsePatternConfig("axial", None), "has no window"),
    (lambda: SparsePatternConfig(block_size=0), "block_size"),
    (lambda: SparsePatternConfig(adaptation_rate=0.5), "adaptation_rate=0.1"),
    (lambda: BlockSparseRingDilatedAttention(SEGMENTS, RATES, BLOCKS, True), "create_adaptive_sparse_attention"),
    (lambda: BlockSparseRingDilatedAttention(SEGMENTS, RATES, {"block_size": 8}), "SparsePatternConfig. Got dict"),
    (lambda: BlockSparseRingDilatedAttention(SEGMENTS, [1]), "same length"),
    (lambda: BlockSparseRingMultiheadDilatedAttention(32, 4, batch_first=False), "transpose"),
    (lambda: RingMultiheadDilatedAttention(32, 4, SEGMENTS, RATES, compile_model=True), "torch.compile"),
    (lambda: RingMultiheadDilatedAttention(32, 4, SEGMENTS, RATES, use_flash_attention=False), "op="),
    (lambda: RingDilatedAttention(SEGMENTS, RATES, ring_size=4), "ring_size"),
    (lambda: RingDilatedAttention(SEGMENTS, RATES, block_size=0), "block_size"),
    (lambda: RingMultiheadDilatedAttention(32, 4, SEGMENTS, RATES, use_tf32=None), "use_tf32 must be True or False"),
    (lambda: SparsePatternConfig.from_dict({"density": 0.5, "patterns": 1}), "has no field 'patterns'"),
    (lambda: ImprovedDilatedAttention(SEGMENTS, RATES, op="nonsense"), "nonsense"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_the_way_to_mend_it(make, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_layers_over_ranks_wait_for_the_process_group_that_torchrun_promised(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for kind in ("ring", "distributed", "blocks"):
        with pytest.raises(InvalidInput, match="init_process_group before"):
            EMBEDDED[kind]()
    assert RingDilatedAttention(SEGMENTS, RATES, context_parallel=ContextParallel()).context_parallel.method == "auto"
    assert EMBEDDED["improved"]().attention.context_parallel is None


def test_a_layer_without_parameters_says_that_it_has_no_device_or_dtype(caplog) -> None:
    RingDilatedAttention(SEGMENTS, RATES, device="meta", dtype=torch.float64)
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" changes nothing")[0] for text in told] == [
        "RingDilatedAttention: device=meta",
        "RingDilatedAttention: dtype=torch.float64",
    ]
