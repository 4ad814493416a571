"""Which rows of a sequence each rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.problem import Positions, Run

LAYOUTS = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class Layout:
    """The rows that each of ``world`` ranks holds of a sequence of ``length`` tokens at ``start, start + 1, ...``.

    "contiguous": one chunk each, with the bounds of `torch.tensor_split`. "zigzag": rank r holds chunks r and
    2 W - 1 - r of 2 W, so that causal rows with few and with many keys meet on a rank. "striped": rank r holds rows
    r, r + W, r + 2 W, ... Shards may differ by a few tokens, and a rank may hold none.

    Raises InvalidInput for another name, or numbers that cannot be.

    Example:
        >>> Layout("zigzag", 8, 2).positions(0)
        (Run(start=0, step=1, length=2), Run(start=6, step=1, length=2))
    """

    name: str
    length: int
    world: int
    start: int = 0

    def __post_init__(self) -> None:
        check_layout(self.name)
        if self.length < 0 or self.world < 1 or self.start < 0:
            raise InvalidInput(
                f"Layout: expected length >= 0, world >= 1 and start >= 0. Got length={self.length}, "
                f"world={self.world}, start={self.start}."
            )

    def positions(self, rank: int) -> Positions:
        """Where a rank's rows stand, in the order in which it holds them, which is that of their positions."""
        if not 0 <= rank < self.world:
            raise InvalidInput(f"Layout: expected a rank from 0 to {self.world - 1}. Got {rank}.")
        if self.name == "striped":
            return joined([Run(self.start + rank, self.world, len(range(rank, self.length, self.world)))])
        if self.name == "contiguous":
            return joined([self._chunk(rank, self.world)])
        return joined([self._chunk(rank, 2 * self.world), self._chunk(2 * self.world - 1 - rank, 2 * self.world)])

    def count(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return row_count(self.positions(rank))

    def _chunk(self, number: int, chunks: int) -> Run:
        size, longer = divmod(self.length, chunks)
        return Run(self.start + number * size + min(number, longer), 1, size + (number < longer))


def check_layout(name: str) -> None:
    """Raise InvalidInput unless it is the name of a layout."""
    if name not in LAYOUTS:
        raise InvalidInput(f"expected layout to be one of {', '.join(map(repr, LAYOUTS))}. Got {name!r}.")


def whole_layout(name: str, held: Sequence[int], rows: str = "rows") -> Layout:
    """The layout of the sequence of which ranks hold so many ``rows``, by rank.

    Raises InvalidInput, naming ranks and numbers, unless these are what the layout deals out.

    Example:
        >>> whole_layout("contiguous", [3, 2]).length
        5
    """
    whole = Layout(name, sum(held), len(held))
    expected = [whole.count(rank) for rank in range(whole.world)]
    if list(held) != expected:
        raise InvalidInput(
            f"of {whole.length} {rows} in layout {name!r} ranks 0 to {whole.world - 1} hold {expected}. Got "
            f"{list(held)}; cut the sequence with shard_sequence, in the layout of what follows."
        )
    return whole


def row_count(positions: Positions) -> int:
    """How many rows stand at these positions.

    Example:
        >>> row_count((Run(0, 2, 3), Run(10, 1, 4)))
        7
    """
    return sum(run.length for run in positions)


def joined(runs: Iterable[Run]) -> Positions:
    """The runs without empty ones, each joined to the one before where that goes on as it does.

    A single row joins those of its step; one that stays alone has step 1.

    Example:
        >>> joined([Run(0, 1, 2), Run(2, 1, 3), Run(9, 1, 0), Run(9, 4, 1), Run(13, 4, 1), Run(20, 4, 1)])
        (Run(start=0, step=1, length=5), Run(start=9, step=4, length=2), Run(start=20, step=1, length=1))
    """
    kept: list[Run] = []
    for run in runs:
        if run.length == 0:
            continue
        if kept and kept[-1].step == run.step and kept[-1].start + kept[-1].step * kept[-1].length == run.start:
            run = Run(kept[-1].start, run.step, kept.pop().length + run.length)
        kept.append(run)
    return tuple(run if run.length > 1 else Run(run.start, 1, 1) for run in kept)
