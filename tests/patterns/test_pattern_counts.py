"""Counts against the paper's words: loops over segments and grids, written apart from the package."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, Documents, Full, InvalidInput, Window, longnet
from dilated_attention_pytorch.testing import PATTERNS


def segments_and_grids(n, branches, num_heads, place_of, causal=False, heads_of=None):
    """LongNet section 2.2: cut N into segments of w, take the rows s*w + place + m*r, link all pairs of them."""
    counts = torch.zeros(num_heads, n, n, dtype=torch.int64)
    for number, (w, r) in enumerate(branches):
        for h in range(num_heads):
            if heads_of is not None and h not in heads_of[number]:
                continue
            for start in range(0, n, w):
                rows = list(range(start + place_of(h, r), min(start + w, n), r))
                for i in rows:
                    for j in rows:
                        counts[h, i, j] += j <= i or not causal
    return counts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 7, 16, 33])
@pytest.mark.parametrize(
    ("lengths", "rates", "heads"),
    [((4, 8, 16), (1, 2, 4), 4), ((6, 10, 9), (1, 3, 2), 5), ((3, 20), (5, 7), 2), ((8, 8), (1, 1), 1)],
)
def test_longnet_is_the_sum_of_its_branches(lengths, rates, heads, n, causal):
    pattern = longnet(lengths, rates)
    pattern = pattern & Causal() if causal else pattern
    expected = segments_and_grids(n, list(zip(lengths, rates)), heads, lambda h, r: h % r, causal)
    assert torch.equal(pattern.to_mask(heads, n), expected)


@pytest.mark.parametrize("heads", [2, 3, 4, 7])
def test_torchscale_offsets_are_blocks_of_heads(heads):
    lengths, rates = (8, 16), (2, 3)
    expected = segments_and_grids(21, list(zip(lengths, rates)), heads, lambda h, r: h // -(-heads // r))
    assert torch.equal(longnet(lengths, rates, head_offset="torchscale").to_mask(heads, 21), expected)


@pytest.mark.parametrize(("heads", "dealt"), [(3, [[0], [1], [2]]), (8, [[0, 1, 2], [3, 4, 5], [6, 7]])])
def test_head_groups_deal_heads_out_first_groups_one_more(heads, dealt):
    lengths, rates = (4, 8, 16), (1, 2, 4)
    expected = segments_and_grids(19, list(zip(lengths, rates)), heads, lambda h, r: h % r, heads_of=dealt)
    assert torch.equal(longnet(lengths, rates, head_groups=True).to_mask(heads, 19), expected)


def test_a_segment_longer_than_the_sequence_is_one_segment():
    assert torch.equal(Dilated(1000, 3).to_mask(3, 17), Dilated(17, 3).to_mask(3, 17))


def test_simple_patterns_by_loops():
    n = 9
    for pattern, seen in [
        (Full(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i),
        (Window(3), lambda i, j: abs(i - j) <= 2),
        (Window(3) & Causal(), lambda i, j: 0 <= i - j <= 2),
    ]:
        expected = torch.tensor([[int(seen(i, j)) for j in range(n)] for i in range(n)])
        assert torch.equal(pattern.to_mask(1, n)[0], expected)


def test_and_multiplies_and_plus_adds():
    a, b = longnet([4, 8], [1, 2]), Window(3) + Full()
    x, y = a.to_mask(2, 13), b.to_mask(2, 13)
    assert torch.equal((a & b).to_mask(2, 13), x * y)
    assert torch.equal((a + b).to_mask(2, 13), x + y)
    assert (a & b).to_mask(2, 13).max() == 4


@pytest.mark.parametrize("name", [n for n in PATTERNS if "batched" not in n])
def test_count_of_plain_ints_equals_to_mask(name):
    pattern, (q, k) = PATTERNS[name], ((0, 5, 16, 36), (0, 4, 5, 12, 33, 36))
    mask = pattern.to_mask(4, 37)
    for h in (0, 3):
        for i in q:
            for j in k:
                assert int(pattern.count(h, 4, i, j)) == int(mask[h, i, j]), (h, i, j)


def test_to_mask_places_queries():
    pattern = longnet([4, 8], [1, 2]) & Causal()
    whole = pattern.to_mask(2, 20)
    assert torch.equal(pattern.to_mask(2, 3, 20), whole[:, 17:])
    assert torch.equal(pattern.to_mask(2, 3, 20, query_start=5), whole[:, 5:8])
    assert torch.equal(pattern.to_mask(2, 20, 3, query_start=0), whole[:, :, :3])
    assert pattern.to_mask(2, 0, 5).shape == (2, 0, 5)


@pytest.mark.parametrize("arguments", [(-1, 3, 3), (1, 4, 3)])
def test_to_mask_refuses_what_cannot_be(arguments):
    with pytest.raises(InvalidInput, match="query_start"):
        Full().to_mask(*arguments)


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(4), longnet([8, 16], [1, 2]) & Causal()])
def test_patterns_are_values(pattern):
    twin = eval(repr(pattern), {}, _names())
    assert twin == pattern
    assert hash(twin) == hash(pattern)
    with pytest.raises(AttributeError):
        pattern.size = 3


def _names():
    from dilated_attention_pytorch.patterns.base import And, Sum

    return {c.__name__: c for c in (And, Sum, Full, Causal, Window, Dilated, Documents)}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(0), "at least 1"),
        (lambda: Dilated(0, 1), "segment_length"),
        (lambda: Dilated(4, -2), "dilation_rate"),
        (lambda: Dilated(4.0, 1), "segment_length"),
        (lambda: Dilated(True, 1), "segment_length"),
        (lambda: Dilated(4, 1, "random"), "modulo"),
        (lambda: Dilated(4, 1, heads=(2, 2)), "group"),
        (lambda: longnet([4], [1, 2]), "equally long"),
        (lambda: longnet([], []), "not empty"),
        (lambda: longnet([4, 0], [1, 1]), "segment_length"),
    ],
)
def test_bad_patterns_say_what_was_expected(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_and_with_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        Full() & 3
    with pytest.raises(TypeError):
        Full() + "x"
