"""Layers of one's own start from working ones, whose inputs are checked and whose caches are bounded."""

import copy
import pickle

import pytest
import torch

from dilated_attention_pytorch import DilatedAttention, InvalidInput, MultiheadDilatedAttention
from dilated_attention_pytorch.core import (
    BaseDilatedAttention,
    BaseMultiheadDilatedAttention,
    DilatedAttentionConfig,
    MultiheadConfig,
)

BRANCHES = DilatedAttentionConfig([16, 32], [1, 2])
SIZES = MultiheadConfig(32, 4, gamma_init=0.5)


class Shifted(BaseDilatedAttention):
    """A subclass as users write them: checked inputs, something cached, something of its own."""

    def forward(self, query, key, value, is_causal=False, attention_mask=None, **options):
        self._validate_forward_inputs(query, key, value, attention_mask)
        shift = self._cached(("shift", query.shape[1]), lambda: torch.ones(query.shape[1], 1, 1))
        return super().forward(query, key, value, is_causal, attention_mask, **options) + shift


class Multihead(BaseMultiheadDilatedAttention):
    def _create_attention_module(self):
        return Shifted(self.attention_config)


def heads(length=50):
    return torch.randn(2, length, 4, 8)


def test_the_base_is_the_layer_of_nn_made_of_a_config():
    q, k, v = heads(), heads(), heads()
    expected = DilatedAttention([16, 32], [1, 2])(q, k, v, is_causal=True)
    assert torch.equal(BaseDilatedAttention(BRANCHES)(q, k, v, is_causal=True), expected)
    assert torch.equal(Shifted(BRANCHES)(q, k, v, is_causal=True), expected + 1)
    layer = MultiheadDilatedAttention(32, 4, [1, 2], [16, 32], gamma_init=0.5, position="rotary")
    ours = BaseMultiheadDilatedAttention(SIZES, BRANCHES, position="rotary")
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 50, 32)
    assert torch.equal(ours(x), layer(x))
    assert (ours.multihead_config, ours.attention_config) == (SIZES, BRANCHES)


def test_weights_start_with_magneto_s_gain():
    torch.manual_seed(0)
    layer = BaseMultiheadDilatedAttention(MultiheadConfig(256, 4, gamma_init=0.5), BRANCHES)
    q, k, v = layer.qkv_proj.weight.chunk(3)
    unit = (2 / 512) ** 0.5  # Xavier's deviation at gain 1
    for weight, gain in ((q, 1), (k, 1), (v, 0.5), (layer.out_proj.weight, 0.5)):
        assert weight.std().item() == pytest.approx(gain * unit, rel=0.03)


@pytest.mark.parametrize("called", [False, True], ids=["before a forward", "after one"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(copier, called):
    layer, x = Multihead(SIZES, BRANCHES), torch.randn(2, 50, 32)
    if called:
        layer(x).sum().backward()
        assert len(layer.attention._cache) == 1
    twin = copier(layer)
    assert len(twin.attention._cache) == 0
    assert torch.equal(twin(x), layer(x))
    layer.attention.clear_cache()
    assert len(layer.attention._cache) == 0
    assert len(twin.attention._cache) == 1


def test_representations_show_the_configs():
    assert "segment_lengths=(16, 32), dilation_rates=(1, 2), dropout=0.0" in repr(BaseDilatedAttention(BRANCHES))
    text = repr(Multihead(SIZES, BRANCHES))
    assert "embed_dim=32, num_heads=4" in text
    assert "layer_norm=True, bias=True" in text


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((heads()[0], heads(), heads()), "query must be batch-first with 4 dims"),
        ((heads(), heads()[:1], heads()), "query and key must have the same size in dim 0: got 2 and 1"),
        ((heads(), heads(), heads(40)), "key and value must have the same size in dim 1: got 50 and 40"),
        ((heads(), heads()[..., :4], heads()), "query and key must have the same size in dim 3: got 8 and 4"),
        ((heads(), heads().double(), heads()), "query and key must have the same dtype"),
        ((heads(), heads()[:, :, :3], heads()[:, :, :3]), "query has 4 heads, which must be a multiple of key's 3"),
        ((heads(), heads(), heads(), torch.ones(3, 3)), "attention_mask must have shape"),
    ],
)
def test_heads_that_do_not_fit_are_refused(inputs, text):
    with pytest.raises(InvalidInput, match=text):
        BaseDilatedAttention(BRANCHES)._validate_forward_inputs(*inputs)


def test_heads_and_embeddings_that_fit_pass():
    layer, multihead = BaseDilatedAttention(BRANCHES), Multihead(SIZES, BRANCHES)
    layer._validate_forward_inputs(heads(30), heads()[:, :, :2], heads()[:, :, :2], torch.ones(30, 50))
    x = torch.zeros(2, 50, 32)
    multihead._validate_forward_inputs(x[:, :7], x, x, torch.zeros(2, 50, dtype=torch.bool))
    for inputs, text in (
        ((x[0],), "query must be batch-first with 3 dims"),
        ((x[..., :8],), r"query must have embed_dim \(32\) channels, got 8"),
        ((x, x, x[:, :7]), "key and value must have the same size in dim 1"),
        ((x, None, None, torch.zeros(2, 7)), r"key_padding_mask must have shape \(B, Nk\) = \(2, 50\)"),
    ):
        with pytest.raises(InvalidInput, match=text):
            multihead._validate_forward_inputs(*inputs)


def test_two_configs_name_one_dtype():
    double = DilatedAttentionConfig([16], [1], dtype="float64")
    assert BaseMultiheadDilatedAttention(MultiheadConfig(8, 2), double).qkv_proj.weight.dtype == torch.float64
    with pytest.raises(InvalidInput, match=r"dtype torch\.float32 and torch\.float64: give it in one"):
        BaseMultiheadDilatedAttention(MultiheadConfig(8, 2, dtype="float32"), double)
