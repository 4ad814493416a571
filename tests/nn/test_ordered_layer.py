"""A layer in an order is the layer between a permutation and its inverse, with everything carried along."""

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import Documents, Full, InvalidInput, Window, longnet
from dilated_attention_pytorch.models import LongNetEncoder
from dilated_attention_pytorch.nn import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    DilatedAttention,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
    Ordered,
)
from dilated_attention_pytorch.nn.positions import Rotary
from dilated_attention_pytorch.orderings import Order, hilbert_order
from dilated_attention_pytorch.selection import MeanPooled, Selector, TopBlocks

SHAPE, N, E, H = (6, 9), 54, 32, 4
SEGMENTS, RATES = [8, 24], [1, 3]
BY_SAMPLE = "an order for each sample"


def multihead(**options) -> MultiheadDilatedAttention:
    return MultiheadDilatedAttention(E, H, RATES, SEGMENTS, dtype=torch.float64, **options).eval()


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, N, E)), dtype=torch.float64)


def heads() -> tuple[torch.Tensor, ...]:
    return tuple(rows(2, N, H, 8) for _ in range(3))


@pytest.fixture(params=["one order", BY_SAMPLE])
def order(request: pytest.FixtureRequest) -> Order:
    if request.param == BY_SAMPLE:
        return Order.batch([hilbert_order(SHAPE), Order(torch.randperm(N))])
    return hilbert_order(SHAPE)


def by_hand(order: Order, x: torch.Tensor, sample: int) -> torch.Tensor:
    """One sample's tokens, in dim 0, in order."""
    return x[order.permutation[sample] if order.is_batch else order.permutation]


def back(order: Order, x: torch.Tensor, sample: int) -> torch.Tensor:
    return x[order.inverse[sample] if order.is_batch else order.inverse]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def encoder() -> LongNetEncoder:
    return LongNetEncoder(E, H, 2, 48, SEGMENTS, RATES, dtype=torch.float64).eval()


MAKERS = {
    "multihead": multihead,
    "rotary": lambda: multihead(position="rotary"),
    "block": lambda: DilatedTransformerEncoderLayer(E, H, SEGMENTS, RATES, 48, dtype=torch.float64).eval(),
    "sparse": lambda: MultiheadBlockSparseAttention(
        E, H, "local_window", block_size=8, window=16, dtype=torch.float64
    ).eval(),
    "encoder": encoder,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_layer_in_order_is_the_layer_between_two_permutations(kind, order) -> None:
    layer, x = MAKERS[kind](), rows()
    got = Ordered(layer, order)(x)
    for b, sample in enumerate(x):
        close(got[b], back(order, layer(by_hand(order, sample, b)[None])[0], b))
    assert (got - layer(x)).abs().max() > 1e-3, "the order matters to these patterns"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_see_those_whose_places_on_the_curve_the_pattern_links(order, dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads())
    out = Ordered(DilatedAttention(SEGMENTS, RATES), order)(q, k, v)
    counts = longnet(SEGMENTS, RATES).to_mask(H, N).double()
    for b in range(2):
        inverse = order.inverse[b] if order.is_batch else order.inverse
        logits = torch.einsum("qhd,khd->hqk", q[b].double(), k[b].double()) / 8**0.5
        weights = (logits + counts[:, inverse][:, :, inverse].log()).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v[b].double())
        torch.testing.assert_close(out[b].double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-11)


def test_ready_made_heads_masks_and_weights_are_carried(order) -> None:
    layer, (q, k, v) = DilatedAttention(SEGMENTS, RATES), heads()
    for mask in (rows(N, N), rows(2, 1, N, N), rows(H, N, N), rows(N, 1), rows(1, N)):
        out, weights = Ordered(layer, order)(q, k, v, attention_mask=mask, need_weights=True)
        full = mask.expand(2, H, N, N)
        for b in range(2):
            places = order.permutation[b] if order.is_batch else order.permutation
            pairs = full[b][:, places][:, :, places]
            expected, seen = layer(
                *(by_hand(order, x[b], b)[None] for x in (q, k, v)), attention_mask=pairs[None], need_weights=True
            )
            close(out[b], back(order, expected[0], b))
            close(weights[b][:, places][:, :, places], seen[0])


