"""The odd problems of the contract: patterns, lengths, heads, dims, masks and memory layouts that break kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from dilated_attention_pytorch.patterns import BlockSparse, Causal, Dilated, Documents, Full, Pattern, Window, longnet
from dilated_attention_pytorch.problem import Problem, check_inputs, make_problem
from dilated_attention_pytorch.scores import Relative, Score, Softcap

LAYOUTS = ("plain", "transposed", "fused", "expanded", "last_dim_strided")
"""Memory layouts of q, k and v; see `Case.tensor`."""


@dataclass(frozen=True)
class Case:
    """One problem, made anew for each dtype and device; the numbers are the same everywhere.

    ``key_length``, ``kv_heads`` and ``value_dim`` equal their query side when None. ``visible`` is the number of
    unpadded keys of each sample.

    Example:
        >>> CASES[0].problem(torch.float32).q.shape
        torch.Size([2, 37, 4, 8])
    """

    name: str
    pattern: Pattern
    batch: int = 2
    query_length: int = 37
    key_length: int | None = None
    num_heads: int = 4
    kv_heads: int | None = None
    head_dim: int = 8
    value_dim: int | None = None
    query_start: int | None = None
    visible: tuple[int, ...] | None = None
    layout: str = "plain"
    scale: float | None = None
    bias_shape: tuple[int, ...] | None = None
    score: Score | None = None
    dropout_p: float = 0.0

    def problem(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        """The problem with inputs of order one. The bias holds a few -inf."""
        generator = torch.Generator().manual_seed(20230705)
        keys = self.query_length if self.key_length is None else self.key_length
        heads = self.num_heads if self.kv_heads is None else self.kv_heads
        values = self.head_dim if self.value_dim is None else self.value_dim
        q = self.tensor((self.batch, self.query_length, self.num_heads, self.head_dim), dtype, device, generator)
        k = self.tensor((self.batch, keys, heads, self.head_dim), dtype, device, generator)
        v = self.tensor((self.batch, keys, heads, values), dtype, device, generator)
        mask = bias = None
        if self.visible is not None:
            mask = (torch.arange(keys) >= torch.tensor(self.visible)[:, None]).to(device)
        if self.bias_shape is not None:
            bias = torch.randn(self.bias_shape, generator=generator, dtype=torch.float64)
            bias = bias.masked_fill(torch.rand(self.bias_shape, generator=generator) < 0.1, -torch.inf)
            bias = bias.to(device, dtype)
        scale, start = check_inputs(q, k, v, scale=self.scale, query_start=self.query_start, key_padding_mask=mask)
        seed = torch.tensor([123456789012345], device=device) if self.dropout_p > 0 else None
        return make_problem(
            q,
            k,
            v,
            scale=scale,
            query_start=start,
            bias=bias,
            score=self.score,
            key_padding_mask=mask,
            dropout_p=self.dropout_p,
            seed=seed,
            needs_grad=True,
        )

    def tensor(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator,
    ) -> Tensor:
        """Normal numbers of shape (B, N, H, D) in this case's memory layout."""

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

        b, n, h, d = shape
        if self.layout == "transposed":
            return normal(b, h, n, d).transpose(1, 2)
        if self.layout == "fused":
            return normal(b, n, 3, h, d)[:, :, 1]
        if self.layout == "expanded":
            return normal(1, n, h, d).expand(b, n, h, d)
        if self.layout == "last_dim_strided":
            return normal(b, n, h, d, 2)[..., 0]
        return normal(b, n, h, d)


def _blocks(block_size: int | tuple[int, int], *shape: int, most: int = 1) -> BlockSparse:
    """A table of counts up to ``most``, two in five of them 0; its third row and its second column are empty."""
    generator = torch.Generator().manual_seed(20070714)
    counts = torch.randint(1, most + 1, shape, generator=generator)
    counts[torch.rand(shape, generator=generator) < 0.4] = 0
    counts[..., 2, :], counts[..., :, 1] = 0, 0
    return BlockSparse(block_size, counts)


_PAPER = longnet([8, 16, 32], [1, 2, 4])

