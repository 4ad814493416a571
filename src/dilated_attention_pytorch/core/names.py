"""What a name that is not understood was perhaps meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error text: the known name nearest to ``name``, or all of them.

    Example:
        >>> nearest("segment_length", ["segment_lengths", "dropout"])
        "; did you mean 'segment_lengths'?"
        >>> nearest("x", ["segment_lengths", "dropout"])
        "; known are 'dropout', 'segment_lengths'"
    """
    known = sorted(known)
    found = get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(map(repr, known))}"
