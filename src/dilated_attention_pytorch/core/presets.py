"""Branches by name, what any branches cost and reach, and branches for a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dilated_attention_pytorch.core.config import DilatedAttentionConfig
from dilated_attention_pytorch.core.factory import create_multihead_dilated_attention
from dilated_attention_pytorch.core.names import nearest
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.flops import counted_pairs, forward_flops
from dilated_attention_pytorch.models.config import BASE_DILATION_RATES, BASE_SEGMENT_LENGTHS
from dilated_attention_pytorch.patterns import Branch, Pattern, longnet
from dilated_attention_pytorch.problem import make_problem

EXACT_TOKENS = 4096
"""Up to so many tokens reach and coverage are those of every query; above, of some, over some of the keys."""
SAMPLED_TOKENS = 1 << 16
SAMPLED_QUERIES = 32
RUN = 256
"""Sampled tokens are runs of so many."""
GROWTHS = (2, 4, 8)
"""By what factors `suggest_branches` lets segments and rates grow."""
LEAST_SEGMENT = 64
MOST_TOKENS = 1 << 40


def _preset(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], head_offset: str = "modulo"
) -> Mapping[str, Any]:
    preset: dict[str, Any] = {"segment_lengths": tuple(segment_lengths), "dilation_rates": tuple(dilation_rates)}
    if head_offset != "modulo":
        preset["head_offset"] = head_offset
    return MappingProxyType(preset)


_FIVE = (1, 2, 4, 8, 16)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # the migration guide of 0.2
        "small": _preset((1024, 2048), (1, 2)),
        "medium": _preset((2048, 4096, 8192), (1, 2, 4)),
        "large": _preset((4096, 8192, 16384, 32768), (1, 2, 4, 8)),
        # arXiv 2307.02486, section 4.1
        "longnet-base": _preset(BASE_SEGMENT_LENGTHS, BASE_DILATION_RATES),
        # torchscale's weights: Prov-GigaPath's slide encoder; LongViT (arXiv 2312.03558), by pictures of 1024 to 32768
        "gigapath": _preset((1024, 5792, 32768, 185363, 1048576), _FIVE, "torchscale"),
        "longvit-1k": _preset((64, 128, 256, 512, 1024), _FIVE, "torchscale"),
        "longvit-4k": _preset((1024, 2048, 4096, 8192, 16384), _FIVE, "torchscale"),
        "longvit-8k": _preset((1024, 4096, 8192, 16384, 65536), _FIVE, "torchscale"),
        "longvit-16k": _preset((1024, 4096, 16384, 65536, 262144), _FIVE, "torchscale"),
        "longvit-32k": _preset((1024, 4096, 32768, 262144, 1048576), _FIVE, "torchscale"),
        # ours: a file, then a repository; a gene, then a bacterium's genome
        "code": _preset((1024, 4096, 16384, 65536), (1, 2, 4, 8)),
        "genome": _preset((2048, 16384, 131072, 1048576), (1, 4, 16, 64)),
    }
)
"""Options for the factories, by name: segment lengths (tokens), rates, and head offsets other than the paper's."""


