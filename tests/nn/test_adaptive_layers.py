"""Adaptive layers against the reference and against the dilated layer with the same choice."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from small_layers import CHOOSER, adaptive, attended, close, dilated_twin, heads, rows
from torch import nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import Causal, Documents, Full, InvalidInput, Softcap, Window
from dilated_attention_pytorch.nn import (
    AdaptiveSparseAttention,
    LayerCache,
    MultiheadDilatedAttention,
)
from dilated_attention_pytorch.nn.adaptive import OVERLAPS_KEPT
from dilated_attention_pytorch.selection import (
    AdaptiveDilation,
    BlockScore,
    Gate,
    Mass,
    MeanPooled,
    SelectedTiles,
    Selector,
    TopBlocks,
    attend_with_coarse,
)

# Adaptive: heads


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [48, 21])
def test_adaptive_heads_attend_to_what_was_chosen(is_causal, queries):
    q, k, v = (x.requires_grad_() for x in heads(kv_heads=2, queries=queries))
    attention = AdaptiveSparseAttention(CHOOSER, 2, softmax_scale=0.3)
    out = attention(q, k, v, is_causal)
    chosen = CHOOSER(q, k, 2, Causal() if is_causal else Full(), scale=0.3)
    assert torch.equal(attention.selected.layout, chosen.layout)
    assert attention.selected.is_causal is is_causal
    assert chosen.density < 0.5
    expected = attended(chosen, q, k, v, scale=0.3)
    close(out, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_choice_knows_the_scale_of_the_logits():
    q, k, v = heads()
    by_mass = Selector(MeanPooled(), Mass(0.6), block_size=8)
    layouts = []
    for scale in (None, 3.0):
        attention = AdaptiveSparseAttention(by_mass, None, softmax_scale=scale)
        close(attention(q, k, v), attended(by_mass(q, k, scale=scale), q, k, v, scale=scale))
        layouts.append(attention.selected.layout)
    assert not torch.equal(*layouts)


def test_a_choice_is_made_within_the_pattern_of_the_layer():
    q, k, v = heads()
    attention = AdaptiveSparseAttention(CHOOSER, 2, pattern=Window(12))
    close(attention(q, k, v, True), attended(CHOOSER(q, k, 2, Window(12) & Causal()), q, k, v))
    _, weights = attention(q, k, v, True, need_weights=True)
    far = (torch.arange(48)[:, None] - torch.arange(48)).abs() >= 12
    assert not weights[..., far].any()
    close(weights.sum(-1), torch.ones(2, 4, 48, dtype=torch.float64))
    close(torch.einsum("bhij,bjhd->bihd", weights, v), attention(q, k, v, True))


def test_masks_bias_the_chosen_pairs_only():
    q, k, v = heads(24)
    bias = torch.randn(24, 24, dtype=torch.float64)
    attention = AdaptiveSparseAttention(CHOOSER, 2)
    close(attention(q, k, v, attention_mask=bias), attended(CHOOSER(q, k, 2), q, k, v, bias=bias))


def test_causal_rows_do_not_move_when_later_tokens_change():
    module, x = adaptive(position="rotary"), rows()
    before = module(x, is_causal=True)
    for cut in (1, 8, 21, 32):
        changed = x.clone()
        changed[:, cut:] += 3 * torch.randn_like(changed[:, cut:])
        after = module(changed, is_causal=True)
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert (before[:, cut:] - after[:, cut:]).abs().max() > 1e-3
    assert min(module.attention.overlaps) < 1  # the choice did change


def test_an_adaptive_padded_sample_equals_the_sample_alone():
    module, x = adaptive(position="rotary"), rows()
    padding = torch.arange(48) >= torch.tensor([[48], [29]])
    for is_causal in (False, True):
        padded = module(x, key_padding_mask=padding, is_causal=is_causal)[1, :29]
        close(padded, module(x[1:, :29], is_causal=is_causal)[0])


def test_documents_are_not_crossed():
    module, x = adaptive(budget=2), rows()
    changed = x.clone()
    changed[:, :16] += torch.randn_like(x[:, :16])
    for is_causal in (False, True):  # documents of whole blocks: the choice reads its own one only, too
        call = {"documents": Documents([16, 32]), "is_causal": is_causal}
        assert torch.equal(module(changed, **call)[:, 16:], module(x, **call)[:, 16:])
    call = {"documents": Documents([21, 27]), "is_causal": True}
    everything = adaptive(budget=1.0)
    close(everything(x, **call), dilated_twin(everything, Full())(x, **call))


def test_a_share_below_one_block_is_one_block():
    q, k, v = heads(20)
    attention = AdaptiveSparseAttention(CHOOSER, 0.01)
    close(attention(q, k, v, True), attended(CHOOSER(q, k, 1, Causal()), q, k, v))
    AdaptiveSparseAttention()(*heads(20))  # the default share of the default blocks, on a short input


# Adaptive: choices that are kept


@dataclass(eq=False)
class Counting:
    """A selector that counts its calls."""

    calls: int = 0
    block_size: int = 8

    def __call__(self, *arguments, **options):
        self.calls += 1
        return CHOOSER(*arguments, **options)


def test_a_choice_serves_as_many_calls_as_it_is_kept():
    counter = Counting()
    attention = AdaptiveSparseAttention(counter, 3, keep=3)
    first = heads()
    assert attention.selected is None
    for call in range(7):
        q, k, v = heads(seed=call)
        out = attention(q, k, v, True)
        assert counter.calls == call // 3 + 1
        close(out, attended(attention.selected, q, k, v))
        if call < 3:  # a constant, chosen from the first call's tokens
            assert torch.equal(attention.selected.layout, CHOOSER(first[0], first[1], 3, Causal()).layout)
    choices = [CHOOSER(*heads(seed=s)[:2], 3, Causal()) for s in (0, 3, 6)]
    assert list(attention.overlaps) == [choices[1].overlap(choices[0]), choices[2].overlap(choices[1])]
    assert 0 < attention.overlaps[0] < 1
    assert attention.overlaps.maxlen == OVERLAPS_KEPT
    attention.forget()
    attention(*heads(), True)
    assert counter.calls == 4
    assert len(attention.overlaps) == 2


class Interrupted(AdaptiveSparseAttention):
    """Another call is made whenever something is stored, as another thread may."""

    other = None

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if self.other is not None:
            other, type(self).other = self.other, None
            self.answers.append(self(*other, True))
            type(self).other = other


def test_a_call_between_another_s_stores_gets_its_own_choice(monkeypatch):
    short, long = heads(40), heads(48)
    attention = Interrupted(CHOOSER, 3, keep=4)
    attention.answers = []
    attention(*short, True)  # kept for such calls
    monkeypatch.setattr(Interrupted, "other", short)
    out = attention(*long, True)
    close(out, attended(CHOOSER(*long[:2], 3, Causal()), *long))
    assert attention.answers
    for answer in attention.answers:
        close(answer, attended(CHOOSER(*short[:2], 3, Causal()), *short))


def kept(**options):
    """A layer with a choice made for causal calls on `heads()`, and its counter."""
    counter = Counting()
    attention = AdaptiveSparseAttention(counter, 2, keep=100, **options)
    attention(*heads(), True)
    attention(*heads(), True)
    assert counter.calls == 1
    return attention, counter


def change_mode(attention):
    attention.eval()
    attention(*heads(), True)


def change_pattern(attention):
    attention.pattern = Window(9)
    attention(*heads(), True)


def change_budget(attention):
    attention.budget = 4
    attention(*heads(), True)


padded = torch.arange(48) >= torch.tensor([[48], [29]])


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a(*heads(), False),
        lambda a: a(*heads(47), True),
        lambda a: a(*heads(batch=1), True),
        lambda a: a(*heads(num_heads=2), True),
        lambda a: a(*heads(kv_heads=2), True),
        lambda a: a(*heads(queries=8), True),
        lambda a: a(*heads(), True, key_padding_mask=padded),
        lambda a: a(*heads(), True, documents=Documents([20, 28])),
        change_mode,
        change_pattern,
        change_budget,
    ],
)
def test_nothing_stale_is_used(change):
    attention, counter = kept()
    change(attention)
    assert counter.calls == 2


def test_a_choice_for_a_mask_or_for_documents_serves_the_same_ones_only():
    attention, counter = kept()
    for lengths, calls in (([20, 28], 2), ([20, 28], 2), ([21, 27], 3)):
        attention(*heads(), documents=Documents(lengths))
        assert counter.calls == calls
    mask = padded.clone()
    for end, calls in ((29, 4), (29, 4), (40, 5)):
        mask[1] = torch.arange(48) >= end  # the caller's own tensor, used again
        attention(*heads(), key_padding_mask=mask)
        assert counter.calls == calls


def test_a_refused_call_changes_nothing():
    attention, counter = kept()
    before = attention.selected
    q, k, v = heads(40)
    for call in (
        lambda: attention(q, k, v[:, :7], True),
        lambda: attention(q, k, v, True, torch.zeros(3, 3, dtype=torch.float64)),
        lambda: attention(q, k, v, True, selected=Window(4)),
    ):
        with pytest.raises(InvalidInput):
            call()
    assert attention.selected is before
    calls = counter.calls
    attention(*heads(), True)
    assert counter.calls == calls  # the choice from before still serves


def test_a_choice_can_be_shared_by_layers():
    first, second = (AdaptiveSparseAttention(Counting(), 2) for _ in range(2))
    q, k, v = heads()
    first(q, k, v)
    other = heads(seed=5)
    shared = SelectedTiles(first.selected.blocks, Causal())
    close(second(*other, True, selected=first.selected), attended(shared, *other))  # causal, though the first was not
    assert second.selector.calls == 0
    assert second.selected is None
    module = adaptive()
    out = module(rows(), is_causal=True, selected=first.selected)
    close(out, dilated_twin(module, shared)(rows()))
    assert module.attention.selected is None


def test_a_checkpointed_layer_uses_in_backward_what_it_used_in_forward():
    module, twin = (adaptive(Counting(), keep=3).train() for _ in range(2))
    for step in range(5):
        x = rows(seed=step)
        module.zero_grad()
        twin.zero_grad()
        checkpoint(module, x, is_causal=True, use_reentrant=False).square().sum().backward()
        twin(x, is_causal=True).square().sum().backward()
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert module.attention.selector.calls == 2
    assert list(module.attention.overlaps) == list(twin.attention.overlaps)
    assert len(module.attention.overlaps) == 1


def test_rates_are_shared_as_blocks_are():
    first = AdaptiveSparseAttention(AdaptiveDilation(8, max_rate=2, tau=2.0), 2)
    q, k, v = heads()
    first(q, k, v)
    assert set(first.selected.rates.unique().tolist()) == {1, 2}
    shared = Causal() & first.selected
    other = AdaptiveSparseAttention(CHOOSER, 2)
    close(other(q, k, v, True, selected=first.selected), attended(shared, q, k, v))
    close(other(q, k, v, True, selected=shared), attended(shared, q, k, v))
    first(*heads(seed=1))
    assert not first.overlaps  # rates are no table of blocks


# Adaptive: coarse levels


def test_coarse_layers_pool_what_was_not_chosen():
    q, k, v = heads(kv_heads=2)
    attention = AdaptiveSparseAttention(CHOOSER, 2, coarse=True, softmax_scale=0.3)
    padding = torch.arange(48) >= torch.tensor([[48], [29]])
    for is_causal in (False, True):
        out, weights = attention(q, k, v, is_causal, key_padding_mask=padding, need_weights=True)
        expected = attend_with_coarse(q, k, v, attention.selected, scale=0.3, key_padding_mask=padding)
        close(out, expected)
        close(weights.sum(-1), torch.ones(2, 4, 48, dtype=torch.float64))
        close(torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2)), expected)
        assert not weights[1, ..., 29:].any()
    assert (out - AdaptiveSparseAttention(CHOOSER, 2, softmax_scale=0.3)(q, k, v, True)).abs().max() > 0.01
    module, x = adaptive(coarse=True, position="rotary"), rows()
    before, changed = module(x, is_causal=True), x.clone()
    changed[:, 21:] += 1
    assert torch.equal(before[:, :21], module(changed, is_causal=True)[:, :21])


@pytest.mark.parametrize(
    "run",
    [
        lambda: AdaptiveSparseAttention(CHOOSER, 2, coarse=True, attention_dropout=0.1),
        lambda: AdaptiveSparseAttention(CHOOSER, 2, coarse=True, score=Softcap(5.0)),
        lambda: adaptive(coarse=True, position="alibi"),
        lambda: AdaptiveSparseAttention(CHOOSER, 2, coarse=True)(*heads(), attention_mask=torch.zeros(48, 48)),
        lambda: AdaptiveSparseAttention(AdaptiveDilation(8), 2, coarse=True)(*heads()),
    ],
)
def test_what_coarse_levels_do_not_go_with(run):
    with pytest.raises(InvalidInput, match="coarse levels"):
        run()


# Adaptive: what a layer holds


@dataclass(frozen=True)
class Held(BlockScore):
    """A score that holds a module."""

    gate: nn.Module

    def __call__(self, blocks):
        return self.gate(blocks)


@pytest.mark.parametrize(("score", "name"), [(Gate, "score"), (lambda *sizes: Held(Gate(*sizes)), "score_gate")])
def test_parameters_of_a_selector_are_the_layers(score, name):
    module = adaptive(Selector(score(4, 8), TopBlocks(), block_size=8))
    keys = set(module.state_dict())
    assert {f"attention.learned.{name}.query_weight", f"attention.learned.{name}.key_weight"} < keys
    assert keys - {k for k in keys if "learned" in k} == set(adaptive().state_dict())
    x = rows()
    module(x, is_causal=True).square().sum().backward()
    gate = module.attention.learned[name]
    assert gate.query_weight.grad is None  # only the gate's own loss moves it
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.attention.learned[name].query_weight.neg_()
    before, after = module(x, is_causal=True), clone(x, is_causal=True)
    assert not torch.allclose(before, after)  # the copy's selector reads the copy's gate
    clone.load_state_dict(module.state_dict())
    assert torch.equal(clone(x, is_causal=True), before)


def test_a_kept_choice_is_not_state():
    module = adaptive(keep=5)
    keys = set(module.state_dict())
    module(rows(), is_causal=True)
    assert set(module.state_dict()) == keys == set(dilated_twin(module, Full()).state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(rows(), is_causal=True), module(rows(), is_causal=True))


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi"])
def test_with_the_whole_budget_it_is_full_attention(position):
    module = adaptive(budget=1.0, position=position, num_kv_heads=2, max_length=60 if position == "xpos" else None)
    if position == "xpos":
        twin = MultiheadDilatedAttention(32, 4, [1], [60], position="xpos", num_kv_heads=2, dtype=torch.float64).eval()
        twin.load_state_dict(module.state_dict())
        with pytest.raises(InvalidInput, match="max_length"):
            adaptive(position="xpos")
        with pytest.raises(InvalidInput, match="max_length = 60"):
            module(rows(61))
    else:
        twin = dilated_twin(module, Full(), position=position, num_kv_heads=2)
    close(module(rows(), is_causal=True), twin(rows(), is_causal=True))
    for got, expected in zip(module(rows(), need_weights=True), twin(rows(), need_weights=True)):
        close(got, expected)


def test_adaptive_decoding_with_the_whole_budget_equals_prefill():
    module, x, cache, parts = adaptive(budget=1.0, position="rotary"), rows(), LayerCache(), []
    with torch.no_grad():
        for start, end in [(0, 7), (7, 8), (8, 48)]:
            parts.append(module(x[:, start:end], is_causal=True, cache=cache))
        close(torch.cat(parts, 1), module(x, is_causal=True))


def test_half_types_and_autocast():
    module, x = adaptive(position="rotary").float(), rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, is_causal=True)
    assert out.dtype == torch.bfloat16
    exact = module(x, is_causal=True, selected=module.attention.selected)
    assert (out - exact).abs().max() < 0.02 * exact.abs().max() + 0.02


def test_dropout_acts_in_training_only_on_chosen_pairs():
    q, k, v = heads()
    attention = AdaptiveSparseAttention(CHOOSER, 2, attention_dropout=0.5)
    plain = AdaptiveSparseAttention(CHOOSER, 2)(q, k, v)
    assert (attention(q, k, v) - plain).abs().max() > 0.1
    assert torch.equal(attention.eval()(q, k, v), plain)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"selector": "top"}, "Selector"),
        ({"budget": 0}, "at least 1"),
        ({"budget": 0.0}, r"\(0, 1\]"),
        ({"budget": float("nan")}, r"\(0, 1\]"),
        ({"budget": 1.5}, r"\(0, 1\]"),
        ({"budget": True}, "budget as float"),
        ({"keep": 0}, "keep"),
        ({"pattern": "full"}, "to be a Pattern"),
        ({"max_length": 0}, "max_length"),
        ({"op": "cutlass"}, "dense"),
    ],
)
def test_bad_options_of_adaptive_layers(arguments, word):
    with pytest.raises(InvalidInput, match=word):
        AdaptiveSparseAttention(**arguments)