PATTERNS: dict[str, Pattern] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(5),
    "window_causal": Window(6) & Causal(),
    "window_of_one": Window(1),
    "dilated": Dilated(16, 4),
    "rate_not_dividing": Dilated(10, 3),
    "rate_above_segment": Dilated(3, 5),
    "longnet": _PAPER,
    "longnet_causal": _PAPER & Causal(),
    "longnet_window": longnet([8, 24], [1, 2]) & Window(7),
    "not_nesting": longnet([6, 10, 9], [1, 3, 2]) & Causal(),
    "same_branch_twice": longnet([8, 8], [2, 2]),
    "sparse_rows": longnet([16, 32], [4, 8]) & Causal(),
    "torchscale_offset": longnet([8, 16], [2, 3], head_offset="torchscale"),
    "head_groups": longnet([8, 16, 32], [1, 2, 4], head_groups=True) & Causal(),
    "sum_with_window": Window(3) + Dilated(16, 2) + Full(),
    "product_of_grids": Dilated(12, 2) & Dilated(20, 3),
    "documents": Documents([7, 0, 13, 17]) & Causal(),
    "documents_of": Documents([7, 0, 13, 5]).of(_PAPER & Causal()),
    "documents_of_window": Documents([11, 1, 20]).of(Window(4)),
    "documents_batched": Documents([[7, 13, 0], [1, 2, 34]]).of(longnet([8, 16], [1, 2])),
    "documents_cut_grid": Documents([7, 13, 17]) & Dilated(16, 2),
    "documents_summed": Documents([20, 17]).of(Causal()) + Window(3),
    "documents_twice": Documents([20, 17]).of(Causal()) + Documents([20, 17]).of(Dilated(8, 2)),
    "blocks_causal": _blocks(5, 4, 9, 9) & Causal(),
    "blocks_batched": _blocks((3, 16), 2, 1, 14, 3, most=3),
    "blocks_documents_of": Documents([7, 0, 13, 17]).of(_blocks(3, 4, 6, 6, most=2) & Causal()),
    "blocks_summed": _blocks(16, 3, 3, most=2) + Dilated(16, 2),
}
"""Patterns by name; all fit a batch of 2 and 4 heads."""

_SHAPES: dict[str, dict[str, object]] = {
    "one_token": {"query_length": 1},
    "length_63": {"query_length": 63},
    "length_100": {"query_length": 100},
    "length_prime": {"query_length": 53},
    "below_segment": {"query_length": 31},
    "one_segment": {"query_length": 32},
    "above_segment": {"query_length": 33},
    "shorter_than_all": {"query_length": 5},
    "queries_last": {"query_length": 9, "key_length": 41},
    "queries_between": {"query_length": 9, "key_length": 41, "query_start": 13},
    "queries_past_keys": {"query_length": 30, "key_length": 11, "query_start": 4},
    "queries_beyond": {"query_length": 4, "key_length": 11, "query_start": 70},
    "whole_query_segments": {"query_length": 16, "key_length": 29, "query_start": 0},
    "whole_key_segments": {"query_length": 29, "key_length": 16, "query_start": 0},
    "decode": {"query_length": 1, "key_length": 39},
    "decode_padded": {"query_length": 1, "key_length": 39, "visible": (39, 12)},
    "grouped_heads": {"num_heads": 6, "kv_heads": 2},
    "one_kv_head": {"num_heads": 5, "kv_heads": 1},
    "one_head": {"num_heads": 1},
    "three_heads": {"num_heads": 3},
    "padded": {"visible": (37, 20)},
    "padded_whole": {"visible": (0, 1)},
    "padded_three": {"batch": 3, "visible": (8, 8, 37)},
    "scaled": {"scale": 0.7},
    "negative_scale": {"scale": -0.3},
    "zero_scale": {"scale": 0.0},
    "transposed": {"layout": "transposed"},
    "fused": {"layout": "fused", "num_heads": 6, "kv_heads": 3},
    "expanded": {"layout": "expanded"},
    "last_dim_strided": {"layout": "last_dim_strided"},
}

_DENSE_ONLY: dict[str, dict[str, object]] = {
    "values_wider": {"value_dim": 13},
    "values_narrower": {"value_dim": 3, "num_heads": 4, "kv_heads": 2},
    "bias": {"bias_shape": (2, 4, 37, 37)},
    "bias_of_keys": {"bias_shape": (37,)},
    "bias_of_heads": {"bias_shape": (1, 4, 1, 37), "kv_heads": 2},
    "bias_padded": {"bias_shape": (2, 1, 37, 1), "visible": (37, 20)},
    "slopes": {"score": Relative(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))},
    "table": {"score": Relative(table=torch.linspace(-1, 1, 4 * 9).view(4, 9)), "kv_heads": 2},
    "softcap": {"score": Softcap(1.5)},
    "softcap_and_bias": {"score": Softcap(1.5), "bias_shape": (37, 37)},
    "dropout": {"dropout_p": 0.3},
    "dropout_grouped": {"dropout_p": 0.5, "kv_heads": 2, "query_length": 9, "key_length": 41, "query_start": 20},
}

