"""The planner of the Triton backend: every row once, exact counts, heaviest tiles first, little waste."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from dilated_attention_pytorch.backends.triton.costs import (
    DEVICES,
    GENERIC,
    ROLES,
    Device,
    choose_split,
    device_named,
    launch_seconds,
)
from dilated_attention_pytorch.backends.triton.groups import make_groups, split_documents
from dilated_attention_pytorch.backends.triton.launches import (
    TILE_OVERHEAD,
    Launch,
    Layout,
    head_entries,
    key_launches,
    layout_of,
    query_launches,
)
from dilated_attention_pytorch.patterns import Causal, Dilated, Documents, Full, Pattern, Window, longnet
from dilated_attention_pytorch.plans.base import block_counts
from dilated_attention_pytorch.problem import make_problem, positions_tensor
from dilated_attention_pytorch.testing.cases import PATTERNS

BLOCK = (128, 64)
MILLION = 1 << 20
H100 = DEVICES["H100"]
PAPER = longnet([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
GIGAPATH = longnet([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16])

ODD = {
    **{name: p for name, p in PATTERNS.items() if p.branches() is not None and name != "documents_summed"},
    "gigapath_small": longnet([10, 58, 75, 96], [1, 2, 8, 16]) & Causal(),  # 75 % 8 = 3, as 185363 % 8
    "paper_small": longnet([4, 16, 32], [2, 6, 12]),  # 16 % 6 = 4, as 16384 % 6
    "not_dividing_causal": longnet([7, 11, 23], [2, 3, 5], head_offset="torchscale") & Causal() & Window(9),
    "long_rates": longnet([37, 64], [7, 11]),
    "short_documents": Documents([1, 2, 1, 1, 20, 3, 1]).of(longnet([8, 16], [1, 3])),
    "equal_documents": Documents([6] * 6).of(longnet([8, 8], [5, 3])),
}


def problem_of(queries: int, keys: int, start: int, kv_heads: int = 4):
    q, k = torch.zeros(2, queries, 4, 8), torch.zeros(2, keys, kv_heads, 8)
    return make_problem(q, k, k, scale=1.0, query_start=start)


def layout_at(pattern: Pattern, length: int, heads: int, kv_group: int = 1) -> Layout:
    return Layout(pattern.branches(), heads, kv_group, 1, (0, length), (0, length))


def tile_rows(launch: Launch, tile: np.ndarray) -> np.ndarray:
    """Positions of a tile's rows."""
    base, first, residues, rows, period = launch.group[tile[1], :5].astype(np.int64)
    i = np.arange(tile[2], min(tile[2] + launch.block[0], rows))
    return base + i // residues * period + launch.residue[first : first + residues].astype(np.int64)[i % residues]


def documents_of(layout: Layout, sample: int, position: np.ndarray) -> np.ndarray:
    """(first position, one past the last) of each position's document; empty past the last document: (2, rows)."""
    bounds = np.array([0, layout.end]) if layout.bounds is None else layout.bounds[min(sample, len(layout.bounds) - 1)]
    bounds = np.append(bounds, max(bounds[-1], layout.end) + 1)
    document = np.searchsorted(bounds, position, side="right") - 1
    inside = document < len(bounds) - 2
    return np.stack([bounds[document], np.where(inside, bounds[document + 1], bounds[document])])


def on_grid(launch: Launch, head: int, column: int, place: np.ndarray) -> np.ndarray:
    w, r = launch.branch[column, :2].astype(np.int64)
    return place % w % r == launch.offset[head, column]


