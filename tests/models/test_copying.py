"""A model that starts copying looks for what followed the same tokens, before any training."""

import pytest
import torch

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.models import LongNetLM, LongNetLMConfig

LENGTH, FIRST, SECOND, RUN = 60, 10, 40, 6


def language_model(**options):
    torch.manual_seed(0)
    defaults = {"position": "none", "embedding_width": 6, "copying_start": True}
    return LongNetLM(50, 64, 4, 0, 2, 64, (128,), (1,), **{**defaults, **options}).eval()


def repeated_tokens():
    """Random tokens in which a run of RUN tokens stands at FIRST and again at SECOND."""
    x = torch.randint(50, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    x[:, SECOND : SECOND + RUN] = x[:, FIRST : FIRST + RUN]
    return x


def first_layer_weights(model, x):
    rows = model.convolution(model.embedding(x) * model.config.d_model**0.5)
    layer = model.decoder.layers[0]
    _, weights = layer.self_attn(layer.norm(rows), is_causal=True, need_weights=True, average_attn_weights=False)
    return weights  # (B, H, N, N)


@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_the_key_behind_the_same_tokens_gets_the_largest_weight(kv_heads):
    weights = first_layer_weights(language_model(num_kv_heads=kv_heads), repeated_tokens())
    row = weights[:, :, SECOND + RUN - 1]
    assert (row.argmax(-1) == FIRST + RUN).float().mean() >= 0.75  # a head of 16 dims may confuse codes
    assert row[..., FIRST + RUN].mean() > 0.3  # an even spread would give 0.02


def test_without_it_no_key_stands_out():
    weights = first_layer_weights(language_model(copying_start=False), repeated_tokens())
    assert (weights[:, :, SECOND + RUN - 1].argmax(-1) == FIRST + RUN).float().mean() < 0.5


def test_everything_stays_a_parameter():
    model = language_model()
    model(repeated_tokens()).sum().backward()
    first = model.decoder.layers[0].self_attn
    for parameter in (model.embedding.weight, model.convolution.taps, first.qkv_proj.weight):
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("values", [{"embedding_width": 1}, {"embedding_width": 4, "d_model": 33, "nhead": 3}])
def test_a_start_without_neighbours_or_halves_is_refused(values):
    with pytest.raises(InvalidInput, match="copying_start needs"):
        LongNetLMConfig(num_tokens=5, copying_start=True, **{"d_model": 32, "nhead": 4, "position": "none", **values})
