"""Tile plans by a dense kernel: values and gradients, what is read in place, what is copied, and how much at once."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dense_kernels import check_cases

from dilated_attention_pytorch import Causal, Dilated, Documents, Full, Window
from dilated_attention_pytorch import backends as room
from dilated_attention_pytorch.backends import NativeBackend, SdpaBackend
from dilated_attention_pytorch.backends.sdpa.kernels import CpuFlash
from dilated_attention_pytorch.backends.tile_pieces import PARTIAL, Part, pieces_of
from dilated_attention_pytorch.backends.tiled import TiledWalk
from dilated_attention_pytorch.memory import fill_with_nan
from dilated_attention_pytorch.patterns import BlockSparse
from dilated_attention_pytorch.plans import OrderedPlan, TilePlan, candidate_plans, tile_plan
from dilated_attention_pytorch.plans.planner import tile_size
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import LIMITS, cotangents, run
from dilated_attention_pytorch.testing.truth import truth

F32, F64 = torch.float32, torch.float64


def table(*shape, counts=2):
    """A table of blocks with counts below ``counts``; its fourth row is empty."""
    layout = torch.randint(0, counts, shape, generator=torch.Generator().manual_seed(4))
    layout[..., 3, :] = 0
    return layout


BLOCKS = BlockSparse(8, table(4, 13, 13))
CASES = {
    "per_head": Case("", BLOCKS, query_length=100),
    "causal": Case("", BLOCKS & Causal(), query_length=100),
    "counts": Case("", BlockSparse(8, table(13, 13, counts=4)) + Window(3), query_length=101),
    "one_count_above_one": Case("", BlockSparse((16, 8), 3 * table(7, 13)), query_length=97),
    "per_sample": Case("", BlockSparse(8, table(2, 4, 13, 13)), query_length=100, kv_heads=2),
    "shared_by_query_heads": Case("", BlockSparse(5, table(20, 20)) & Causal(), query_length=99, kv_heads=2),
    "per_query_head": Case("", BLOCKS, query_length=100, kv_heads=1),
    "padded": Case("", BLOCKS, query_length=100, kv_heads=2, visible=(100, 37)),
    "last_queries": Case("", BLOCKS & Causal(), query_length=21, key_length=100),
    "one_query": Case("", BLOCKS, query_length=1, key_length=99, kv_heads=2),
    "fewer_keys": Case("", BLOCKS, query_length=90, key_length=3, query_start=2),
    "all_keys": Case("", Full(), query_length=100),  # lists of many pieces
    "window": Case("", Window(20) & Causal(), query_length=100),
    "documents": Case("", Documents([30, 0, 41, 29]) & BLOCKS, query_length=100),
}


def walk(dtype=F32, packed_rows=None, gathered_rows=1 << 20, kernel=None):
    return TiledWalk(CpuFlash() if kernel is None else kernel, dtype, packed_rows, gathered_rows)


def problem_and_plan(case, dtype=F32, size=(16, 8)):
    problem = replace(case.problem(dtype), needs_grad=True)
    plan = tile_plan(case.pattern, problem, size)
    assert plan is not None
    return problem, plan


@pytest.mark.parametrize("limits", [(None, 1 << 20), (1, 40)], ids=["at_once", "in_parts"])
@pytest.mark.parametrize("name", CASES)
def test_out_lse_and_gradients(name, limits):
    problem, plan = problem_and_plan(CASES[name])
    dout, dlse = cotangents(problem)
    for given in (dlse, None):
        expected = truth(problem, plan.pattern, dout, given)
        found = run(walk(F32, *limits), problem, plan, dout, given)
        errors = found.errors(expected, dout)
        assert max(errors.values()) <= LIMITS[F32], errors
        assert torch.equal(found.lse == -torch.inf, expected.lse == -torch.inf)
    assert not any(x.isnan().any() for x in (found.out, found.lse, *found.grads[:3]))


def test_float64():
    problem, plan = problem_and_plan(CASES["counts"], F64)
    dout, dlse = cotangents(problem)
    errors = run(walk(F64, 1, 40), problem, plan, dout, dlse).errors(truth(problem, plan.pattern, dout, dlse), dout)
    assert max(errors.values()) <= LIMITS[F64]


def test_what_padding_holds_is_not_read():
    problem, plan = problem_and_plan(CASES["padded"])
    dout, dlse = cotangents(problem)
    expected = run(walk(), problem, plan, dout, dlse)
    k, v = (x.clone() for x in (problem.k, problem.v))
    k[1, 37:], v[1, 37:] = torch.nan, torch.inf
    found = run(walk(), replace(problem, k=k, v=v), plan, dout, dlse)
    for name, x in found.named().items():
        assert torch.equal(x, expected.named()[name]), name


@pytest.mark.parametrize("changed", [17, 50])
def test_causal_rows_do_not_know_what_follows(changed):
    """Bit for bit, where later tokens and later blocks of the table are others: also other pieces then."""
    case = replace(CASES["causal"], kv_heads=2)
    layout = BLOCKS.layout.clone()
    rows = changed // 8 * 8
    layout[:, rows // 8 :] = 1
    problem, plan = problem_and_plan(case)
    moved = {name: getattr(problem, name).clone() for name in "qkv"}
    for x in moved.values():
        x[:, rows:] += 1
    other = tile_plan(BlockSparse(8, layout) & Causal(), problem, (16, 8))
    rows = rows // 16 * 16  # a tile's rows have one list of tiles
    for limits in ((None, 1 << 20), (1, 40)):
        out, lse = walk(F32, *limits).forward(problem, plan)
        found = walk(F32, *limits).forward(replace(problem, **moved), other)
        assert torch.equal(found[0][:, :rows], out[:, :rows])
        assert torch.equal(found[1][..., :rows], lse[..., :rows])
        assert not torch.equal(found[0], out)


class Recorder(CpuFlash):
    """PyTorch's kernel; keeps what it was called with."""

    def __init__(self, max_batch=None):
        self.calls, self.max_batch = [], max_batch

    def forward(self, q, k, v, scale, is_causal, mask):
        self.calls.append((q, k, v, mask))
        return super().forward(q, k, v, scale, is_causal, mask)

    def backward(self, g, q, k, v, o, lse, scale, is_causal, mask):
        self.calls.append((q, k, v, mask))
        return super().backward(g, q, k, v, o, lse, scale, is_causal, mask)


