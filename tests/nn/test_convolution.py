"""The short convolution against loops, its documents and its start; the language model that reads through it."""

import pytest
import torch

from dilated_attention_pytorch import Documents, InvalidInput
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.nn import ShortConvolution


def by_loops(x, taps, starts):
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        first = max(s for s in starts if s <= t)
        for k in range(taps.shape[0]):
            if t - k >= first:
                y[:, t] += taps[k] * x[:, t - k]
    return y


@pytest.mark.parametrize("length", [1, 2, 3, 11])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_rows_are_weighted_sums_of_the_rows_before(length, width):
    convolution = ShortConvolution(4, width, dtype=torch.float64)
    x = torch.randn(2, length, 4, dtype=torch.float64)
    torch.testing.assert_close(convolution(x), by_loops(x, convolution.taps, [0]), rtol=0, atol=1e-14)


def test_documents_do_not_reach_into_each_other():
    convolution = ShortConvolution(4, 4, dtype=torch.float64)
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    found = convolution(x, Documents([2, 6, 3]))
    torch.testing.assert_close(found, by_loops(x, convolution.taps, [0, 2, 8]), rtol=0, atol=1e-14)


def test_taps_start_with_the_row_itself():
    torch.manual_seed(0)
    taps = ShortConvolution(4096, 4).taps
    assert torch.equal(taps[0], torch.ones(4096))
    assert abs(taps[1:].std().item() - 0.5) < 0.02


def test_a_width_below_one_is_refused():
    with pytest.raises(InvalidInput, match="width of at least 1"):
        ShortConvolution(4, 0)


def language_model(**options):
    torch.manual_seed(0)
    return LongNetLM(17, 32, 4, 0, 1, 48, (8, 24), (1, 3), dtype=torch.float64, embedding_width=3, **options).eval()


def test_a_packed_sample_equals_the_sample_alone():
    model, x = language_model(), torch.randint(17, (1, 30))
    packed = model(x, documents=Documents([12, 18]))
    torch.testing.assert_close(packed[:, 12:], model(x[:, 12:]), rtol=0, atol=1e-12)


def test_logits_depend_on_the_neighbours_and_never_on_later_tokens():
    model, x = language_model(position="none"), torch.randint(16, (1, 20))
    changed = x.clone()
    changed[0, 10] = 16
    same = (model(x) == model(changed)).all(-1)[0]
    assert same[:10].all()
    assert not same[10:13].any()  # token 10 is in the rows 10, 11 and 12


def test_a_truncated_cache_looks_back_on_what_is_left():
    model, x = language_model(), torch.randint(17, (2, 20))
    cache = model.new_cache()
    with torch.no_grad():
        model(x, cache=cache)
        cache.truncate(9)
        again = model(x[:, 9:], cache=cache)
        torch.testing.assert_close(again, model(x)[:, 9:], rtol=0, atol=1e-12)
        with pytest.raises(InvalidInput, match="holds 2 samples"):
            model(x[:1], cache=cache)
