import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch import Documents, InvalidInput
from dilated_attention_pytorch.models import LongNet, LongNetEncoder, LongNetLM
from dilated_attention_pytorch.nn import KeyValueCache, encoder_decoder_gains, stack_gain

SMALL = {"dim_feedforward": 48, "segment_lengths": (8, 24), "dilation_rates": (1, 3), "dtype": torch.float64}


def language_model(seed=0, layers=2, **options):
    torch.manual_seed(seed)
    return LongNetLM(17, 32, 4, 0, layers, **{**SMALL, **options}).eval()


def encoder(**options):
    torch.manual_seed(0)
    return LongNetEncoder(32, 4, 2, **{**SMALL, **options}).eval()


def both(**options):
    torch.manual_seed(0)
    return LongNet(32, 4, 2, 2, **{**SMALL, **options}).eval()


def tokens(length=60, batch=2, seed=1):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))


def rows(length=40, seed=1):
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_other_rows(x, start, end=None):
    """``x`` with rows that differ by more than a LayerNorm takes away."""
    x = x.clone()
    x[:, start:end] = x[:, start:end].flip(-1)
    return x


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# LongNetLM


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_logits_are_embedding_blocks_and_head(tie_embeddings):
    model = language_model(tie_embeddings=tie_embeddings)
    hidden = model.decoder(model.embedding.weight[tokens()] * 32**0.5, is_causal=True)
    head = model.embedding.weight if tie_embeddings else model.head.weight
    close(model(tokens()), hidden @ head.T)
    assert ("head.weight" in dict(model.named_parameters())) is not tie_embeddings


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi"])
def test_logits_do_not_move_when_later_tokens_change(position):
    model, x = language_model(position=position), tokens()
    changed = x.clone()
    changed[:, 31:] = (changed[:, 31:] + 1) % 17
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :31], after[:, :31])
    assert (before[:, 31:] - after[:, 31:]).abs().amax((0, 2)).min() > 1e-3
    assert not torch.equal(model(x, is_causal=False)[:, :31], model(changed, is_causal=False)[:, :31])


def test_padded_and_packed_samples_equal_the_sample_alone():
    model, x = language_model(), tokens()
    padding = torch.arange(60) >= torch.tensor([[60], [37]])
    close(model(x, key_padding_mask=padding)[1, :37], model(x[1:, :37])[0])
    packed = model(x, documents=Documents([23, 37]))
    close(packed[:, 23:], model(x[:, 23:]))


def test_rotary_models_see_distances_only():
    model, x = language_model(), tokens()
    close(model(x, position_ids=torch.arange(60) + 10_000), model(x))
    assert not torch.allclose(model(x, position_ids=torch.arange(60).flip(0)), model(x))
    assert not torch.allclose(language_model(position="none")(x), model(x))


def test_layers_start_independently_with_magnetos_gain():
    model = LongNetLM(17, 128, 4, 0, 3, 256, [8], [1])
    first, second = (layer.self_attn.out_proj.weight for layer in model.decoder.layers[:2])
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(stack_gain(3) * (2 / 256) ** 0.5, rel=0.05)
    model = LongNet(128, 4, 3, 2, 256, [8], [1])
    gains = encoder_decoder_gains(3, 2)
    for stack, gain in zip((model.encoder, model.decoder), gains, strict=True):
        for layer in stack.layers:
            assert layer.self_attn.gamma_init == layer.feed_forward.gamma_init == gain


def test_second_forward_copies_and_pickles_agree():
    for model, x in ((language_model(), tokens()), (encoder(), rows()), (both(), rows())):
        first = model(x)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), first)