@dataclass(frozen=True)
class BranchFacts:
    """What branches cost and reach, in a sequence of ``tokens``, not causal.

    ``flops_per_token``: of one layer's attention, forward, all heads, mean over the tokens. ``reach``: the layers after
    which every query has heard of every key; None where some never do. ``coverage``: the share of keys that a query
    sees in one layer, by any head, mean over queries. Where ``is_exact`` is False, reach and coverage are estimates:
    those of sampled queries and keys, connected through sampled tokens.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    tokens: int
    num_heads: int
    head_dim: int
    flops_per_token: float
    reach: int | None
    coverage: float
    is_exact: bool


def create_attention_from_preset(
    name: str, embed_dim: int, num_heads: int, kind: str = "auto", **options: Any
) -> nn.Module:
    """`create_multihead_dilated_attention` with the branches of `PRESETS`; ``options`` are its own.

    Raises InvalidInput for a name that is not there, with the nearest one.

    Example:
        >>> layer = create_attention_from_preset("small", 64, 4)
        >>> layer.attention.segment_lengths, layer.attention.dilation_rates
        ((1024, 2048), (1, 2))
    """
    return create_multihead_dilated_attention(kind, embed_dim, num_heads, **{**find_preset(name), **options})


def find_preset(name: str) -> Mapping[str, Any]:
    """The preset of this name; InvalidInput with the nearest one where there is none."""
    if name not in PRESETS:
        raise InvalidInput(f"there is no preset {name!r}{nearest(str(name), PRESETS)}")
    return PRESETS[name]


def describe_branches(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    tokens: int | None = None,
    *,
    num_heads: int = 12,
    head_dim: int = 64,
    head_offset: str = "modulo",
) -> BranchFacts:
    """What these branches cost and reach in a sequence of ``tokens``, by default the longest segment.

    Raises InvalidInput for lists that do not fit, or numbers below 1.

    Example:
        >>> facts = describe_branches([4, 16], [1, 4], num_heads=4, head_dim=8)
        >>> facts.flops_per_token, facts.reach, facts.coverage
        (640.0, 2, 0.4375)
    """
    config = DilatedAttentionConfig(segment_lengths, dilation_rates)
    tokens = config.max_segment_length if tokens is None else tokens
    for name, value in {"tokens": tokens, "num_heads": num_heads, "head_dim": head_dim}.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
            raise InvalidInput(f"{name} must be an int from 1 to {MOST_TOKENS}, got {value!r}")
    pattern = longnet(config.segment_lengths, config.dilation_rates, head_offset=head_offset)
    flops = _flops_per_token(pattern, tokens, num_heads, head_dim)
    is_exact = tokens <= EXACT_TOKENS
    places = _places(config, tokens)
    reach = _reach(_meetings(pattern, places, tokens, num_heads))
    if not is_exact:  # runs favour neighbours
        places = np.sort(np.random.default_rng(1).integers(0, tokens, SAMPLED_TOKENS))
    coverage = _coverage(_meetings(pattern, places, tokens, num_heads), is_exact)
    return BranchFacts(
        tuple(config.segment_lengths),
        tuple(config.dilation_rates),
        tokens,
        num_heads,
        head_dim,
        flops,
        reach,
        coverage,
        is_exact,
    )


def suggest_branches(
    max_tokens: int, *, flop_budget_per_token: float, num_heads: int = 12, head_dim: int = 64
) -> BranchFacts:
    """Branches up to ``max_tokens`` whose attention costs at most a budget of FLOPs a token and layer, forward.

    Segments and rates grow together by a factor of 2, 4 or 8, as LongNet's do (arXiv 2307.02486, section 2.2), from the
    longest exact segment that the budget allows to ``max_tokens``. Of these the one of fewest layers to reach every key
    is taken, then that of most coverage. Full attention costs ``4 max_tokens num_heads head_dim``.

    Raises InvalidInput for a budget below the least: that of segments of 64 tokens.

    Example:
        >>> facts = suggest_branches(4096, flop_budget_per_token=2e6, num_heads=8, head_dim=32)
        >>> facts.segment_lengths, facts.dilation_rates, facts.flops_per_token <= 2e6, facts.reach
        ((1024, 2048, 4096), (1, 2, 4), True, 2)
    """
    config: dict[str, Any] = {"tokens": max_tokens, "num_heads": num_heads, "head_dim": head_dim}
    describe_branches((1,), (1,), **config)  # checks the numbers
    candidates: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    cheapest = float("inf")
    for growth in GROWTHS:
        segment = 1 << (max_tokens - 1).bit_length()
        while segment >= min(LEAST_SEGMENT, max_tokens):
            branches = _series(segment, growth, max_tokens)
            cost = _flops_per_token(longnet(*branches), max_tokens, num_heads, head_dim)
            cheapest = min(cheapest, cost)
            if cost <= flop_budget_per_token:
                candidates[branches] = cost
                break
            segment //= 2
    if not candidates:
        raise InvalidInput(
            f"flop_budget_per_token={flop_budget_per_token:g} is below what {max_tokens} tokens, {num_heads} heads of "
            f"{head_dim} and segments of {LEAST_SEGMENT} tokens cost: {cheapest:.4g}"
        )
    found = [describe_branches(*branches, **config) for branches in candidates]
    return min(found, key=lambda facts: (float("inf") if facts.reach is None else facts.reach, -facts.coverage))


def preset_table(num_heads: int = 12, head_dim: int = 64) -> str:
    """`PRESETS` as a table in Markdown, with FLOPs a token, reach and coverage at the length of the longest segment."""
    rows = ["| preset | segments | rates | FLOPs a token | reach, layers | coverage |", "|---|---|---|---|---|---|"]
    for name, preset in PRESETS.items():
        facts = describe_branches(**preset, num_heads=num_heads, head_dim=head_dim)
        lists = (" ".join(map(str, preset[key])) for key in ("segment_lengths", "dilation_rates"))
        reach = "never" if facts.reach is None else str(facts.reach)
        flops = f"{facts.flops_per_token / 1e6:.1f} M"
        rows.append("| " + " | ".join((f"`{name}`", *lists, flops, reach, f"{facts.coverage:.1%}")) + " |")
    return "\n".join(rows) + "\n"


def _series(segment: int, growth: int, longest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segments and rates that grow together, up to a last segment that holds everything."""
    lengths, rates = [min(segment, longest)], [1]
    while lengths[-1] < longest:
        lengths.append(min(lengths[-1] * growth, longest))
        rates.append(rates[-1] * growth)
    return tuple(lengths), tuple(rates)