def seen(launch: Launch, head: int, column: int, query: np.ndarray, key: np.ndarray, layout: Layout, sample: int):
    """Which keys queries see in a branch, from positions and the branch's table alone, as a kernel finds it."""
    w, _, behind, ahead = launch.branch[column].astype(np.int64)
    origin, end = documents_of(layout, sample, query)
    q, k = (query - origin)[:, None], key - origin[:, None]
    inside = (k >= 0) & (key < end[:, None]) & (query < end)[:, None]
    near = (q // w == k // w) & (k - q >= -behind) & (k - q <= ahead)
    return inside & near & on_grid(launch, head, column, q) & on_grid(launch, head, column, k)


def expand_list(launch: Launch, layout: Layout, by_keys: bool, counts: np.ndarray, written: np.ndarray) -> None:
    """Add what a kernel would count by the branch lists to (B, H, Nq, Nk), and its rows to `written` (B, heads, N)."""
    low, others = (layout.keys[0], layout.queries) if by_keys else (layout.queries[0], layout.keys)
    for tile in launch.tile:
        row, other = tile_rows(launch, tile), np.arange(*others)
        query, key = (other, row) if by_keys else (row, other)
        samples = slice(tile[3], tile[3] + launch.samples)
        np.add.at(written, (samples, tile[0], row - low), 1)
        first, size = launch.group[tile[1], 5:7]
        for entry in launch.branch_list[first : first + size]:
            local, column = divmod(int(entry), len(launch.branch))
            head = tile[0] * layout.kv_group + local if by_keys else tile[0]
            block = seen(launch, head, column, query, key, layout, tile[3])
            counts[samples, head, (query - layout.queries[0])[:, None], key - layout.keys[0]] += block


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
            block = seen(launch, head, 0, query, key, layout, 0)
            counts[:, head, (query - low)[:, None], key - layout.keys[0]] += block
            written[:, head, query - low] += 1


def check_exact_lists(launch: Launch, layout: Layout, by_keys: bool) -> None:
    """Rows of a group that is not mixed are on every branch of its list and on no other."""
    for tile in launch.tile:
        _, _, _, _, _, first, size, mixed = launch.group[tile[1]]
        row = tile_rows(launch, tile)
        origin, end = documents_of(layout, tile[3], row)
        listed = launch.branch_list[first : first + size].tolist()
        for local in range(layout.kv_group if by_keys else 1):
            head = tile[0] * layout.kv_group + local if by_keys else tile[0]
            for column in range(len(launch.branch)):
                on = on_grid(launch, head, column, row - origin) & (row < end)
                in_list = local * len(launch.branch) + column in listed
                assert mixed or (on == in_list).all()


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("placed", [(37, 37, 0), (11, 40, 14), (30, 11, 4), (29, 16, 0)], ids=str)
def test_launches_hold_the_pattern(name: str, placed: tuple[int, int, int]):
    pattern, problem = ODD[name], problem_of(*placed, kv_heads=2)
    layout = layout_of(problem, pattern.branches())
    q, k = (positions_tensor(x) for x in (problem.query_positions, problem.key_positions))
    expected = block_counts(pattern, problem, torch.arange(4), q, k).expand(2, 4, len(q), len(k)).numpy()
    for block, split in (((3, 8), None), ((16, 8), None), ((3, 8), [[i] for i in range(len(layout.branches))])):
        for by_keys, make, rows, heads in ((False, query_launches, len(q), 4), (True, key_launches, len(k), 2)):
            counts = np.zeros_like(expected)
            for i, launch in enumerate(make(layout, block, split)):
                written = np.zeros((2, heads, rows), dtype=int)
                if launch.kind == "one":
                    expand_one(launch, layout, counts, written)
                else:
                    expand_list(launch, layout, by_keys, counts, written)
                    check_exact_lists(launch, layout, by_keys)
                assert launch.carry == (i > 0)
                assert (written <= 1).all()
                assert launch.carry or (written == 1).all()
                assert not launch.carry or (launch.group[:, 6] > 0).all()  # rows without branches stay untouched
            np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(("pattern", "heads"), [(PAPER, (0, 7)), (GIGAPATH, (3, 12))], ids=["paper", "gigapath"])
def test_groups_hold_every_row_once_at_a_million(pattern: Pattern, heads: tuple[int, ...]):
    layout = Layout(pattern.branches(), 16, 1, 1, (0, MILLION), (0, MILLION), heads=heads)
    strips = split_documents(None, 0, MILLION, MILLION)
    position = np.arange(MILLION)
    for (head,), entries in head_entries(layout, range(5), by_keys=False):
        groups = make_groups(entries, strips, 128)
        which = np.repeat(np.arange(len(groups.rows)), groups.rows)
        index = np.arange(len(which)) - np.repeat(np.cumsum(groups.rows) - groups.rows, groups.rows)
        rows = groups.positions(which, index)
        assert (np.sort(rows) == position).all()
        on = np.zeros(MILLION, dtype=int)
        for b in layout.branches:
            on += position % b.segment_length % b.dilation_rate == b.offset(head, 16)
        assert not groups.mixed.any()
        assert (groups.entries[which] == on[rows]).all()


def test_segments_that_a_rate_does_not_divide_cut_few_groups():
    for pattern, most in ((Dilated(10, 3), 2), (Dilated(185363, 8), 12), (longnet([1000, 1007], [3, 5]), 12000)):
        (launch,) = query_launches(layout_at(pattern, MILLION, 1), BLOCK, only_lists=True)
        assert len(launch.group) <= most
        assert len(launch.residue) < 3000


def test_short_documents_share_tiles():
    bounds = np.arange(0, MILLION + 1, 16)[None]
    layout = Layout(Documents([16]).of(PAPER).branches(), 1, 1, 1, (0, MILLION), (0, MILLION), bounds)
    (launch,) = query_launches(layout, BLOCK)
    assert len(launch.tile) == MILLION // 128


def test_samples_with_documents_of_their_own_have_tiles_of_their_own():
    problem = problem_of(37, 37, 0)
    (own,) = query_launches(layout_of(problem, ODD["documents_batched"].branches()), (4, 8))
    (shared,) = query_launches(layout_of(problem, ODD["documents_of"].branches()), (4, 8))
    assert (own.samples, set(own.tile[:, 3])) == (1, {0, 1})
    assert (shared.samples, set(shared.tile[:, 3])) == (2, {0})


@pytest.mark.parametrize("pattern", [PAPER, PAPER & Causal(), GIGAPATH & Causal()], ids=["full", "causal", "gigapath"])
def test_heaviest_tiles_come_first_and_heads_change_slowly(pattern: Pattern):
    layout = layout_at(pattern, 100_000, 4)
    for (launch,) in (query_launches(layout, BLOCK), key_launches(layout, BLOCK)):
        weight = launch.visited + TILE_OVERHEAD
        assert (weight[1:] < weight[:-1] * 2**0.5).all()
        octave = np.floor(2 * np.log2(weight))
        assert (np.diff(octave) <= 0).all()
        changes = (np.diff(launch.tile[:, 0]) != 0).sum()
        assert changes < 4 * len(np.unique(octave))


@pytest.mark.parametrize(
    "name",
    ["paper_small", "not_dividing_causal", "longnet_window", "documents_of", "short_documents", "equal_documents"],
)
def test_visited_slots_are_those_that_a_tile_walks(name: str):
    layout = layout_of(problem_of(37, 37, 0), ODD[name].branches())
    for by_keys, make in ((False, query_launches), (True, key_launches)):
        for rows in (3, 4, 16):  # from groups by residue to mixed ones
            (launch,) = make(layout, (rows, 2))
            for tile, visited in zip(launch.tile, launch.visited):
                first, size = launch.group[tile[1], 5:7]
                columns = launch.branch_list[first : first + size]
                row = tile_rows(launch, tile)
                assert visited == walked(launch, layout, row, tile[0], columns, tile[3], by_keys)


def test_visited_slots_of_a_grid_are_those_that_its_programs_walk():
    layout = layout_of(problem_of(61, 61, 0), (Dilated(20, 3) & Causal()).branches())
    (launch,) = query_launches(layout, (3, 2), carry=True)
    tiles, _, segments = launch.grid
    found = []
    for head in range(4):
        for segment in range(segments):
            for tile in range(tiles):
                row = segment * 20 + launch.offset[head, 0] + 3 * np.arange(3 * tile, 3 * tile + 3)
                row = row[row < min(segment * 20 + 20, 61)]
                found.append(walked(launch, layout, row, head, [0], 0, False) if len(row) else 0)
    assert launch.visited.tolist() == found
    assert launch.issued == 2 * 3 * sum(found)


def walked(
    launch: Launch, layout: Layout, row: np.ndarray, head: int, columns: list[int], sample: int, by_keys: bool
) -> int:
    """Blocks of every segment from the first partner that some row of the tile reaches to the last, one by one."""
    slots = 0
    for origin, end in np.unique(documents_of(layout, sample, row), axis=1).T:
        if end <= origin:
            continue
        low, high = (row[(row >= origin) & (row < end)] - origin)[[0, -1]]
        for column in columns:
            w, _, behind, ahead = launch.branch[column].astype(np.int64)
            behind, ahead = (ahead, behind) if by_keys else (behind, ahead)
            if low // w == high // w and not on_grid(launch, head, column, np.arange(low, high + 1)).any():
                continue
            place = np.arange(max(low - behind, 0), min(high + ahead + 1, end - origin))
            place = place[on_grid(launch, head, column, place)]
            for segment in range(low // w, high // w + 1):
                slots += -(-int((place // w == segment).sum()) // launch.block[1]) * launch.block[1]
    return slots


def useful_pairs(layout: Layout) -> int:
    """Pairs that the pattern counts, over all heads, in closed form."""
    total, length = 0, layout.end
    for head in range(layout.num_heads):
        for b in layout.branches:
            start = np.arange(0, length, b.segment_length)
            size = np.minimum(b.segment_length, length - start) - b.offset(head, layout.num_heads)
            n = -(-size // b.dilation_rate)
            total += int((n * (n + 1) // 2 if b.is_causal else n * n).sum())
    return total


@pytest.mark.parametrize(("pattern", "heads"), [(PAPER, 12), (GIGAPATH, 16)], ids=["paper", "gigapath"])
@pytest.mark.parametrize("device", DEVICES)
def test_little_work_is_wasted_at_a_million(pattern: Pattern, heads: int, device: str):
    layout = layout_at(pattern, MILLION, heads)
    split = choose_split(layout, BLOCK, DEVICES[device], 64)
    issued = sum(launch.issued for launch in query_launches(layout, BLOCK, split))
    assert 0.97 <= useful_pairs(layout) / issued <= 1


def test_planning_is_quick():
    start = time.process_time()
    layout = layout_at(GIGAPATH & Causal(), MILLION, 16, kv_group=4)
    split = choose_split(layout, BLOCK, H100, 64)
    query_launches(layout, BLOCK, split)
    key_launches(layout, BLOCK)
    assert time.process_time() - start < 5  # measured 0.2 s


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("heads", [1, 4, 12])
def test_a_split_holds_every_branch_once(role: str, heads: int):
    layout = layout_at(PAPER & Causal(), 100_000, heads)
    assert sorted(sum(choose_split(layout, BLOCK, GENERIC, 64, role), ())) == [0, 1, 2, 3, 4]


def test_short_problems_take_one_launch_and_long_ones_several():
    assert choose_split(layout_at(PAPER, 1000, 12), BLOCK, H100, 64) == ((0, 1, 2, 3, 4),)
    apart = longnet([256, 1024, 4096], [1, 4, 16])
    assert choose_split(layout_at(apart, MILLION, 12), BLOCK, H100, 64) == ((0,), (1,), (2,))
    assert choose_split(layout_at(Full(), 1000, 4), BLOCK, H100, 64) == ((0,),)
    assert choose_split(layout_at(PAPER, 0, 4), BLOCK, H100, 64)


def test_a_faster_part_of_a_device_shortens_the_estimate():
    layout = layout_at(PAPER, MILLION, 12)
    (launch,) = query_launches(layout, BLOCK)
    seconds = launch_seconds(launch, layout, H100, 64)
    assert seconds > 4 * 64 * useful_pairs(layout) / (H100.matrix_tflops * 1e12)
    slow_memory = Device(H100.matrix_tflops, H100.cache_terabytes, 0.01, 5.0, H100.slots)
    assert launch_seconds(launch, layout, slow_memory, 64) > 10 * seconds
    assert launch_seconds(launch, layout, H100, 64, element_size=4) == pytest.approx(2 * seconds, rel=0.01)


def test_estimates_from_a_few_heads_are_those_of_all():
    whole = layout_at(GIGAPATH, 200_000, 16)
    few = Layout(whole.branches, 16, 1, 1, whole.queries, whole.keys, heads=(2, 6, 10, 14))
    times = [launch_seconds(query_launches(x, BLOCK)[0], x, H100, 64) for x in (whole, few)]
    assert times[1] == pytest.approx(times[0], rel=0.02)


def test_devices_are_found_by_name():
    assert device_named("NVIDIA H100 80GB HBM3") == H100
    assert device_named("NVIDIA A100-SXM4-80GB") == DEVICES["A100"]
    assert device_named("AMD Instinct MI300X") == DEVICES["MI300X"]
    assert device_named("NVIDIA L40S") == device_named("") == GENERIC


def test_the_first_launch_writes_all_rows_or_is_a_list():
    layout = layout_at(longnet([64, 128], [2, 4]), 1000, 4)
    first, second = query_launches(layout, BLOCK, [[0], [1]])
    assert (first.kind, second.kind) == ("list", "one")
    assert query_launches(layout, BLOCK, [[0]], carry=True)[0].kind == "one"
    assert query_launches(layout, BLOCK, [[0]], carry=True, only_lists=True)[0].kind == "list"


def test_one_query_of_a_long_segment_takes_one_tile():
    layout = Layout(Causal().branches(), 2, 1, 1, (4000, 4001), (0, 4001))
    (launch,) = query_launches(layout, BLOCK)
    assert (launch.kind, len(launch.tile)) == ("list", 2)
    assert launch.visited.tolist() == [4032, 4032]


def test_tables_are_what_kernels_read():
    (launch,) = query_launches(layout_at(PAPER, 4096, 2), BLOCK)
    tables = (launch.tile, launch.group, launch.residue, launch.branch_list, launch.branch, launch.offset)
    assert all(x.dtype == np.int32 and x.flags.c_contiguous for x in tables)


def test_documents_are_split_where_they_end():
    strips = split_documents(np.array([0, 5, 5, 9]), 3, 12, 12)
    assert strips.row_low.tolist() == [3, 5, 9]
    assert strips.row_high.tolist() == [5, 9, 12]
    assert strips.member.tolist() == [True, True, False]
    assert all(a == b for (_, a), (b, _) in pairwise(zip(strips.row_low, strips.row_high)))