def recorded(case, size=(16, 16), backward=False, max_batch=None, **limits):
    """The kernel's calls (q, k, v, mask) for a case."""
    problem, plan = problem_and_plan(case, size=size)
    kernel = Recorder(max_batch)
    one = walk(kernel=kernel, **limits)
    out, lse = one.forward(problem, plan)
    if backward:
        kernel.calls.clear()
        one.backward(problem, plan, torch.ones_like(out), None, out, lse)
    assert kernel.calls
    return kernel.calls


def held_rows(x):
    """Key rows of the memory that a tensor of head dim 8 lies in."""
    return x.untyped_storage().nbytes() // 32


NEIGHBOURS = BlockSparse(16, torch.ones(20, 20, dtype=torch.bool).tril(1).triu(-1))
SCATTERED = BlockSparse(16, torch.arange(400).view(20, 20) % 3 == 0)


@pytest.mark.parametrize("backward", [False, True])
def test_neighbouring_blocks_are_read_in_place(backward):
    case = Case("", NEIGHBOURS, batch=1, query_length=320, num_heads=2)
    calls = recorded(case, backward=backward, gathered_rows=1 << 20)
    assert all(held_rows(x) == 2 * 320 for call in calls for x in call[1:3]), "keys of both heads, packed once"
    assert any(q.shape[0] >= 18 for q, *_ in calls), "18 units of three blocks each in one call"
    overlapping = next(k for _, k, *_ in calls if k.shape[0] >= 18)
    assert overlapping.stride(0) == 16 * 8
    assert overlapping.shape[2] == 48


@pytest.mark.parametrize("backward", [False, True])
def test_copies_are_bounded(backward):
    case = Case("", SCATTERED, batch=2, query_length=320, num_heads=2)
    for rows in (32, 96, 320):
        calls = recorded(case, backward=backward, gathered_rows=rows, packed_rows=1)
        for q, k, v, _ in calls:
            assert k.shape[0] * k.shape[2] <= rows
            assert q.shape[0] == k.shape[0] == v.shape[0]
            assert held_rows(k) <= max(rows, 320)
    neighbours = replace(case, pattern=NEIGHBOURS)
    for packed_rows, held in ((1, 320), (640, 640), (None, 4 * 320)):
        assert max(held_rows(k) for _, k, *_ in recorded(neighbours, packed_rows=packed_rows)) == held


def test_units_with_equally_many_tiles_share_a_call():
    case = Case("", BlockSparse(16, SCATTERED.layout), batch=2, query_length=320, num_heads=2)
    shapes = [tuple(k.shape) for _, k, *_ in recorded(case)]
    assert len(shapes) == len({s[2] for s in shapes}) < 5
    assert sum(s[0] for s in shapes) == 2 * 2 * 20
    assert max(q.shape[0] for q, *_ in recorded(case, max_batch=7)) == 7


def test_query_heads_that_share_keys_and_table_are_rows_of_one_problem():
    case = Case("", SCATTERED, batch=1, query_length=320, num_heads=6, kv_heads=2)
    calls = recorded(case)
    assert {q.shape[2] for q, *_ in calls} == {3 * 16}
    assert sum(q.shape[0] for q, *_ in calls) == 2 * 20