def test_a_few_steps_learn_a_repeated_text():
    model = language_model(dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x = tokens(20, batch=1).repeat(2, 3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.3


def test_checkpointed_activations_give_the_same_gradients():
    grads = []
    for checkpoint_activations in (False, True):
        model = language_model(checkpoint_activations=checkpoint_activations, dropout=0.2).train()
        torch.manual_seed(3)
        model(tokens()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_autocast_stays_near():
    model = language_model(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens())
    expected = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_graph_compiles_whole():
    model = language_model(layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = compiled(tokens()), model(tokens())
    close(got, expected)
    got.sum().backward()


def test_half_models_run():
    logits = language_model(dtype=torch.bfloat16)(tokens())
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


def test_base_model_has_the_size_of_the_paper():
    model = LongNetLM(64_000, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert 130e6 < count < 140e6  # 85M in 12 blocks, 49M in the table


def cached(**options):
    model = language_model()
    with torch.no_grad():
        return model(tokens(), cache=model.new_cache(), **options)


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (lambda: language_model()(tokens()[0]), r"tokens\[None\]"),
        (lambda: language_model()([[1, 2]]), "tensor"),
        (lambda: language_model()(tokens().float()), "int64"),
        (lambda: language_model()(tokens().byte()), r"\.long\(\)"),
        (lambda: language_model()(tokens() + 1), "from 0 to 16"),
        (lambda: language_model()(tokens() - 1), "from 0 to 16"),
        (lambda: language_model()(tokens(), key_padding_mask=torch.arange(60).expand(2, 60) < 3), "right"),
        (lambda: language_model(position="none")(tokens(), position_ids=torch.arange(60)), "no use"),
        (lambda: cached(is_causal=False), "causal"),
        (lambda: cached(documents=Documents([60])), "between cached rows"),
        (lambda: language_model()(tokens(), cache=KeyValueCache(2)), "no_grad"),
        (lambda: encoder()(rows()[0]), "d_model = 32"),
        (lambda: both()(rows(), True), "is_causal"),
        (lambda: both()(rows(), rows()[..., :4]), "tgt of shape"),
        (lambda: both()(rows(), tgt_key_padding_mask=torch.zeros(2, 40, dtype=torch.bool)), "leave out"),
    ],
)
def test_bad_calls_of_models(run, word):
    with pytest.raises(InvalidInput, match=word):
        run()


def test_empty_sequences_give_empty_results():
    assert language_model()(tokens(0)).shape == (2, 0, 17)
    assert encoder()(rows(0)).shape == (2, 0, 32)


# LongNetEncoder


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_a_padded_slide_equals_the_slide_alone(position):
    model, x = encoder(position=position), rows()
    padding = torch.arange(40) >= torch.tensor([[40], [27]])
    close(model(x, padding)[1, :27], model(x[1:, :27])[0])
    close(model(x, documents=Documents([27, 13]))[:, 27:], model(x[:, 27:]))


def test_an_encoder_sees_both_ways():
    model, x = encoder(), rows()
    changed = with_other_rows(x, 30, 31)
    assert (model(x) - model(changed))[:, 29].abs().max() > 1e-3
    assert torch.equal(model(x, is_causal=True)[:, :30], model(changed, is_causal=True)[:, :30])


# LongNet


def test_no_target_means_the_source():
    model, x = both(), rows()
    assert torch.equal(model(x), model(x, x))
    padding = torch.arange(40) >= torch.tensor([[40], [27]])
    same = {"src_key_padding_mask": padding, "tgt_key_padding_mask": padding}
    assert torch.equal(model(x, src_key_padding_mask=padding), model(x, x, **same))


@pytest.mark.parametrize("length", [7, 90])
def test_a_target_of_another_length(length):
    model, x, y = both(), rows(), rows(length, seed=2)
    out = model(x, y)
    memory = model.encoder(x)
    close(out, model.decoder(y, memory, is_causal=True))
    changed = with_other_rows(y, 5)
    assert torch.equal(model(x, changed)[:, :5], out[:, :5])
    assert not torch.equal(model(x, changed, is_causal=False)[:, :5], model(x, y, is_causal=False)[:, :5])


def test_every_target_row_sees_the_whole_source_unless_memory_is_causal():
    model, x, y = both(), rows(), rows(30, seed=2)
    changed = with_other_rows(x, 20)
    assert (model(x, y) - model(changed, y)).abs().amax((0, 2)).min() > 1e-6
    before, after = (model(src, y, memory_is_causal=True) for src in (x, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax((0, 2)).min() > 1e-6


def test_padding_of_source_and_target_is_not_seen():
    model, x, y = both(), rows(), rows(30, seed=2)
    src_padding = torch.arange(40) >= torch.tensor([[40], [27]])
    tgt_padding = torch.arange(30) >= torch.tensor([[30], [11]])
    out = model(x, y, is_causal=False, src_key_padding_mask=src_padding, tgt_key_padding_mask=tgt_padding)
    close(out[1, :11], model(x[1:, :27], y[1:, :11], is_causal=False)[0])


def test_dilated_cross_attention_differs_from_full():
    full, dilated = both(), both(cross_attention="longnet")
    dilated.load_state_dict(full.state_dict())
    assert not torch.allclose(full(rows()), dilated(rows()))
    changed = with_other_rows(rows(), 0, 1)
    memory_row = dilated.decoder.layers[0].cross_attn
    q = torch.zeros(2, 40, 32, dtype=torch.float64)
    moved = (memory_row(q, rows(), rows()) - memory_row(q, changed, changed)).abs().amax((0, 2))
    assert moved[:24].max() > 1e-6
    assert moved[24:].max() == 0
