"""A pattern is a text and its tables; the text is read by a small grammar and never evaluated."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, Full, InvalidInput, longnet
from dilated_attention_pytorch.patterns import Pattern, pattern_from_text
from dilated_attention_pytorch.testing import PATTERNS


@pytest.mark.parametrize("name", PATTERNS)
def test_text_and_tables_are_the_whole_pattern(name):
    pattern: Pattern = PATTERNS[name]
    twin = pattern_from_text(pattern.text(), list(pattern.tables))
    assert twin.text() == pattern.text()
    assert len(twin.tables) == len(pattern.tables)
    assert all(torch.equal(a, b) for a, b in zip(twin.tables, pattern.tables))
    assert torch.equal(twin.to_mask(4, 37), pattern.to_mask(4, 37))


def test_tables_keep_their_order_in_nested_patterns():
    pattern = (Documents([3, 4]) & Documents([5, 2]).of(Causal())) + Documents([1, 6]).of(Documents([2, 2]))
    assert [t.tolist() for t in pattern.tables] == [[3, 4], [5, 2], [1, 6], [2, 2]]
    twin = pattern_from_text(pattern.text(), list(pattern.tables))
    assert torch.equal(twin.to_mask(1, 7), pattern.to_mask(1, 7))


def test_new_table_values_keep_the_text():
    assert Documents([3, 4]).of(Causal()).text() == Documents([1, 1, 1]).of(Causal()).text()
    assert longnet([4], [1]).text() != longnet([4], [2]).text()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "Window(size=__import__('os').getpid())",
        "Full().count.__globals__",
        "Dilated(segment_length=(lambda: 4)(), dilation_rate=1)",
        "[Full()][0]",
        "open('x')",
        "Full() | Causal()",
        "Full() if True else Causal()",
        "Pattern()",
        "object()",
        "Window(size=[].__class__)",
        "Full() & 3",
        "(",
        "",
        "Full(); Causal()",
        "Window(3)",
        "Full(3)",
        "_Pair(left=Full(), right=Full())",
        "Full(" * 300,
        "Window(size=-1)",
        "Window(size=t0)",
        "Window(size=x)",
        "Window(width=3)",
        "Window(**{'size': 3})",
        "Nothing()",
    ],
)
def test_hostile_or_broken_text_is_refused(text):
    with pytest.raises(InvalidInput):
        pattern_from_text(text, [])


def test_a_refusal_shows_the_text():
    with pytest.raises(InvalidInput, match="Nothing"):
        pattern_from_text("(Full() & Nothing())", [])
    assert pattern_from_text("Full()", []) == Full()