def test_attn_mask_of_both_shapes_is_carried(order) -> None:
    layer, x = multihead(), rows()
    square = torch.rand(N, N) < 0.3
    each = torch.rand(2 * H, N, N) < 0.3
    for mask, of_sample in ((square, lambda b: square), (each, lambda b: each.view(2, H, N, N)[b])):
        got = Ordered(layer, order)(x, attn_mask=mask)
        for b in range(2):
            places = order.permutation[b] if order.is_batch else order.permutation
            moved = of_sample(b)[..., places, :][..., places]
            close(got[b], back(order, layer(x[b, places][None], attn_mask=moved)[0], b))


def test_positions_stay_with_their_tokens(order) -> None:
    # With every pair seen, an order changes nothing but the positions that tokens are given by default.
    layer, x = MultiheadDilatedAttention(E, H, position="rotary", pattern=Full(), dtype=torch.float64).eval(), rows()
    ordered, ids = Ordered(layer, order), torch.randint(300, (2, N))
    close(ordered(x, position_ids=ids), layer(x, position_ids=ids))
    close(ordered(x, position_ids=ids[0]), layer(x, position_ids=ids[0]))
    table = Rotary(E // H).table(N, position_ids=ids[0], dtype=torch.float64)
    close(ordered(x, rotation=table), layer(x, rotation=table))
    batch = Rotary(E // H).table(N, position_ids=ids, dtype=torch.float64)
    close(ordered(x, rotation=batch), layer(x, rotation=batch))
    close(ordered(x), layer(x, position_ids=order.inverse))


@pytest.mark.parametrize("need_weights", [False, True])
def test_an_order_changes_nothing_where_every_token_sees_every_other(order, need_weights) -> None:
    layer, x = MultiheadDilatedAttention(E, H, pattern=Full(), dtype=torch.float64).eval(), rows()
    got, expected = Ordered(layer, order)(x, need_weights=need_weights), layer(x, need_weights=need_weights)
    for a, b in zip(*((y if need_weights else (y,)) for y in (got, expected))):
        close(a, b)


def test_gradients_are_those_of_the_permutations(order) -> None:
    layer, x = multihead(), rows().requires_grad_()
    dout = rows()
    Ordered(layer, order)(x).backward(dout)
    got = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    index = (order.permutation if order.is_batch else order.permutation.expand(2, N))[..., None].expand_as(x)
    layer(x.gather(1, index)).backward(dout.gather(1, index))
    for a, b in zip(got, [x.grad, *(p.grad for p in layer.parameters())]):
        close(a, b)


@pytest.mark.parametrize("make", [multihead, encoder])
def test_slides_of_different_tiles_in_one_padded_batch(make) -> None:
    layer = make()
    slides = [torch.unique(torch.randint(40, (n, 2)), dim=0) for n in (50, 20, 33)]
    tiles = [rows(len(points), E) for points in slides]
    orders = [hilbert_order(points=points) for points in slides]
    x = nn.utils.rnn.pad_sequence(tiles, batch_first=True)
    padding = torch.arange(x.shape[1]) >= torch.tensor([len(points) for points in slides])[:, None]
    ordered = Ordered(layer)
    out = ordered(x, key_padding_mask=padding, order=Order.batch(orders))
    for got, own, one in zip(out, tiles, orders):
        close(got[: len(own)], ordered(own[None], order=one)[0])


def test_holes_in_a_grid_are_passed_over(order) -> None:
    layer, x = multihead(), rows()
    holes = torch.rand(2, N) < 0.4
    out = Ordered(layer, order)(x, key_padding_mask=holes)
    for b in range(2):
        places = order.permutation[b] if order.is_batch else order.permutation
        kept = places[~holes[b, places]]
        close(out[b, kept], layer(x[b, kept][None])[0])


def test_self_attention_stays_self_attention() -> None:
    layer, x, ids = multihead(position="rotary"), rows(), torch.arange(N)
    close(
        Ordered(layer, hilbert_order(SHAPE))(x, x, x, position_ids=ids),
        Ordered(layer, hilbert_order(SHAPE))(x, position_ids=ids),
    )
    q, k, v = rows(), rows(), rows()
    places = hilbert_order(SHAPE).permutation
    expected = layer(q[:, places], k[:, places], v[:, places])
    close(Ordered(layer, hilbert_order(SHAPE))(q, key=k, value=v)[:, places], expected)


def test_causal_along_the_curve_is_causal_there() -> None:
    order, x = hilbert_order(SHAPE), rows()
    layer = multihead()
    ordered = Ordered(layer, order, causal_along_curve=True)
    out = ordered(x, is_causal=True)
    places = order.permutation
    assert torch.equal(out[:, places], layer(x[:, places], is_causal=True))
    changed = x.clone()
    changed[:, places[30:]] += 1.0
    later = ordered(changed, is_causal=True)
    assert torch.equal(later[:, places[:30]], out[:, places[:30]])
    assert (later[:, places[30:]] != out[:, places[30:]]).any()
    close(ordered(x, is_causal=False), Ordered(layer, order)(x))


def test_adaptive_and_sparse_heads_choose_blocks_along_the_curve() -> None:
    order, (q, k, v) = hilbert_order(SHAPE), heads()
    chooser = Selector(MeanPooled(), TopBlocks(), block_size=8)
    for layer in (BlockSparseAttention("local_window", block_size=8, window=16), AdaptiveSparseAttention(chooser, 0.3)):
        expected = layer(*(x[:, order.permutation] for x in (q, k, v)))
        close(Ordered(layer, order)(q, k, v)[:, order.permutation], expected)


def test_the_order_follows_the_layer_and_is_not_saved() -> None:
    ordered = Ordered(multihead(), hilbert_order(SHAPE))
    assert set(ordered.state_dict()) == {f"layer.{name}" for name in ordered.layer.state_dict()}
    assert torch.equal(ordered.order.inverse, hilbert_order(SHAPE).inverse)
    assert ordered.to("meta").order.permutation.device.type == "meta"
    assert Ordered(multihead()).order is None
    assert "order=Order(54,)" in repr(Ordered(multihead(), hilbert_order(SHAPE)))
    x = rows()
    other = Order(torch.randperm(N))
    layer = multihead()
    close(Ordered(layer, hilbert_order(SHAPE))(x, order=other), Ordered(layer, other)(x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"is_causal": True}, "is_causal: .*causal_along_curve=True"),
        ({"documents": Documents([N])}, "documents: cannot be carried"),
        ({"query_start": 0}, "query_start: cannot"),
        ({"cache": object()}, "cache: cannot"),
        ({"key": torch.zeros(2, 9, E)}, "key: Order: the order is of 54 places, dim 1 of x has 9"),
        ({"position_ids": torch.arange(9)}, "position_ids: .*has 9"),
        ({"attn_mask": torch.zeros(N, 9)}, "attn_mask: .*has 9"),
        ({"query": torch.zeros(2, N, E)}, "both unnamed and named"),
        ({"order": torch.arange(N)}, "expected an Order.*Got Tensor"),
    ],
)
def test_what_cannot_be_carried_is_refused(options, says) -> None:
    with pytest.raises(InvalidInput, match=says):
        Ordered(multihead(), hilbert_order(SHAPE))(rows(), **options)


