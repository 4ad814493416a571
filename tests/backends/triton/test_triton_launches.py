"""The planner of the Triton backend: every row once, exact counts, heaviest tiles first, little waste."""


import numpy as np
import pytest
import torch

from dilated_attention_pytorch.backends.triton.launches import (
    Launch,
    Layout,
    key_launches,
    layout_of,
    query_launches,
)
from dilated_attention_pytorch.patterns import Causal, Window, longnet
from dilated_attention_pytorch.plans.base import block_counts
from dilated_attention_pytorch.problem import make_problem, positions_tensor
from dilated_attention_pytorch.testing.cases import PATTERNS

BLOCK = (16, 8)
MILLION = 1 << 20
PAPER = longnet([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
GIGAPATH = longnet([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16])

ODD = {
    **{name: p for name, p in PATTERNS.items() if p.branches() is not None and name != "documents_summed"},
    "gigapath_small": longnet([10, 58, 75, 96], [1, 2, 8, 16]) & Causal(),  # 75 % 8 = 3, as 185363 % 8
    "paper_small": longnet([4, 16, 32], [2, 6, 12]),  # 16 % 6 = 4, as 16384 % 6
    "not_dividing_causal": longnet([7, 11, 23], [2, 3, 5], head_offset="torchscale") & Causal() & Window(9),
    "long_rates": longnet([37, 64], [7, 11]),
}


def problem_of(queries: int, keys: int, start: int, heads: int = 4, kv_heads: int = 4):
    q, k = torch.zeros(2, queries, heads, 8), torch.zeros(2, keys, kv_heads, 8)
    return make_problem(q, k, k, scale=1.0, query_start=start)


def tile_rows(launch: Launch, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a tile's rows and its group's branch list."""
    base, first, residues, rows, period, entry, entries, _ = launch.group[tile[1]].astype(np.int64)
    i = np.arange(tile[2], min(tile[2] + launch.block[0], rows))
    residue = launch.residue[first : first + residues].astype(np.int64)
    return base + i // residues * period + residue[i % residues], launch.branch_list[entry : entry + entries]


def seen_by(launch: Launch, head: int, column: int, query: np.ndarray, key: np.ndarray, by_keys: bool) -> np.ndarray:
    """Which keys queries see in a branch, by places. The tiles' side is trusted to be on the grid, the other is not."""
    w, r, behind, ahead = launch.branch[column].astype(np.int64)
    distance = key - query[:, None]
    seen = (query[:, None] // w == key // w) & (distance >= -behind) & (distance <= ahead)
    free = query[:, None] if by_keys else key
    return seen & (free % w % r == launch.offset[head, column])


def expand_list(launch: Launch, layout: Layout, by_keys: bool, counts: np.ndarray, written: np.ndarray) -> None:
    """Add the counts of a tile list to (B, H, Nq, Nk), and each of its rows to `written` (B, heads, rows)."""
    mine, others = (layout.keys, layout.queries) if by_keys else (layout.queries, layout.keys)
    bounds = np.array([[0, layout.end]]) if layout.bounds is None else layout.bounds
    for tile in launch.tile:
        row, entries = tile_rows(launch, tile)
        origin = launch.group[tile[1], 7]
        end = min((x for x in bounds[tile[3]] if x > origin), default=layout.end)
        other = np.arange(max(origin, others[0]), min(end, others[1]))
        samples = slice(tile[3], tile[3] + launch.samples)
        np.add.at(written, (samples, tile[0], row - mine[0]), 1)
        query, key = (other, row) if by_keys else (row, other)
        for entry in entries:
            local, column = divmod(int(entry), len(launch.branch))
            head = tile[0] * layout.kv_group + local if by_keys else tile[0]
            seen = seen_by(launch, head, column, query - origin, key - origin, by_keys)
            counts[samples, head, (query - layout.queries[0])[:, None], (key - layout.keys[0])[None]] += seen


def expand_one(launch: Launch, layout: Layout, counts: np.ndarray, written: np.ndarray) -> None:
    """The same for a grid of (tiles, segments, heads) over one branch."""
    w, r = launch.branch[0, :2].astype(np.int64)
    tiles, first, segments = launch.grid
    low, high = layout.queries
    key = np.arange(*layout.keys)
    for head in np.flatnonzero(launch.offset[:, 0] >= 0):
        place = launch.offset[head, 0] + np.arange(tiles * launch.block[0]) * r
        for segment in range(first, first + segments):
            query = segment * w + place[place < w]
            query = query[(query >= low) & (query < high)]
            seen = seen_by(launch, head, 0, query, key, False)
            counts[:, head, (query - low)[:, None], (key - layout.keys[0])[None]] += seen
            written[:, head, query - low] += 1


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("placed", [(37, 37, 0), (11, 40, 14), (30, 11, 4), (29, 16, 0)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_launches_hold_the_pattern(name: str, placed: tuple[int, int, int], kv_heads: int):
    pattern, problem = ODD[name], problem_of(*placed, kv_heads=kv_heads)
    branches = pattern.branches()
    layout = layout_of(problem, branches)
    head = torch.arange(4)
    q, k = (positions_tensor(x) for x in (problem.query_positions, problem.key_positions))
    expected = block_counts(pattern, problem, head, q, k).expand(2, 4, len(q), len(k)).numpy()
    for split in (None, [[i] for i in range(len(branches))]):
        counts = np.zeros_like(expected)
        for i, launch in enumerate(query_launches(layout, BLOCK, split)):
            written = np.zeros((2, 4, len(q)), dtype=int)
            if launch.kind == "one":
                expand_one(launch, layout, counts, written)
            else:
                expand_list(launch, layout, False, counts, written)
            assert launch.carry == (i > 0)
            assert (written <= 1).all()
            assert launch.carry or (written == 1).all()
        np.testing.assert_array_equal(counts, expected)
        counts = np.zeros_like(expected)
        for i, launch in enumerate(key_launches(layout, BLOCK, split)):
            written = np.zeros((2, kv_heads, len(k)), dtype=int)
            expand_list(launch, layout, True, counts, written)
            assert (written <= 1).all()
            assert i or (written == 1).all()
        np.testing.assert_array_equal(counts, expected)
