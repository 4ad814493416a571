"""LongNet's dilated attention (arXiv 2307.02486, section 2) as a sum of branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import Block, Branch, Index, Pattern
from dilated_attention_pytorch.problem import Problem

HEAD_OFFSETS = ("modulo", "torchscale")


@dataclass(frozen=True)
class Dilated(Pattern):
    """Within segments of ``segment_length`` tokens, every ``dilation_rate``-th token sees every such token.

    Head ``h`` uses the places congruent to its offset modulo the rate; the grid starts anew in every segment.
    ``head_offset="modulo"`` is the paper's ``h mod r``, ``"torchscale"`` is ``floor(h / ceil(H / r))``, with which
    Prov-GigaPath and LongViT were trained. ``heads=(i, n)`` deals the heads out: only the i-th of n groups runs it.

    Example:
        >>> print(Dilated(4, 2).draw(8, num_heads=2, head=1))
        ········
        ·1·1····
        ········
        ·1·1····
        ········
        ·····1·1
        ········
        ·····1·1
    """

    segment_length: int
    dilation_rate: int
    head_offset: str = "modulo"
    heads: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("segment_length", "dilation_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"Dilated: expected {name} to be an int of at least 1. Got {value!r}.")
        if self.head_offset not in HEAD_OFFSETS:
            raise InvalidInput(f"Dilated: expected head_offset to be one of {HEAD_OFFSETS}. Got {self.head_offset!r}.")
        if self.heads is not None and not (len(self.heads) == 2 and 0 <= self.heads[0] < self.heads[1]):
            raise InvalidInput(f"Dilated: expected heads=(group, groups) with 0 <= group < groups. Got {self.heads}.")

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        (branch,) = self.branches()
        place = branch.offset(head, num_heads)
        first, last = branch.head_range(num_heads)
        same_segment = q // self.segment_length == k // self.segment_length
        q_on_grid = q % self.segment_length % self.dilation_rate == place
        k_on_grid = k % self.segment_length % self.dilation_rate == place
        return (same_segment & q_on_grid & k_on_grid & (head >= first) & (head < last)) * 1

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(self.segment_length, self.dilation_rate, self.head_offset, self.heads),)

    @property
    def varies_by_head(self) -> bool:
        return self.dilation_rate > 1 or self.heads is not None

    @property
    def period(self) -> int:
        return self.segment_length

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        (branch,) = self.branches()
        w, r, place = self.segment_length, self.dilation_rate, branch.offset(head, num_heads)
        first, last = branch.head_range(num_heads)
        runs_it = (head >= first) & (head < last)

        def on_grid(block: Block) -> tuple[Tensor, Tensor]:  # all rows surely are, some row may be
            one_phase = block.step % r == 0
            if w % r != 0:  # the grid moves from segment to segment
                one_phase = one_phase & (block.low // w == block.high // w)
            hit = block.low % w % r == place
            return one_phase & hit, ~one_phase | hit

        (q_on, q_may), (k_on, k_may) = on_grid(q), on_grid(k)
        same = (q.low // w == k.high // w) & (k.low // w == q.high // w) & (q.low // w == q.high // w)
        meet = (q.low // w <= k.high // w) & (k.low // w <= q.high // w)
        return (runs_it & same & q_on & k_on) * 1, (runs_it & meet & q_may & k_may) * 1

    def check(self, problem: Problem) -> None:
        if self.heads is not None and problem.num_heads < self.heads[1]:
            raise InvalidInput(
                f"head_groups deals heads out among {self.heads[1]} branches and needs as many heads. "
                f"Got {problem.num_heads}; use more heads, fewer branches, or head_groups=False."
            )


def longnet(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offset: str = "modulo",
    head_groups: bool = False,
) -> Pattern:
    """The sum of LongNet's branches, one for each pair of segment length (tokens) and dilation rate.

    A key that two branches bring counts twice; this equals merging branch outputs by their softmax denominators
    (eq. 8-10 of the paper). With ``head_groups`` each head runs one branch only, as in versions 0.1 and 0.2.

    Raises InvalidInput for lists that are empty, of different lengths, or hold anything but positive ints.

    Example:
        >>> print(longnet([2, 4], [1, 2]).draw(4))
        211·
        11··
        1·21
        ··11
    """
    if len(segment_lengths) != len(dilation_rates) or len(segment_lengths) == 0:
        raise InvalidInput(
            f"longnet: segment_lengths ({len(segment_lengths)}) and dilation_rates ({len(dilation_rates)}) must be "
            "equally long and not empty; give one rate for each segment length."
        )
    groups = len(segment_lengths)
    pattern: Pattern | None = None
    for i, (length, rate) in enumerate(zip(segment_lengths, dilation_rates)):
        branch = Dilated(length, rate, head_offset, (i, groups) if head_groups else None)
        pattern = branch if pattern is None else pattern + branch
    assert pattern is not None
    return pattern
