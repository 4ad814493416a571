"""Block-sparse and adaptive layers against the reference and against the dilated layers with the same pattern."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import Causal, Documents, Full, InvalidInput, Softcap, Window, reference_attention
from dilated_attention_pytorch.nn import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    LayerCache,
    MultiheadAdaptiveSparseAttention,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
    MultiheadPatternAttention,
)
from dilated_attention_pytorch.nn.adaptive import OVERLAPS_KEPT
from dilated_attention_pytorch.nn.sparse import LAYOUTS, LAYOUTS_KEPT, _layout
from dilated_attention_pytorch.patterns import BlockSparse, axial, hybrid, local_window, random_blocks
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

SIZES = {
    "axial": {"grid": (6, 8), "thickness": 1},
    "dilated_sparse": {"links": 1},
    "global_local": {"window": 5},
    "hierarchical": {"density": 0.5},
    "local_window": {"window": 9},
    "random_blocks": {"links": 2, "seed": 3},
    "strided": {"stride": 3},
}
CHOOSER = Selector(MeanPooled(), TopBlocks(), block_size=8)


def heads(length=48, num_heads=4, kv_heads=None, queries=None, seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    sizes = ((queries or length, num_heads), (length, kv_heads or num_heads), (length, kv_heads or num_heads))
    return tuple(torch.randn(batch, n, h, 8, generator=g, dtype=torch.float64) for n, h in sizes)


def rows(length=48, batch=2, seed=1):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_sparse(*arguments, seed=0, **options):
    torch.manual_seed(seed)
    return MultiheadBlockSparseAttention(32, 4, *arguments, dtype=torch.float64, **options).eval()


def adaptive(selector=CHOOSER, budget=3, seed=0, **options):
    torch.manual_seed(seed)
    return MultiheadAdaptiveSparseAttention(32, 4, selector, budget, dtype=torch.float64, **options).eval()


def dilated_twin(module, pattern, **options):
    """The same weights in a layer whose pattern is given."""
    twin = MultiheadDilatedAttention(32, 4, pattern=pattern, dtype=torch.float64, **options).eval()
    twin.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("attention.")})
    return twin


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def attended(pattern, q, k, v, **options):
    return reference_attention(q, k, v, pattern, **options)[0]


# Block-sparse: heads


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_kind_is_what_its_builder_gives(kind, is_causal):
    q, k, v = heads(kv_heads=2)
    table = LAYOUTS[kind](48, block_size=4, **SIZES[kind])
    out = BlockSparseAttention(kind, block_size=4, softmax_scale=0.3, **SIZES[kind])(q, k, v, is_causal)
    close(out, attended(table & Causal() if is_causal else table, q, k, v, scale=0.3))
    assert set(SIZES) == set(LAYOUTS)


def test_heads_with_tables_of_their_own():
    q, k, v = heads()
    expected = attended(random_blocks(48, block_size=4, links=3, num_heads=4), q, k, v)
    close(BlockSparseAttention("random_blocks", block_size=4, links=3, per_head=True)(q, k, v), expected)
    assert (BlockSparseAttention("random_blocks", block_size=4, links=3)(q, k, v) - expected).abs().max() > 0.1


def window_and_links(query_length, key_length, *, block_size):
    options = {"block_size": block_size}
    near = local_window(query_length, key_length, window=5, **options)
    return hybrid(near, random_blocks(query_length, key_length, links=2, **options)) & Window(40)


def test_a_function_of_ones_own_and_a_ready_pattern():
    q, k, v = heads()
    expected = attended(window_and_links(48, 48, block_size=4), q, k, v)
    close(BlockSparseAttention(window_and_links, block_size=4)(q, k, v), expected)
    close(BlockSparseAttention(window_and_links, max_length=48, block_size=4)(q, k, v), expected)
    close(BlockSparseAttention(pattern=window_and_links(48, 48, block_size=4))(q, k, v), expected)


@pytest.mark.parametrize(("queries", "length", "start"), [(7, 45, None), (1, 48, None), (30, 20, 0), (11, 30, 3)])
def test_the_table_covers_queries_wherever_they_stand(queries, length, start):
    q, k, v = heads(length, queries=queries)
    pattern = local_window(48, block_size=4, window=9) & Causal()
    out = BlockSparseAttention("local_window", block_size=4, window=9)(q, k, v, True, query_start=start)
    close(out, attended(pattern, q, k, v, query_start=start))
    grid = BlockSparseAttention("axial", block_size=4, grid=(6, 8), thickness=1, max_length=48)
    close(
        grid(q, k, v, query_start=start),
        attended(axial(48, block_size=4, grid=(6, 8), thickness=1), q, k, v, query_start=start),
    )


def test_a_grid_is_that_of_the_longer_side():
    q, k, v = heads(20, queries=48)
    pattern = axial(48, block_size=4, grid=(6, 8), thickness=1)
    out = BlockSparseAttention("axial", block_size=4, grid=(6, 8), thickness=1)(q, k, v, query_start=0)
    close(out, attended(pattern, q, k, v, query_start=0))


def test_a_longest_length_makes_tables_that_do_not_depend_on_the_call():
    attention = BlockSparseAttention("global_local", block_size=4, density=0.4, max_length=48, softmax_scale=0.5)
    q, k, v = heads()
    for n in (48, 33, 3):
        found = attention.choose_pattern(q[:, :n], k[:, :n], False, None)
        assert found.layout.shape == (-(-n // 4), -(-n // 4))
        close(attention(q, k, v, True)[:, :n], attention(q[:, :n], k[:, :n], v[:, :n], True))
    free = BlockSparseAttention("global_local", block_size=4, density=0.4, softmax_scale=0.5)
    assert (attention(q, k, v, True)[:, :24] - free(q[:, :24], k[:, :24], v[:, :24], True)).abs().max() > 0.01
    with pytest.raises(InvalidInput, match="max_length = 48"):
        attention(*heads(49))


def test_few_tables_are_kept_and_equal_layers_share_them():
    first, second = (BlockSparseAttention("strided", block_size=4, stride=3) for _ in range(2))
    tables = [layer.choose_pattern(*heads(n)[:2], False, None).layout for n in (45, 48) for layer in (first, second)]
    assert len({t.data_ptr() for t in tables}) == 1  # both lengths are twelve blocks
    for n in range(4, 4 * LAYOUTS_KEPT + 40, 4):
        first.choose_pattern(*heads(n)[:2], False, None)
    assert _layout.cache_info().currsize == LAYOUTS_KEPT


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "expected kind to be one of"),
        ({"kind": "hybrid"}, "expected kind to be one of"),
        ({"kind": "local_window", "stride": 2}, r"\['stride'\]"),
        ({"kind": "local_window", "window": 9, "num_heads": 2}, "per_head=True"),
        ({"kind": "local_window", "window": 9, "per_head": True}, "leave out per_head"),
        ({"kind": "local_window", "window": {}}, "window to be a number"),
        ({"kind": "local_window", "pattern": Full()}, "replaces"),
        ({"density": 0.5, "pattern": Full()}, "replaces"),
        ({"max_length": 5, "pattern": Full()}, "replaces"),
        ({"pattern": "full"}, "to be a Pattern"),
        ({"kind": "local_window", "window": 9, "max_length": 0}, "max_length"),
        ({"kind": "local_window", "window": 9, "attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_bad_options_of_block_sparse_layers(arguments, word):
    with pytest.raises(InvalidInput, match=word):
        BlockSparseAttention(**arguments)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"window": 0}, {"block_size": 0, "window": 2}])
def test_sizes_are_checked_by_the_builder(options):
    with pytest.raises(InvalidInput, match="local_window"):
        BlockSparseAttention("local_window", **options)(*heads())


# Block-sparse: embeddings


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi"])
def test_embeddings_are_treated_as_in_the_dilated_layer(position):
    options = {"position": position, "num_kv_heads": 2, "gamma_init": 2.0}
    module = block_sparse("local_window", block_size=4, window=9, max_length=48, **options)
    pattern = local_window(48, block_size=4, window=9)
    assert isinstance(module, MultiheadPatternAttention)
    if position == "xpos":
        with pytest.raises(InvalidInput, match="max_length"):
            block_sparse("local_window", window=9, position="xpos")
        alone = module(rows(), is_causal=True)
        assert (alone - dilated_twin(module, pattern, num_kv_heads=2)(rows(), is_causal=True)).abs().max() > 1e-3
        close(alone[:, :20], module(rows()[:, :20], is_causal=True))
        return
    twin = dilated_twin(module, pattern, **options)
    packed = Documents([20, 28])
    padding = torch.arange(48) >= torch.tensor([[48], [29]])
    for call in ({"is_causal": True}, {"documents": packed}, {"key_padding_mask": padding}, {"need_weights": True}):
        got, expected = module(rows(), **call), twin(rows(), **call)
        for a, b in zip(got, expected) if isinstance(got, tuple) else [(got, expected)]:
            close(a, b)


def test_block_sparse_decoding_equals_prefill():
    module, x = block_sparse("hierarchical", block_size=4, density=0.4, max_length=60, position="rotary"), rows(50)
    cache, parts = LayerCache(), []
    with torch.no_grad():
        for start, end in [(0, 7), (7, 8), (8, 30), (30, 31), (31, 50)]:
            parts.append(module(x[:, start:end], is_causal=True, cache=cache))
        close(torch.cat(parts, 1), module(x, is_causal=True))
        with pytest.raises(InvalidInput, match="max_length = 60"):
            module(rows(11), is_causal=True, cache=cache)
    assert cache.length == 50  # a refused call leaves nothing behind


def test_gradients_reach_the_weights():
    module = block_sparse("local_window", block_size=4, window=9)
    twin = dilated_twin(module, local_window(48, block_size=4, window=9))
    for layer in (module, twin):
        layer(rows(), is_causal=True).square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(dict(module.named_parameters())[name].grad, parameter.grad, rtol=1e-9, atol=1e-9)


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


# Compiling


def test_a_ready_pattern_is_one_graph():
    torch._dynamo.reset()
    module = block_sparse(pattern=BlockSparse(8, torch.ones(8, 8).tril().bool()), position="rotary")
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for n in (48, 31):
        close(compiled(rows(n), is_causal=True), module(rows(n), is_causal=True))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: block_sparse("local_window", block_size=8, window=9, position="rotary"), "give it pattern="),
        (lambda: adaptive(position="rotary"), "chooses blocks from the numbers"),
    ],
)
def test_tables_made_on_the_way_run_between_two_graphs(make, word):
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, backend="eager")
    for n in (48, 31):
        close(compiled(rows(n), is_causal=True), module(rows(n), is_causal=True))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=word):
        torch.compile(module, backend="eager", fullgraph=True)(rows(20), is_causal=True)