def test_wrong_tokens_layers_and_orders_are_refused() -> None:
    with pytest.raises(InvalidInput, match="query: Order: the order is of 54 places, dim 1 of x has 50"):
        Ordered(multihead(), hilbert_order(SHAPE))(rows(2, 50, E))
    with pytest.raises(InvalidInput, match="Got none; pass order="):
        Ordered(multihead())(rows())
    with pytest.raises(InvalidInput, match="at most 8 unnamed"):
        Ordered(multihead(), hilbert_order(SHAPE))(*[None] * 9)
    batch = Order.batch([hilbert_order(SHAPE)] * 2)
    with pytest.raises(InvalidInput, match="samples"):
        Ordered(multihead(), batch)(rows(3, N, E))
    with pytest.raises(InvalidInput, match="B = 2"):
        Ordered(multihead(), batch)(rows(), attn_mask=torch.zeros(3, N, N))
    with pytest.raises(InvalidInput, match="DilatedTransformerDecoderLayer, which takes"):
        Ordered(DilatedTransformerDecoderLayer(E, H, pattern=Window(4)), hilbert_order(SHAPE))
    with pytest.raises(InvalidInput, match="Got list"):
        Ordered(multihead(), [0, 1])


@pytest.mark.nightly
def test_an_ordered_layer_is_one_graph() -> None:
    layer, x, mask = multihead(position="rotary"), rows(), torch.rand(2, N) < 0.4
    ordered = Ordered(layer, hilbert_order(SHAPE))
    compiled = torch.compile(ordered, backend="eager", fullgraph=True)
    close(compiled(x), ordered(x))
    close(compiled(x, key_padding_mask=mask), ordered(x, key_padding_mask=mask))