def _flops_per_token(pattern: Pattern, tokens: int, num_heads: int, head_dim: int) -> float:
    x = torch.empty(1, tokens, num_heads, head_dim, device="meta")
    pairs, _ = counted_pairs(pattern, make_problem(x, x, x, scale=1.0, query_start=0))
    return forward_flops(pairs, head_dim, head_dim) / tokens


def _places(config: DilatedAttentionConfig, tokens: int) -> npt.NDArray[np.int64]:
    """All tokens, or runs of them: the first, the last, others at random (always the same), and at the grids of each.

    A run that starts at a multiple of a rate has the places of a grid that its heads meet at, if its segment has whole
    periods: the way out of the runs near it.
    """
    if tokens <= EXACT_TOKENS:
        return np.arange(tokens)
    bases = SAMPLED_TOKENS // RUN // (config.num_groups + 1)
    starts = np.random.default_rng(0).integers(0, tokens - RUN, max(bases - 2, 1))
    starts = np.concatenate(([0, tokens - RUN], starts))
    starts = np.concatenate([starts, *(starts // rate * rate for rate in config.dilation_rates)])
    places = np.unique(np.unique(starts)[:, None] + np.arange(RUN))
    return places[places < tokens]


def _meetings(
    pattern: Pattern, places: npt.NDArray[np.int64], tokens: int, num_heads: int
) -> list[npt.NDArray[np.int64]]:
    """For each branch, the number of the group in which a token meets others in one layer; -1 where it meets none.

    Tokens of one segment and one place of its grid see each other, if some head has that place.
    """
    branches: tuple[Branch, ...] = pattern.branches() or ()
    found = []
    for branch in branches:
        width, rate = min(branch.segment_length or tokens, tokens), branch.dilation_rate
        heads = np.array([int(branch.offset(head, num_heads)) for head in range(num_heads)])
        place = places % width % rate
        group = places // width * rate + place
        found.append(np.where(np.isin(place, heads), group, -1))
    return found


def _reach(meetings: list[npt.NDArray[np.int64]]) -> int | None:
    """Layers until all tokens have heard of each query; None where some never do. Of many tokens some are queries."""
    size, layers = len(meetings[0]), 1
    numbered = [np.unique(groups, return_inverse=True) for groups in meetings]
    for query in _spread(size, size if size <= EXACT_TOKENS else SAMPLED_QUERIES):
        heard, count = np.zeros(size, dtype=bool), 0
        heard[query] = True
        while not heard.all():
            before, fresh = int(heard.sum()), heard.copy()
            for names, number in numbered:
                is_open = np.zeros(len(names), dtype=bool)
                is_open[number[heard]] = True
                fresh |= (is_open & (names >= 0))[number]
            heard, count = fresh, count + 1
            if int(heard.sum()) == before:
                return None
        layers = max(layers, count)
    return layers


def _coverage(meetings: list[npt.NDArray[np.int64]], is_exact: bool) -> float:
    """The mean share of tokens that share a group with a query."""
    size, shares = len(meetings[0]), []
    for query in _spread(size, size if is_exact else SAMPLED_QUERIES):
        seen = np.zeros(size, dtype=bool)
        for groups in meetings:
            if groups[query] >= 0:
                seen |= groups == groups[query]
        shares.append(seen.mean())
    return float(np.mean(shares))


def _spread(size: int, number: int) -> npt.NDArray[np.int64]:
    """So many of ``size`` places at even distances, from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(number, size)).round().astype(np.int64))
