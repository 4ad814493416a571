"""Blocks of queries and keys, as selectors see them, and the pattern of chosen blocks.

Legend: B batch, H query heads, Hkv key-value heads, Q query blocks, K key blocks, S rows of a block, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import BlockSparse, Pattern
from dilated_attention_pytorch.patterns.base import And, Block
from dilated_attention_pytorch.problem import Problem, check_inputs, make_problem, positions_end

BOUND_CELLS = 1 << 22
"""Blocks whose bounds are asked at once: bounds hold memory for some int64 of each."""


@dataclass(frozen=True, eq=False)
class SelectedTiles(And):
    """The pairs of a pattern that lie in chosen blocks: ``BlockSparse(block_size, layout) & pattern``, a constant.

    Backends, masks and gradients treat it as any pattern; its tables of tiles are made once and kept with the plans.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> chosen = SelectedTiles(BlockSparse(2, torch.eye(2, dtype=torch.bool)), Causal())
        >>> print(chosen.draw(4))
        1···
        11··
        ··1·
        ··11
        >>> chosen.density
        0.5
    """

    left: BlockSparse
    right: Pattern

    @property
    def chosen_rows(self) -> int:
        """Positions of a block of queries."""
        return self.left.block_size[0]

    def text(self, first_table: int = 0) -> str:
        right = self.right.text(first_table + len(self.left.tables))
        return f"SelectedTiles(left={self.left.text(first_table)}, right={right})"

    @property
    def blocks(self) -> BlockSparse:
        """The chosen blocks alone."""
        return self.left

    @property
    def layout(self) -> Tensor:
        """The table of chosen blocks: (B, H, Q, K), or with fewer dims where samples or heads share it."""
        return self.left.layout

    @property
    def density(self) -> float:
        """Share of all blocks that were chosen, whether the pattern has pairs there or not."""
        return int((self.layout > 0).sum()) / self.layout.numel()

    def overlap(self, other: SelectedTiles) -> float:
        """Jaccard index of two choices: blocks in both over blocks in either; 1 when neither has any.

        Raises InvalidInput when the tables differ in shape or block size.
        """
        mine, theirs = self.layout > 0, other.layout > 0
        if mine.shape != theirs.shape or self.left.block_size != other.left.block_size:
            raise InvalidInput(
                f"overlap: expected tables of one shape and block size. Got {tuple(mine.shape)} in blocks of "
                f"{self.left.block_size} and {tuple(theirs.shape)} in blocks of {other.left.block_size}."
            )
        either = int((mine | theirs).sum())
        return 1.0 if either == 0 else int((mine & theirs).sum()) / either


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Tokens cut in blocks: ``rows (B, blocks, S, heads, D)``, zeros where ``held (B or 1, blocks, S)`` is False."""

    rows: Tensor
    held: Tensor

    @cached_property
    def complete(self) -> bool:
        """Whether every row of every block is held."""
        return bool(self.held.all())

    @cached_property
    def count(self) -> Tensor:
        """Rows that each block holds, at least 1: (B or 1, blocks), float32."""
        return self.held.sum(-1).clamp(min=1).float()

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the rows that are held, 0 where there are none: (B, blocks, heads, D), float32."""
        return self.rows.sum(2, dtype=torch.float32) / self.count[..., None, None]

    @cached_property
    def least(self) -> Tensor:
        """The least value per channel of the rows that are held, 0 where there are none: dims as `mean`."""
        return self._or_zero(self._filled(torch.inf).amin(2))

    @cached_property
    def greatest(self) -> Tensor:
        """The greatest value per channel, likewise."""
        return self._or_zero(self._filled(-torch.inf).amax(2))

    def _filled(self, filler: float) -> Tensor:
        return self.rows if self.complete else self.rows.masked_fill(~self.held[..., None, None], filler)

    def _or_zero(self, x: Tensor) -> Tensor:
        return x.float() if self.complete else x.float().masked_fill(~self.held.any(-1)[..., None, None], 0.0)

    def part(self, first: int, last: int) -> TokenBlocks:
        """The blocks ``first <= i < last``."""
        return TokenBlocks(self.rows[:, first:last], self.held[:, first:last])


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """What a selector may read for each block of queries, and which blocks of keys it may choose.

    ``probes`` are the queries to judge a block of queries by: its own rows (``reads_own``), or, where causality must
    hold through the choice, rows before its first one. Row 0 of Q is block ``first_block`` of the positions.
    ``open_blocks (B or 1, H or 1, Q, K)`` says whose keys may be read and chosen, ``always`` (same dims) which blocks
    are chosen whatever their score; these need not be open. ``lag (Q,)`` says by how many blocks, 0 or 1, the probe
    stands before the block of queries.
    """

    probes: TokenBlocks
    key_blocks: TokenBlocks
    open_blocks: Tensor
    always: Tensor
    scale: float
    pattern: Pattern
    first_block: int
    reads_own: bool
    lag: Tensor

    @property
    def probe(self) -> Tensor:
        """Queries to judge by, zeros where not held: (B, Q, S, H, D), in the dtype of q."""
        return self.probes.rows

    @property
    def probe_held(self) -> Tensor:
        """Which rows of `probe` are queries: (B or 1, Q, S)."""
        return self.probes.held

    @property
    def probe_mean(self) -> Tensor:
        """Mean of each block's probe: (B, Q, H, D), float32."""
        return self.probes.mean

    @property
    def keys(self) -> Tensor:
        """Keys by block, zeros where not held: (B, K, S, Hkv, D), in the dtype of k."""
        return self.key_blocks.rows

    @property
    def keys_held(self) -> Tensor:
        """Which rows of `keys` are keys, neither past the end nor padding: (B or 1, K, S)."""
        return self.key_blocks.held

    @property
    def key_mean(self) -> Tensor:
        """Mean of each block's keys: (B, K, Hkv, D), float32."""
        return self.key_blocks.mean

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.probe.shape[2]

    @property
    def kv_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.probe.shape[3] // self.keys.shape[3]

    @cached_property
    def open_columns(self) -> int:
        """One past the last column that is open to some block of queries; 0 when none is."""
        columns = self.open_blocks.any(dim=0).any(dim=0).any(dim=0).nonzero()
        return int(columns[-1]) + 1 if len(columns) > 0 else 0

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``<q, k>`` of one vector per block: (B, Q, H, d) with (B, K, Hkv, d) to (B, H, Q, K), kv heads shared."""
        b, q_blocks, heads, dim = queries.shape
        grouped = queries.reshape(b, q_blocks, keys.shape[2], heads // keys.shape[2], dim)
        return torch.einsum("bqhgd,bkhd->bhgqk", grouped, keys).flatten(1, 2)

    def allowed(self, budget: float | int | None) -> Tensor:
        """How many blocks each block of queries gets: (B or 1, H or 1, Q), int64; all that it may see without a budget.

        A float is the share of the blocks that are open or always chosen, rounded up.
        """
        visible = (self.open_blocks | self.always).sum(-1)
        if budget is None:
            return visible
        if isinstance(budget, float):
            return (visible.double() * budget - 1e-9).ceil().long()  # 0.1 of 30 is 3, though it rounds to a little more
        return visible.clamp(max=budget)

    def part(self, first: int, last: int) -> QueryBlocks:
        """The same for the blocks of queries ``first <= i < last`` of these; blocks of keys are shared."""
        return replace(
            self,
            probes=self.probes.part(first, last),
            open_blocks=self.open_blocks[:, :, first:last],
            always=self.always[:, :, first:last],
            first_block=self.first_block + first,
            lag=self.lag[first:last],
        )


def blocks_problem(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    *,
    key_padding_mask: Tensor | None = None,
    query_start: int | None = None,
    scale: float | None = None,
) -> Problem:
    """The problem of q, k and a pattern, checked as `attend` checks it; its values are the keys."""
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"selection: expected a pattern such as Causal(). Got {type(pattern).__name__}.")
    scale, start = check_inputs(q, k, k, scale=scale, key_padding_mask=key_padding_mask, query_start=query_start)
    problem = make_problem(q, k, k, scale=scale, query_start=start, key_padding_mask=key_padding_mask)
    pattern.check(problem)
    return problem


def table_shape(problem: Problem, block_size: int) -> tuple[int, int, int, int]:
    """(B, H, Q, K) of a table of blocks over all positions up to the last, at least one of each.

    Example:
        >>> q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 9, 1, 8)
        >>> table_shape(make_problem(q, k, k, scale=1.0, query_start=2), 4)
        (2, 4, 2, 3)
    """
    ends = (positions_end(problem.query_positions), positions_end(problem.key_positions))
    rows, columns = (max(1, -(-n // block_size)) for n in ends)
    return max(1, problem.batch), problem.num_heads, rows, columns


def block_bounds(pattern: Pattern, num_heads: int, queries: Block, keys: Block) -> tuple[Tensor, Tensor]:
    """Least and greatest count of every block of queries against every block of keys: (B or 1, H or 1, Q, K)."""
    heads = num_heads if pattern.varies_by_head else 1
    shape = (heads, len(queries.low), len(keys.low))
    head, q, k = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    mine, other = (Block(*(x[i] for x in side)) for side, i in ((queries, q), (keys, k)))
    found = pattern.count_bounds(head, num_heads, mine, other)
    low, high = (torch.as_tensor(x) for x in found)
    return tuple(x.expand(*x.shape[:-1], len(q)).reshape(-1, *shape) for x in (low, high))  # type: ignore[return-value]
