"""Block-sparse layers against the reference and against the dilated layer with the same pattern; both kinds compile."""

import pytest
import torch
from small_layers import adaptive, attended, block_sparse, close, dilated_twin, heads, rows

from dilated_attention_pytorch import Causal, Documents, Full, InvalidInput, Window
from dilated_attention_pytorch.nn import (
    BlockSparseAttention,
    LayerCache,
    MultiheadPatternAttention,
)
from dilated_attention_pytorch.nn.sparse import LAYOUTS, LAYOUTS_KEPT, _layout
from dilated_attention_pytorch.patterns import BlockSparse, axial, hybrid, local_window, random_blocks

SIZES = {
    "axial": {"grid": (6, 8), "thickness": 1},
    "dilated_sparse": {"links": 1},
    "global_local": {"window": 5},
    "hierarchical": {"density": 0.5},
    "local_window": {"window": 9},
    "random_blocks": {"links": 2, "seed": 3},
    "strided": {"stride": 3},
}


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