_LONG: dict[str, tuple[Pattern, dict[str, object]]] = {
    "causal": (Causal(), {"query_length": 130, "key_length": 331}),
    "window": (Window(70), {"kv_heads": 1}),
    "longnet": (longnet([96, 100, 300], [1, 3, 8]) & Causal(), {"num_heads": 3, "query_length": 317}),
    "not_nesting": (longnet([100, 150], [3, 4]), {"kv_heads": 2, "batch": 2, "visible": (300, 150)}),
    "sum": (Window(9) + longnet([128, 300], [2, 5]) & Causal(), {"head_dim": 24}),
    "product": (Dilated(128, 2) & Dilated(300, 3), {}),
    "documents": (Documents([129, 0, 100, 60]) & Dilated(128, 2) & Causal(), {"num_heads": 2}),
    "blocks": (_blocks(32, 2, 10, 10) & Causal(), {"kv_heads": 1, "batch": 2, "visible": (300, 130)}),
}
"""Longer than the tiles of any kernel."""


def _shaped(name: str, pattern: Pattern, change: dict[str, object]) -> Case:
    return replace(Case(name, pattern), **change)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    *(Case(name, pattern) for name, pattern in PATTERNS.items()),
    *(
        Case(f"{name}-placed", pattern, query_length=11, key_length=40, query_start=14, kv_heads=2, visible=(40, 19))
        for name, pattern in PATTERNS.items()
    ),
    *(_shaped(f"longnet_causal-{name}", _PAPER & Causal(), change) for name, change in _SHAPES.items()),
    *(_shaped(f"not_nesting-{name}", longnet([6, 10, 9], [1, 3, 2]), change) for name, change in _SHAPES.items()),
    *(_shaped(f"window_causal-{name}", Window(6) & Causal(), change) for name, change in _SHAPES.items()),
    *(
        Case(f"longnet_causal-head_dim_{d}", _PAPER & Causal(), batch=1, num_heads=2, head_dim=d)
        for d in (1, 24, 40, 48, 64, 80, 128)
    ),
    *(_shaped(f"longnet_causal-{name}", _PAPER & Causal(), change) for name, change in _DENSE_ONLY.items()),
    *(_shaped(f"full-{name}", Full(), change) for name, change in _DENSE_ONLY.items()),
    Case("blocks_causal-decode", _blocks(5, 4, 9, 9) & Causal(), query_length=1, key_length=39),
    *(
        _shaped(f"long-{name}", pattern, {"batch": 1, "num_heads": 2, "query_length": 300} | change)
        for name, (pattern, change) in _LONG.items()
    ),
)
"""Every case of the contract."""


def random_case(random: Random, name: str = "random") -> Case:
    """A small problem drawn from everything that the definition allows.

    Example:
        >>> random_case(Random(3)).pattern.text() == random_case(Random(3)).pattern.text()
        True
    """
    batch, keys, kv_heads = random.randint(1, 3), random.randint(1, 70), random.randint(1, 3)
    pattern = random_pattern(random, keys)
    queries = random.choice((keys, random.randint(1, keys), 1))
    start = random.choice((None, random.randint(0, keys)))
    visible = tuple(random.randint(0, keys) for _ in range(batch)) if random.random() < 0.3 else None
    return Case(
        name,
        pattern,
        batch=batch,
        query_length=queries,
        key_length=keys,
        num_heads=kv_heads * random.randint(1, 3),
        kv_heads=kv_heads,
        head_dim=random.choice((1, 4, 8)),
        query_start=start,
        visible=visible,
        layout=random.choice(LAYOUTS),
        scale=random.choice((None, None, 0.3, -0.5)),
    )


def random_pattern(random: Random, length: int, depth: int = 2) -> Pattern:
    """A pattern for sequences of about this length (tokens): LongNet's, blocks, a simple one, or a combination."""

    def branches() -> Pattern:
        count = random.randint(1, 3)
        segments = [random.randint(1, max(1, length)) for _ in range(count)]
        rates = [random.randint(1, 6) for _ in range(count)]
        return longnet(segments, rates, head_offset=random.choice(("modulo", "torchscale")))

    def blocks() -> Pattern:
        size, end = (random.randint(1, 20), random.randint(1, 20)), max(2 * length, 140)
        cells = [
            [random.choice((0, 0, 0, 1, 1, 2)) for _ in range(-(-end // size[1]))] for _ in range(-(-end // size[0]))
        ]
        return BlockSparse(size, torch.tensor(cells))

    kind = random.choice(
        ("longnet", "longnet", "causal", "simple", "blocks") + ("and", "sum", "documents") * (depth > 0)
    )
    if kind == "longnet":
        return branches()
    if kind == "causal":
        return branches() & Causal()
    if kind == "blocks":
        return blocks()
    if kind == "simple":
        return random.choice((Full(), Causal(), Window(random.randint(1, length + 1))))
    left = random_pattern(random, length, depth - 1)
    if kind == "documents":
        return Documents([random.randint(0, length) for _ in range(random.randint(1, 4))]).of(left)
    right = random_pattern(random, length, depth - 1)
    return left & right if kind == "and" else left + right