def test_only_partial_tiles_have_masks():
    full = recorded(Case("", replace_counts(SCATTERED, 2) + NEIGHBOURS, batch=1, query_length=320))
    assert {mask is None for *_, mask in full} == {True}
    causal = recorded(Case("", NEIGHBOURS & Causal(), batch=1, query_length=320))
    masked = [(k, mask) for _, k, _, mask in causal if mask is not None]
    assert len(masked) == 1
    assert masked[0][0].shape[2] == 16, "the diagonal tiles only"
    assert masked[0][1].shape == (1, 1, 16, 16), "equal tiles share their mask"
    assert sum(k.shape[0] * k.shape[2] for _, k, *_ in causal) == 4 * (20 + 19) * 16


def replace_counts(pattern, count):
    return BlockSparse(pattern.block_size, pattern.layout * count)


def test_pieces_are_cut_once_for_a_plan():
    _, plan = problem_and_plan(CASES["causal"])
    part = Part((0, 2), (0, 4), 1, 1)
    found = pieces_of(plan, part, 100, 64, None)
    assert pieces_of(plan, part, 100, 64, None) is found
    assert part.shape == (2, 4)
    tiles = sum(piece.blocks.numel() for piece in found.pieces)
    assert tiles == 2 * plan.num_tiles
    assert {piece.count for piece in found.pieces} == {1, PARTIAL}
    assert not found.whole, "the rows of an empty row of the table"
    first = [piece for piece in found.pieces if piece.fresh]
    units = torch.cat([piece.units for piece in first])
    assert len(units.unique()) == len(units)


def test_nothing_to_see():
    problem = Case("", BLOCKS, query_length=20, key_length=9, query_start=0).problem(F32)
    empty = replace(problem, k=problem.k[:, :0], v=problem.v[:, :0], key_positions=())
    plan = tile_plan(BLOCKS, empty, (16, 8))
    with fill_with_nan():
        out, lse = walk().forward(empty, plan)
        grads = walk().backward(empty, plan, torch.ones_like(out), torch.ones_like(lse), out, lse)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    assert [tuple(x.shape) for x in grads[:3]] == [tuple(x.shape) for x in (empty.q, empty.k, empty.v)]
    assert bool((grads.q == 0).all())


def test_without_a_compiler_auto_takes_sdpa(monkeypatch):
    monkeypatch.setattr(room, "ranking", lambda *_: ((), None))
    monkeypatch.setattr(NativeBackend, "import_error", lambda self: "no C compiler")
    x = torch.zeros(1, 2048, 2, 8)
    problem = replace(Case("", Full(), batch=1, query_length=2048, num_heads=2).problem(F32), q=x, k=x, v=x)
    blocks = BlockSparse(128, torch.eye(16, dtype=torch.bool))
    for pattern, kind in ((blocks, TilePlan), (Dilated(256, 2) & Dilated(768, 3), OrderedPlan)):
        backend, plan = room.select(problem, candidate_plans(pattern, problem))
        assert (backend.name, type(plan)) == ("sdpa", kind)
        assert backend.forward(problem, plan)[0].shape == x.shape


class Tiles(SdpaBackend):
    """The walk of tiles alone."""

    plans = (OrderedPlan, TilePlan)


def test_laws_of_tiles_alone():
    names = ("product_of_grids", "documents_cut_grid-placed", "longnet_causal-decode_padded", "long-product")
    report = check_cases(Tiles(), names, [F32, torch.bfloat16])
    assert report.checked == len(names) * (2 + 2 * 3)
    assert not report.refused


@pytest.mark.parametrize(
    ("block_size", "start", "expected"),
    [
        (256, 0, (128, 128)),
        (64, 0, (64, 64)),
        ((48, 32), 0, (16, 32)),
        (64, 96, (32, 64)),
        (5, 0, (128, 64)),
        (64, 3, (128, 64)),
    ],
)
def test_tiles_follow_the_blocks_of_a_pattern(block_size, start, expected):
    """So that they are full or empty; on a GPU, and where blocks are odd, they keep the size that kernels like."""
    table = torch.ones(64, 64, dtype=torch.bool)
    for pattern in (BlockSparse(block_size, table), BlockSparse(block_size, table) & Causal()):
        problem = Case("", pattern, query_length=200, key_length=300, query_start=start).problem(F32)
        assert tile_size(pattern, problem) == expected
        assert {p.block_size for p in candidate_plans(pattern, problem) if isinstance(p, TilePlan)} == {expected}
    on_gpu = SimpleNamespace(**vars(problem) | {"q": SimpleNamespace(device=torch.device("cuda"))})
    assert tile_size(pattern, on_gpu) == (128, 64)


def test_full_tiles_only_where_tiles_are_blocks():
    problem = Case("", SCATTERED, query_length=320).problem(F32)
    (plan,) = (p for p in candidate_plans(SCATTERED, problem) if isinstance(p, TilePlan))
    assert plan.block_size == (16, 16)
    assert int(plan.kv_num.sum()) == 0
    assert int(plan.full_num.sum()) == int(SCATTERED.layout.sum())
