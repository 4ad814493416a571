"""Adaptive attention as layers: which blocks are computed is chosen from the queries and keys of the call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.compiling import run_eagerly
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import (
    PatternAttention,
    check_max_length,
    check_weights,
    first_that_can,
    place_rows,
    weights_of,
)
from dilated_attention_pytorch.nn.multihead import MultiheadPatternAttention
from dilated_attention_pytorch.nn.shards import over_ranks
from dilated_attention_pytorch.parallel.context import ContextParallel
from dilated_attention_pytorch.patterns import Causal, Documents, Full, Pattern
from dilated_attention_pytorch.patterns.base import And
from dilated_attention_pytorch.scores import Score
from dilated_attention_pytorch.selection import (
    DilatedBlocks,
    MeanPooled,
    SelectedTiles,
    Selector,
    TopBlocks,
    attend_with_coarse,
)

OVERLAPS_KEPT = 256
"""How many of the last overlaps a layer remembers."""


class AdaptiveSparseAttention(PatternAttention):
    """Attention of ready-made heads over the blocks that ``selector`` chooses from the queries and keys of the call.

    ``selector`` is a `Selector`, or is called as one; None is ``Selector(MeanPooled(), TopBlocks())``. ``budget`` is
    the share of blocks that a block of queries gets, or their number as an int; a share below one block is one.
    The choice is within ``pattern`` (default: `Full`), reads no bias, score or dropout, and is a constant to autograd:
    gradients of q, k and v are exactly those of the chosen pairs. Modules in the selector (a learned gate) are
    registered under ``learned``; only their own loss moves them.

    With ``coarse`` the blocks that were not chosen take part as pooled keys (`attend_with_coarse`), so that nothing is
    lost altogether; masks other than padding, dropout and score rules do not go with it.

    With ``keep`` above 1 a choice serves so many calls, one after another, as long as shapes, masks, pattern, mode and
    device stay; else, and after `forget`, the next call chooses anew. A kept choice comes from earlier calls' tokens;
    threads that call one layer together share it, and may use it a few times more. Activation checkpointing runs a
    layer again in backward, by the choice that is kept then: where a later forward may have replaced it, gradients are
    wrong, so run each backward before the next forward, leave ``keep`` at 1, or pass ``selected``.
    ``selected`` is the last choice, and ``overlaps`` has the Jaccard index of each new one with the one before, where
    both are tables of one size. None of this is in the state_dict.

    ``max_length`` (tokens), when given, is checked. ``context_parallel`` may be of one rank only. Other options as in
    `DilatedAttention`. Raises InvalidInput for options that are not legal.

    Example:
        >>> attention = AdaptiveSparseAttention(Selector(MeanPooled(), TopBlocks(), block_size=32), budget=0.25)
        >>> q = k = v = torch.randn(1, 512, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape, attention.selected.layout.shape
        (torch.Size([1, 512, 4, 16]), torch.Size([1, 4, 16, 16]))
    """

    def __init__(
        self,
        selector: Callable[..., Pattern] | None = None,
        budget: float | int | None = 0.1,
        *,
        coarse: bool = False,
        keep: int = 1,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | tuple[str, ...] | None = None,
        pattern: Pattern | None = None,
        score: Score | None = None,
        max_length: int | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
    ) -> None:
        super().__init__(softmax_scale, attention_dropout, op, score, context_parallel)
        self.selector = Selector(MeanPooled(), TopBlocks()) if selector is None else selector
        if not callable(self.selector):
            raise InvalidInput(
                f"expected selector to be a Selector, or called as one. Got {type(self.selector).__name__}."
            )
        self.learned = nn.ModuleDict(_modules_in(self.selector))
        self.budget = _check_budget(budget)
        self.coarse = coarse
        if coarse and (attention_dropout > 0 or score is not None):
            raise InvalidInput(
                "coarse levels have neither dropout nor score rules (alibi): leave out one or the other."
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise InvalidInput(f"expected keep, the calls that a choice serves, to be at least 1. Got {keep!r}.")
        self.keep = keep
        self.pattern = Full() if pattern is None else pattern
        if not isinstance(self.pattern, Pattern):
            raise InvalidInput(f"expected pattern to be a Pattern, such as Full(). Got {type(pattern).__name__}.")
        self.max_length = check_max_length(max_length)
        self.overlaps: deque[float] = deque(maxlen=OVERLAPS_KEPT)
        self._kept: _Kept | None = None

    @property
    def selected(self) -> Pattern | None:
        """The last choice; None before the first call, and after `forget`."""
        return None if self._kept is None else self._kept.chosen

    def forget(self) -> None:
        """The next call chooses anew, and its choice is compared with none."""
        self._kept = None

    def checked_context(self, context: ContextParallel | DeviceMesh | None) -> ContextParallel | None:
        """``context``, of one rank: a choice reads all queries and keys. Raises InvalidInput for more ranks."""
        checked = super().checked_context(context)
        if over_ranks(checked) is not None:
            raise InvalidInput(
                f"{type(self).__name__} chooses from all queries and keys, which no rank holds: leave out "
                "context_parallel, or use a layer whose pattern is known before, such as BlockSparseAttention."
            )
        return checked

    def choose_pattern(self, query: Tensor, key: Tensor, is_causal: bool, query_start: int | None) -> Pattern:
        """What a choice is made within, causal on request."""
        if not is_causal or self.pattern.is_causal:
            return self.pattern
        return Causal() if isinstance(self.pattern, Full) else self.pattern & Causal()

    @run_eagerly("AdaptiveSparseAttention chooses blocks from the numbers in q and k: compile without fullgraph")
    def forward(  # type: ignore[override]  # no rows of a shard: it wants the whole
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_start: int | None = None,
        documents: Documents | None = None,
        need_weights: bool = False,
        selected: Pattern | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `DilatedAttention.forward`, over the chosen blocks.

        ``selected`` is another layer's choice, used for this call within this call's own pattern, mask and documents;
        what this layer keeps stays as it is. Blocks are counted from the first token, not from each document's.
        """
        self.checked_context(self.context_parallel)  # the group may have grown since it was set
        place_rows(query, key, query_start, self.max_length)
        if need_weights:
            check_weights(query, key)
        if self.coarse and attention_mask is not None:
            raise InvalidInput("coarse levels pool keys that a mask would tell apart: leave out the mask, or coarse.")
        pattern = self.choose_pattern(query, key, is_causal, query_start)
        if documents is not None:
            pattern = documents.of(pattern)
        asked, kept = None, self._kept  # read once: another thread may replace it
        if selected is not None:
            chosen = _within(pattern, selected)
        else:
            asked = self._ask(query, key, pattern, key_padding_mask, query_start)
            if kept is not None and self._serves(kept, asked):
                chosen = kept.chosen
            else:
                chosen = self._choose(query, key, pattern, key_padding_mask, query_start)
        result = self._attend(query, key, value, chosen, attention_mask, key_padding_mask, query_start, need_weights)
        if asked is not None and not _in_backward():
            self._remember(chosen, asked, kept)
        return result

    def extra_repr(self) -> str:
        """The selector and the options."""
        options = f"budget={self.budget}, coarse={self.coarse}, keep={self.keep}, backend={self.backend!r}"
        return f"{self.selector}, {options}, pattern={self.pattern.text()}"

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        attention_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        query_start: int | None,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.coarse:
            return super()._attend(
                query, key, value, pattern, attention_mask, key_padding_mask, query_start, need_weights
            )
        if not isinstance(pattern, SelectedTiles):
            raise InvalidInput(
                f"coarse levels need a selector of blocks. {self.selector} chose {type(pattern).__name__}."
            )
        both = partial(
            attend_with_coarse,
            query,
            key,
            selected=pattern,
            scale=self.softmax_scale,
            key_padding_mask=key_padding_mask,
            query_start=query_start,
        )
        out = first_that_can(self.backend, partial(both, v=value))
        if not need_weights:
            return out
        return out, weights_of(query, key, lambda v: both(v=v, backend="dense"))

    def _ask(
        self, query: Tensor, key: Tensor, pattern: Pattern, mask: Tensor | None, query_start: int | None
    ) -> _Asked:
        facts = (query.shape, key.shape, query_start, str(query.device), self.training, self.selector, self.budget)
        tables = pattern.tables if mask is None else (*pattern.tables, mask.clone())
        return _Asked((*facts, pattern.text(), mask is None), tables if self.keep > 1 else ())

    def _serves(self, kept: _Kept, asked: _Asked) -> bool:
        """Whether a call is served by an earlier choice."""
        # a checkpointed layer runs again in backward, and must use what it used
        served = kept.served - 1 if _in_backward() else kept.served
        return served < self.keep > 1 and asked.equals(kept.asked)

    def _choose(
        self,
        query: Tensor,
        key: Tensor,
        pattern: Pattern,
        key_padding_mask: Tensor | None,
        query_start: int | None,
    ) -> Pattern:
        with torch.no_grad():
            return self.selector(
                query,
                key,
                self._budget_of(key.shape[1]),
                pattern,
                key_padding_mask=key_padding_mask,
                query_start=query_start,
                scale=self.softmax_scale,
            )

    def _budget_of(self, key_length: int) -> float | int | None:
        """The budget, at least one block of keys."""
        size = getattr(self.selector, "block_size", None)
        if isinstance(self.budget, float) and isinstance(size, int) and self.budget * -(-key_length // size) < 1:
            return 1
        return self.budget

    def _remember(self, chosen: Pattern, asked: _Asked, kept: _Kept | None) -> None:
        """What was ``kept`` when the call began has served once more, or is replaced."""
        if kept is not None and chosen is kept.chosen:
            if self._kept is kept:
                self._kept = replace(kept, served=kept.served + 1)
            return
        if kept is not None and asked.facts == kept.asked.facts:
            self.overlaps.extend(_overlap(chosen, kept.chosen))
        self._kept = _Kept(chosen, asked, 1)


class MultiheadAdaptiveSparseAttention(MultiheadPatternAttention):
    """Projections, adaptive attention, sub-LayerNorm and output projection.

    ``selector``, ``budget``, ``coarse``, ``keep``, ``pattern`` and ``max_length`` are those of
    `AdaptiveSparseAttention`, which is the module ``attention``; the others are those of `MultiheadDilatedAttention`.
    ``position="xpos"`` counts from the middle of ``max_length``, and needs it. A call takes another layer's choice as
    ``selected``.

    Example:
        >>> chooser = Selector(MeanPooled(), TopBlocks(), block_size=32)
        >>> layer = MultiheadAdaptiveSparseAttention(64, 4, chooser, budget=3, position="rotary")
        >>> layer(torch.randn(2, 300, 64), is_causal=True).shape, layer.attention.selected.density < 0.35
        (torch.Size([2, 300, 64]), True)
    """

    attention: AdaptiveSparseAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        selector: Callable[..., Pattern] | None = None,
        budget: float | int | None = 0.1,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        op: str | tuple[str, ...] | None = None,
        *,
        coarse: bool = False,
        keep: int = 1,
        num_kv_heads: int | None = None,
        position: str = "none",
        pattern: Pattern | None = None,
        max_length: int | None = None,
        context_parallel: ContextParallel | DeviceMesh | None = None,
    ) -> None:
        if position == "xpos" and max_length is None:
            raise InvalidInput("xpos counts from the middle of max_length: give max_length=, or use 'rotary'.")
        if position == "alibi" and coarse:
            raise InvalidInput("coarse levels have no score rules: leave out coarse, or use 'rotary'.")
        attention = AdaptiveSparseAttention(
            selector,
            budget,
            coarse=coarse,
            keep=keep,
            attention_dropout=dropout,
            op=op,
            pattern=pattern,
            max_length=max_length,
            context_parallel=context_parallel,
        )
        super().__init__(
            embed_dim,
            num_heads,
            attention,
            bias=bias,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
            num_kv_heads=num_kv_heads,
            position=position,
            segment_lengths=None if max_length is None else (max_length,),
        )


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a choice was made for."""

    facts: tuple[Any, ...]
    tables: tuple[Tensor, ...]

    def equals(self, other: _Asked) -> bool:
        if self.facts != other.facts:
            return False
        return all(a is b or torch.equal(a, b) for a, b in zip(self.tables, other.tables, strict=True))


@dataclass(frozen=True, eq=False)
class _Kept:
    """A choice, what it was made for, and how many calls it has served; replaced as one, so that threads see one."""

    chosen: Pattern
    asked: _Asked
    served: int


def _overlap(chosen: Pattern, before: Pattern) -> tuple[float, ...]:
    """The Jaccard index of two choices; nothing unless both are tables of one size."""
    if not isinstance(chosen, SelectedTiles) or not isinstance(before, SelectedTiles):
        return ()
    if chosen.layout.shape != before.layout.shape or chosen.blocks.block_size != before.blocks.block_size:
        return ()
    return (chosen.overlap(before),)


def _within(pattern: Pattern, selected: Pattern) -> Pattern:
    """What was chosen elsewhere, of ``pattern``."""
    if isinstance(selected, SelectedTiles):
        return SelectedTiles(selected.blocks, pattern)
    rates = selected.right if isinstance(selected, And) else selected
    if isinstance(rates, DilatedBlocks):
        return pattern & rates
    raise InvalidInput(
        f"expected selected to be another layer's choice (its .selected). Got {type(selected).__name__}; a pattern of "
        "one's own is the layer's pattern=."
    )


def _in_backward() -> bool:
    """Whether autograd is at work in this thread: then a forward is a checkpointed one, computed again."""
    return torch._C._current_graph_task_id() != -1


def _check_budget(budget: float | int | None) -> float | int | None:
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise InvalidInput(f"expected budget as float (share), int (blocks) or None. Got {budget!r}.")
    if budget < 1 if isinstance(budget, int) else not 0.0 < budget <= 1.0:
        raise InvalidInput(f"expected budget as a share in (0, 1], or blocks as an int of at least 1. Got {budget!r}.")
    return budget


def _modules_in(selector: object) -> dict[str, nn.Module]:
    """The modules that a selector of dataclasses holds, by the path of their fields."""
    found: dict[str, nn.Module] = {}
    if is_dataclass(selector) and not isinstance(selector, nn.Module):
        for f in fields(selector):
            part = getattr(selector, f.name)
            if isinstance(part, nn.Module):
                found[f.name] = part
            else:
                found |= {f"{f.name}_{name}": module for name, module in _modules_in(part).items()}
    return found
