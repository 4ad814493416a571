import pytest
import torch

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.models.generation import choose_token

LARGEST = 24


def language_model(**options):
    torch.manual_seed(0)
    defaults = {"segment_lengths": (8, LARGEST), "dilation_rates": (1, 3), "dtype": torch.float64}
    return LongNetLM(17, 32, 4, 0, 2, 48, **{**defaults, **options}).eval()


def tokens(length, batch=2):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"position": "rotary"},
        {"position": "xpos"},
        {"position": "alibi"},
        {"position": "none", "num_kv_heads": 1},
        {"segment_lengths": (10, 24), "position": "xpos"},
        {"head_groups": True, "head_offset": "torchscale"},
        {"embedding_width": 4, "position": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 13, 30])
def test_decoding_equals_prefill_past_three_largest_segments(options, prompt):
    model, x = language_model(**options), tokens(3 * LARGEST + 9)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(x[:, :prompt], cache=cache)]
        parts += [model(x[:, i : i + 1], cache=cache) for i in range(prompt, x.shape[1])]
        whole = model(x)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    assert cache.length == x.shape[1]


def test_generation_equals_prefill_at_every_step():
    model, prompt = language_model(), tokens(5)
    out = model.generate(prompt, 3 * LARGEST + 5, temperature=0.0)
    assert out.shape == (2, 5 + 3 * LARGEST + 5)
    assert torch.equal(out[:, :5], prompt)
    with torch.no_grad():
        expected = model(out)[:, 4:-1].argmax(-1)
    assert torch.equal(out[:, 5:], expected)
    assert len(out.unique()) > 2


def test_a_seed_makes_a_call_reproducible_and_leaves_the_global_generator_alone():
    model, prompt = language_model(), tokens(5)
    state = torch.get_rng_state()
    first = model.generate(prompt, 40, seed=7)
    model.generate(prompt, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(prompt, 40, seed=7), first)
    assert not torch.equal(model.generate(prompt, 40, seed=8), first)
    torch.manual_seed(0)
    unseeded = model.generate(prompt, 40)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(prompt, 40), unseeded)


def test_one_sample_without_a_batch_and_its_dtype():
    model, prompt = language_model(), tokens(5)[0].int()
    out = model.generate(prompt, 6, temperature=0.0)
    assert out.dtype == torch.int32
    assert out.shape == (11,)
    assert torch.equal(out, model.generate(prompt[None].long(), 6, temperature=0.0)[0].int())
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_stream_gets_every_token_as_it_comes():
    model, prompt, seen = language_model(), tokens(5), []
    out = model.generate(prompt, 9, seed=0, stream=seen.append)
    assert [t.shape for t in seen] == [(2,)] * 9
    assert torch.equal(torch.stack(seen, 1), out[:, 5:])


def test_rows_that_stopped_repeat_their_token_until_all_have():
    model, prompt = language_model(), tokens(5)
    free = model.generate(prompt, 60, seed=3)[:, 5:]
    stops = {int(free[0, 2]), int(free[1, 11])}
    ends = [next(i for i, t in enumerate(row.tolist()) if t in stops) for row in free]
    out = model.generate(prompt, 60, seed=3, stop=stops)[:, 5:]
    assert out.shape[1] == max(ends) + 1 < 60
    for row, other, end in zip(out, free, ends, strict=True):
        assert torch.equal(row[: end + 1], other[: end + 1])
        assert (row[end:] == row[end]).all()


def test_a_single_stop_token():
    model = language_model()
    free = model.generate(tokens(5, 1)[0], 20, temperature=0.0)[5:].tolist()
    out = model.generate(tokens(5, 1)[0], 20, temperature=0.0, stop=free[0])
    assert out.tolist()[5:] == free[:1]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_comes_back(training):
    model = language_model(dropout=0.5, attention_dropout=0.5).train(training)
    first = model.generate(tokens(5), 9, temperature=0.0)
    assert torch.equal(first, model.generate(tokens(5), 9, temperature=0.0))
    with pytest.raises(ZeroDivisionError):
        model.generate(tokens(5), 9, stream=lambda _: 1 / 0)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def frequencies(logits, draws=20_000, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    drawn = choose_token(logits.expand(draws, -1), generator=generator, **options)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / draws


LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_p": 0.65}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(options, expected):
    got = frequencies(LOGITS, **options)
    expected = torch.tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.015)
    assert not got[expected == 0].any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": 17}, "stop tokens from 0 to 16"),
        ({"stop": [3, -1]}, "stop tokens"),
        ({"stop": ["a"]}, "stop tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"prompt": [1, 2, 3]}, "tensor"),
        ({"prompt": tokens(0)}, "at least one token"),
        ({"prompt": tokens(3) + 17}, "from 0 to 16"),
        ({"prompt": tokens(3).float()}, "int64"),
    ],
)
def test_bad_numbers(options, word):
    with pytest.raises(InvalidInput, match=word):
        language_model().generate(**{"prompt": tokens(3), "max_new_tokens": 2, **options})
