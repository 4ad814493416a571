"""Content-adaptive dilation: LongNet's dilation rates, chosen for each block of queries by how fast queries change.

Legend: B batch, N tokens, H query heads, Q query blocks, S rows of a block, D head dim, R the greatest rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Full, Pattern
from dilated_attention_pytorch.patterns.base import Block, Index
from dilated_attention_pytorch.plans.tiles import BLOCK_SIZE
from dilated_attention_pytorch.problem import Problem, positions_end
from dilated_attention_pytorch.selection.blocks import blocks_problem, table_shape


def _is_whole(x: object, least: int = 1) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _check_max_rate(name: str, rate: object) -> None:
    if not isinstance(rate, int) or not _is_whole(rate) or rate & (rate - 1) != 0:
        raise InvalidInput(f"{name}: expected max_rate to be a power of two. Got {rate!r}.")


@dataclass(frozen=True, eq=False)
class DilatedBlocks(Pattern):
    """Each block of queries sees ``keys`` keys at its own dilation rate, and its own block of tokens; once each.

    ``rates`` is an int table of powers of two up to ``max_rate``, (Q,) for all heads, (H, Q) or (B, H, Q). A query of
    block b, which has rate r, sees every r-th key of its segment of ``keys * r`` tokens: those congruent to
    ``head mod r``, the paper's offset of LongNet's branches (arXiv 2307.02486). So the number of keys is the same at
    every rate. Plans depend on ``max_rate`` where they must not depend on the numbers in the table.

    Raises InvalidInput for ``keys`` (tokens) that are not whole blocks of ``block_size`` tokens, or a table of another
    shape or dtype; `attend` raises it for rates that are no powers of two, or too few.

    Example:
        >>> print(DilatedBlocks(2, 2, torch.tensor([1, 2, 4, 1]), max_rate=4).draw(8))
        11······
        11······
        1·11····
        1·11····
        1···11··
        1···11··
        ······11
        ······11
    """

    block_size: int
    keys: int
    rates: Tensor
    max_rate: int

    def __post_init__(self) -> None:
        if not _is_whole(self.block_size):
            raise InvalidInput(f"DilatedBlocks: expected a block_size of at least 1 token. Got {self.block_size!r}.")
        if not _is_whole(self.keys) or self.keys % self.block_size != 0:
            raise InvalidInput(
                f"DilatedBlocks: expected keys to be a multiple of block_size ({self.block_size}), so that a block "
                f"lies in one segment. Got {self.keys!r}."
            )
        _check_max_rate("DilatedBlocks", self.max_rate)
        table = self.rates
        if not isinstance(table, Tensor) or table.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
            kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise InvalidInput(f"DilatedBlocks: expected rates to be a tensor of integers. Got {kind}.")
        if table.dim() not in (1, 2, 3) or 0 in table.shape:
            raise InvalidInput(
                "DilatedBlocks: expected rates of shape (Q,), (H, Q) or (B, H, Q), at least one block. "
                f"Got {tuple(table.shape)}."
            )

    @property
    def _table(self) -> Tensor:
        """The rates as (B or 1, H or 1, Q), int64."""
        return self.rates.view(*[1] * (3 - self.rates.dim()), *self.rates.shape).long()

    def _cells(self, table: Tensor, head: Tensor, row: Tensor) -> Tensor:
        """Entries of a table (..., B or 1, H or 1, rows); one of several samples gives a dim before the others."""
        row, head = row.clamp(0, table.shape[-1] - 1), head.to(row.device).clamp(max=table.shape[-2] - 1)
        if table.shape[-3] == 1:
            return table[..., 0, head, row]
        sample = torch.arange(table.shape[-3], device=row.device).view(-1, 1, 1, 1)
        return table[..., sample, head, row]

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        head, q, k = (torch.as_tensor(x) for x in (head, q, k))
        rate = self._cells(self._table.to(q.device), head, q // self.block_size)
        width = self.keys * rate
        on_grid = (q // width == k // width) & (k % rate == head % rate)  # a rate divides its segments
        return (on_grid | (q // self.block_size == k // self.block_size)).long()

    @property
    def varies_by_sample(self) -> bool:
        return self.rates.dim() == 3 and self.rates.shape[0] > 1

    def of_sample(self, sample: int) -> DilatedBlocks:
        return replace(self, rates=self.rates[sample]) if self.varies_by_sample else self

    @property
    def key_classes(self) -> int | None:
        modulus = self.max_rate
        while modulus > 1 and self.keys < modulus * BLOCK_SIZE[1]:  # a block at rate 1 reads `modulus` runs of keys
            modulus //= 2
        return modulus if modulus > 1 else None

    @property
    def chosen_rows(self) -> int:
        """Positions of a block of queries."""
        return self.block_size

    @cached_property
    def _rows_of_rate(self) -> Tensor:
        """How many blocks before each have the rate 2^e: (E, B or 1, H or 1, Q + 1)."""
        powers = 1 << torch.arange(self.max_rate.bit_length(), device=self.rates.device)
        rows = (self._table == powers.view(-1, 1, 1, 1)).cumsum(-1, dtype=torch.int32)
        return torch.nn.functional.pad(rows, (1, 0))

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        (top, bottom), (left, right) = ((side.low // self.block_size, side.high // self.block_size) for side in (q, k))
        rows = self._rows_of_rate.to(top.device)
        top, bottom = (x.clamp(0, rows.shape[-1] - 2) for x in (top, bottom))
        held = self._cells(rows, head, bottom + 1) > self._cells(rows, head, top)
        least, most = 1 << held.int().argmax(0), 1 << len(held) - 1 - held.flip(0).int().argmax(0)

        def segments(rate: Tensor) -> tuple[Tensor, ...]:
            return tuple(x // (self.keys * rate) for x in (q.low, q.high, k.low, k.high))

        # segments and grids of powers of two nest: the least rate has the fewest tokens, the greatest the fewest keys
        a, b, c, d = segments(least)
        surely = (a == b) & (a == c) & (a == d) & (k.step % most == 0) & ((k.low - head) % most == 0)
        a, b, c, d = segments(most)
        maybe = (a <= d) & (c <= b) & ((k.low - head) % torch.gcd(k.step, least) == 0)
        return (surely | ((top == bottom) & (top == left) & (top == right))).long(), (
            maybe | ((top <= right) & (left <= bottom))
        ).long()

    def signs(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Tensor, ...]:
        top, bottom = q.low // self.block_size, q.high // self.block_size
        one = top == bottom
        rate = self._cells(self._table.to(top.device), head, top)
        width = self.keys * rate
        inside = (q.low // width == k.low // width) & (q.low // width == k.high // width)
        sample = torch.arange(self.rates.shape[0]).view(-1, 1, 1, 1) if self.varies_by_sample else torch.tensor(0)
        return (
            torch.where(one, rate, 0),
            torch.where(one, torch.where(inside, (k.low - head) % rate, head % rate + self.max_rate), head),
            torch.where(one, q.low % torch.where(inside, self.block_size, width), q.low),
            torch.where(one, 0, sample.to(top.device)),
            k.low - q.low,
        )

    def check(self, problem: Problem) -> None:
        """Raise InvalidInput unless there is a rate for every query, for these heads and samples, a power of two."""
        shape, end = tuple(self.rates.shape), positions_end(problem.query_positions)
        wanted = -(-end // self.block_size)
        if shape[-1] < wanted:
            raise InvalidInput(
                f"DilatedBlocks: queries up to position {end - 1} in blocks of {self.block_size} need {wanted} rates, "
                f"the table has {shape[-1]}; its shape is {shape}. Build it for the whole length."
            )
        if len(shape) > 1 and shape[-2] not in (1, problem.num_heads):
            raise InvalidInput(f"DilatedBlocks: the rates are for {shape[-2]} heads, q has {problem.num_heads}.")
        if len(shape) > 2 and shape[0] not in (1, problem.batch):
            raise InvalidInput(f"DilatedBlocks: the rates are for {shape[0]} samples, q has {problem.batch}.")
        if self.rates.device.type != "meta":
            wrong = (self.rates < 1) | (self.rates & (self.rates - 1) != 0) | (self.rates > self.max_rate)
            if bool(wrong.any()):
                raise InvalidInput(
                    f"DilatedBlocks: expected rates that are powers of two up to max_rate ({self.max_rate}). "
                    f"Got {int(self.rates[wrong][0])}."
                )


@dataclass(frozen=True)
class AdaptiveDilation:
    """From q to dilation rates: fast where queries change little, 1 where they change much, at one budget of keys.

    Called as a `Selector` is. For each block of ``block_size`` queries the local density
    ``rho = mean |q_{i+1} - q_i|`` over its rows and channels sets the share of positions that it sees,
    ``r = 1 + (1 - min(rho / tau, 1)) (1 / R - 1)`` with ``R = max_rate``: between 1 / R where rho is 0 and all of them
    where rho reaches ``tau``. The dilation rate is 1 / r, rounded to a power of two (in its logarithm). These are
    LongNet's branches (arXiv 2307.02486), chosen by content. ``tau`` has the unit of q: independent standard normal
    rows have rho 1.13. ``per_head=False`` takes the mean over heads, and one rate for all of them.

    With a causal pattern rho is that of the block before, so that a choice reads only earlier tokens; the first block
    that is held has rate 1. ``lookahead`` lets it read the block itself (for prefill).

    Raises InvalidInput for a max_rate that is no power of two, a block_size below 1, or a tau that is not positive.
    """

    block_size: int = 128
    max_rate: int = 16
    tau: float = 1.0
    per_head: bool = True
    lookahead: bool = False

    def __post_init__(self) -> None:
        if not _is_whole(self.block_size):
            raise InvalidInput(f"AdaptiveDilation: expected a block_size of at least 1 token. Got {self.block_size!r}.")
        _check_max_rate("AdaptiveDilation", self.max_rate)
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise InvalidInput(f"AdaptiveDilation: expected a tau above 0. Got {self.tau!r}.")

    @torch.no_grad()
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        budget: float | int | None = None,
        pattern: Pattern | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_start: int | None = None,
        scale: float | None = None,
    ) -> Pattern:
        """``pattern & DilatedBlocks(...)``, default Full, for ``q (B, Nq, H, D)`` and ``k (B, Nk, Hkv, D)``.

        ``budget`` is what a block of queries sees: the share in (0, 1] of the blocks of keys, rounded up, or their
        number as an int. Queries at the places of padded keys, and past them, are left out of rho; ``scale`` has no
        part in it. Raises InvalidInput for a budget below one block, and for what `attend` would refuse.

        Example:
            >>> q = torch.zeros(1, 8, 1, 4)
            >>> q[:, 4:] = torch.randn(1, 4, 1, 4).mul(10)
            >>> AdaptiveDilation(4, max_rate=2)(q, q, 1).rates
            tensor([[[2, 1]]], dtype=torch.int32)
        """
        pattern = Full() if pattern is None else pattern
        problem = blocks_problem(q, k, pattern, key_padding_mask=key_padding_mask, query_start=query_start, scale=scale)
        _, _, rows, columns = table_shape(problem, self.block_size)
        keys = self._blocks(budget, columns) * self.block_size
        held = None if problem.key_lengths is None else torch.tensor(problem.key_lengths, device=q.device)
        rho = torch.full((1, 1, rows), torch.inf, device=q.device)
        if q.numel() > 0:
            rho = self.density(q, problem.query_positions[0].start, held)  # (B, H, Q)
        if pattern.is_causal and not self.lookahead:
            rho = torch.cat((torch.full_like(rho[..., :1], torch.inf), rho[..., :-1]), -1)
        found = DilatedBlocks(self.block_size, keys, self.rates(rho), self.max_rate)
        return found if isinstance(pattern, Full) else pattern & found

    def _blocks(self, budget: float | int | None, blocks: int) -> int:
        """The number of blocks that a budget stands for."""
        if _is_whole(budget):
            return int(budget)  # type: ignore[arg-type]
        if isinstance(budget, float) and 1 - 1e-9 <= budget * blocks <= blocks:
            return math.ceil(budget * blocks - 1e-9)  # 0.1 of 30 is 3, though it rounds to a little more
        raise InvalidInput(
            "AdaptiveDilation: expected a budget of at least one block of keys: a number of blocks as an int, or a "
            f"share of the {blocks} blocks in (0, 1]. Got {budget!r}."
        )

    def density(self, q: Tensor, query_start: int = 0, held: Tensor | None = None) -> Tensor:
        """rho of every block of positions: (B, H, Q), with H = 1 unless ``per_head``; float32.

        ``held (B,)`` cuts samples to their first positions. A block with fewer than two rows has rho infinity, so that
        its rate is 1.

        Example:
            >>> AdaptiveDilation(block_size=3).density(torch.tensor([0.0, 1.0, 3.0, 9.0]).view(1, 4, 1, 1))
            tensor([[[1.5000,    inf]]])
        """
        size, (batch, length, heads, _) = self.block_size, q.shape
        blocks = -(-(query_start + length) // size)
        steps = (q[:, 1:].float() - q[:, :-1].float()).abs().mean(-1)  # (B, N - 1, H): from a row to the next
        at = query_start + 1 + torch.arange(max(length - 1, 0), device=q.device)  # where a step ends
        inside = (at % size != 0).expand(batch, -1)
        if held is not None:
            inside = inside & (at < held.view(-1, 1))
        steps = steps.masked_fill(~inside.unsqueeze(-1), 0.0)
        edges = (query_start + 1, blocks * size - query_start - length) if length > 0 else (0, blocks * size)
        steps, inside = (torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 2), *edges)) for x in (steps, inside.float()))
        total = steps.view(batch, blocks, size, heads).sum(2)
        rho = total / inside.view(batch, blocks, size, 1).sum(2)
        rho = torch.nan_to_num(rho if self.per_head else rho.mean(-1, keepdim=True), nan=torch.inf, posinf=torch.inf)
        return rho.transpose(1, 2)

    def rates(self, rho: Tensor) -> Tensor:
        """The dilation rates of blocks with these densities, int32 of the same shape.

        Example:
            >>> AdaptiveDilation(max_rate=8, tau=2.0).rates(torch.tensor([0.0, 0.3, 1.0, 1.5, 2.0, 9.0]))
            tensor([8, 4, 2, 1, 1, 1], dtype=torch.int32)
        """
        share = 1 + (1 - (rho / self.tau).clamp(max=1)) * (1 / self.max_rate - 1)
        return (1 << (-share.log2()).round().int()).int()
