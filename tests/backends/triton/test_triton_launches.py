"""The planner of the Triton backend: every row once, the pattern's counts exactly, heaviest tiles first, little waste."""

import time

import numpy as np
import pytest
import torch

from dilated_attention_pytorch.backends.triton.launches import (
    GROUP_COLUMNS,
    Launch,
    Layout,
    key_launch,
    layout_of,
    query_launches,
)
from dilated_attention_pytorch.patterns import Causal, Documents, Dilated, Pattern, Window, longnet
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
    base, first, residues, rows, entry, entries, _, _, period = launch.group[tile[1]].astype(np.int64)
    i = np.arange(tile[2], min(tile[2] + launch.block[0], rows))
    residue = launch.residue[first : first + residues].astype(np.int64)
    return base + i // residues * period + residue[i % residues], launch.branch_list[entry : entry + entries]


def seen_by(launch: Launch, head: int, branch: int, place: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which places of the document a row on the branch's grid sees: rows are trusted, partners are checked."""
    w, r, causal, window = launch.branch[branch]
    on_grid = other % w % r == launch.offset[head, branch]
    near = (place[:, None] // w == other // w) & (abs(place[:, None] - other) < window) & on_grid
    return near & (place[:, None] >= other) if causal else near


def expand_list(launch: Launch, layout: Layout, by_keys: bool, counts: np.ndarray, written: np.ndarray) -> None:
    """Add the counts of a tile list to (B, H, Nq, Nk), and to `written` (B, heads, rows) each row once."""
    (q0, q1), (k0, k1) = layout.queries, layout.keys
    lows, (other_low, other_high) = (k0, (q0, q1)) if by_keys else (q0, (k0, k1))
    for tile in launch.tile:
        position, entries = tile_rows(launch, tile)
        origin, end = launch.group[tile[1], 6:8]
        other = np.arange(max(origin, other_low), min(end, other_high))
        samples = slice(tile[3], tile[3] + launch.samples)
        np.add.at(written, (samples, tile[0], position - lows), 1)
        for entry in entries:
            local, branch = divmod(int(entry), len(launch.branch))
            if by_keys:
                head = tile[0] * layout.kv_group + local
                seen = seen_by_keys(launch, head, branch, position - origin, other - origin)
                counts[samples, head, (other - q0)[:, None], (position - k0)[None]] += seen.T
            else:
                seen = seen_by(launch, tile[0], branch, position - origin, other - origin)
                counts[samples, tile[0], (position - q0)[:, None], (other - k0)[None]] += seen


def seen_by_keys(launch: Launch, head: int, branch: int, place: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The transposed relation: which queries see a key that stands on the branch's grid."""
    w, r, causal, window = launch.branch[branch]
    on_grid = other % w % r == launch.offset[head, branch]
    near = (place[:, None] // w == other // w) & (abs(place[:, None] - other) < window) & on_grid
    return near & (place[:, None] <= other) if causal else near


def expand_one(launch: Launch, layout: Layout, counts: np.ndarray, written: np.ndarray) -> None:
    """The same for a grid of (tiles, segments, heads) over one branch."""
    (branch,) = launch.branches
    w, r = launch.branch[branch, :2].astype(np.int64)
    tiles, first, segments = launch.grid
    keys = np.arange(*layout.keys)
    for head in range(layout.num_heads):
        place = launch.offset[head, branch] + np.arange(tiles * launch.block[0]) * r
        for segment in range(first, first + segments):
            position = segment * w + place[place < w]
            position = position[(position < layout.queries[1]) & (launch.offset[head, branch] >= 0)]
            counts[:, head, position] += seen_by(launch, head, branch, position, keys)
            written[:, head, position] += 1


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("placed", [(37, 37, 0), (11, 40, 14), (30, 11, 4)], ids=str)
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
    counts, written = np.zeros_like(expected), np.zeros((2, kv_heads, len(k)), dtype=int)
    expand_list(key_launch(layout, BLOCK), layout, True, counts, written)
    np.testing.assert_array_equal(counts, expected)
    assert (written == 1).all()
