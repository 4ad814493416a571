"""Sequences cut over ranks and joined again: every layout, length, dim and dtype, with the gradients of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.parallel.sharding import resolve_flat_group, shard_sequence, unshard_sequence
from dilated_attention_pytorch.problem import positions_tensor
from parallel.worlds import ends_of_world, run_world

LENGTHS = (0, 1, 2, 7, 12)
DTYPES = (torch.bool, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def _round_trips():
    """Everything that came back other than it went, and what each rank held of 7 rows."""
    rank, size, wrong, held = dist.get_rank(), dist.get_world_size(), [], {}
    for layout in LAYOUTS:
        held[layout] = shard_sequence(torch.arange(7), dim=0, layout=layout).tolist()
        for length in LENGTHS:
            rows = positions_tensor(Layout(layout, length, size).positions(rank))
            for dim in (0, 1, -1):
                shape = [3, 2, 5]
                shape[dim] = length
                x = torch.randn(shape)
                shard = shard_sequence(x, dim=dim, layout=layout)
                back = unshard_sequence(shard, dim=dim, layout=layout, length=None if dim else length)
                if not torch.equal(shard, x.index_select(dim, rows)) or not torch.equal(back, x):
                    wrong.append((layout, length, dim))
    for dtype in DTYPES:
        x = torch.randint(0, 2, (2, 7, 3)).to(dtype)
        strided = x.transpose(0, 2)
        shard = shard_sequence(strided, layout="zigzag")
        back = unshard_sequence(shard.transpose(0, 2).contiguous().transpose(0, 2), layout="zigzag")
        if back.dtype != dtype or not torch.equal(back.float(), strided.float()):
            wrong.append(dtype)
    return wrong, held


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_cut_comes_back(size):
    ends = run_world(size, _round_trips)
    assert [wrong for wrong, _ in ends] == [[]] * size
    assert [held["striped"] for _, held in ends] == [list(range(r, 7, size)) for r in range(size)]
    chunks = [x.tolist() for x in torch.arange(7).tensor_split(2 * size)]
    assert [held["zigzag"] for _, held in ends] == [chunks[r] + chunks[2 * size - 1 - r] for r in range(size)]
    assert [held["contiguous"] for _, held in ends] == [x.tolist() for x in torch.arange(7).tensor_split(size)]


def _gradients(x, weights, layout):
    """Of a whole input of shards' losses, of shards of a replicated loss, and of both with a step between."""
    whole = x.clone().requires_grad_()
    shard = shard_sequence(whole, layout=layout)
    (shard.sin() * shard_sequence(weights, layout=layout)).sum().backward()
    leaf = shard_sequence(x, layout=layout).requires_grad_()
    (unshard_sequence(leaf, layout=layout).square() * weights).sum().backward()
    through = x.clone().requires_grad_()
    steps = unshard_sequence(shard_sequence(through, layout=layout).exp(), layout=layout)
    (steps.square() * weights).sum().backward()
    return whole.grad, leaf.grad, through.grad


@pytest.mark.parametrize(("size", "length"), [(2, 9), (3, 8), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(size, length, layout):
    x, weights = torch.randn(2, 1, length, 3, dtype=torch.float64)
    alone = x.clone().requires_grad_()
    (alone.exp().square() * weights).sum().backward()
    for rank, (whole, leaf, through) in enumerate(run_world(size, _gradients, x, weights, layout)):
        rows = positions_tensor(Layout(layout, length, size).positions(rank))
        torch.testing.assert_close(whole, x.cos() * weights)  # of the sum over ranks, on each of them
        torch.testing.assert_close(leaf, (2 * x * weights)[:, rows])  # counted once
        torch.testing.assert_close(through, alone.grad)


def _on_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    x = torch.arange(9)
    flat = shard_sequence(x, dim=0, mesh=mesh)
    inner = shard_sequence(x, dim=0, mesh=mesh["inner"])
    group = shard_sequence(x, dim=0, group=mesh.get_group("outer"))
    whole = unshard_sequence(flat, dim=0, mesh=mesh)
    groups = dist.distributed_c10d._world.group_count
    again = resolve_flat_group(mesh=mesh)
    assert dist.distributed_c10d._world.group_count == groups, "a mesh is flattened once"
    assert dist.get_process_group_ranks(again) == [0, 1, 2, 3]
    with pytest.raises(InvalidInput, match="mesh_dim_names"):
        shard_sequence(x, dim=0, mesh=init_device_mesh("cpu", (2, 2)))
    return flat.tolist(), inner.tolist(), group.tolist(), whole.tolist()


def test_a_mesh_of_two_dims_is_dealt_over_row_by_row():
    flat, inner, outer, whole = zip(*run_world(4, _on_a_mesh))
    assert list(flat) == [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    assert list(inner) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]] * 2
    assert list(outer) == [[0, 1, 2, 3, 4]] * 2 + [[5, 6, 7, 8]] * 2
    assert list(whole) == [list(range(9))] * 4


def _wrong_shards():
    rank, told = dist.get_rank(), []
    shards = (
        (torch.zeros(1, 3 + rank), {}),
        (torch.zeros(1 + rank, 4), {}),
        (torch.zeros(1, 4, dtype=(torch.float32, torch.int64)[rank]), {}),
        (torch.zeros(1, 4), {"layout": LAYOUTS[rank]}),
        (torch.zeros(1, 4), {"length": 9 + 2 * rank}),
    )
    for x, options in shards:
        with pytest.raises(InvalidInput) as raised:
            unshard_sequence(x, **options)
        told.append(str(raised.value))
    return told


def test_shards_that_do_not_fit_are_refused_on_every_rank():
    first, second = ends_of_world(2, _wrong_shards)
    lengths, *others, given = zip(first, second)
    assert all("ranks 0 to 1 hold [4, 3]. Got [3, 4]" in words for words in lengths)
    for words, what in zip(others, ("(2, 4)", "torch.int64", "zigzag")):
        assert words[0] == words[1]
        assert "rank 0: (1, 4)" in words[0]
        assert what in words[0].partition("rank 1")[2]
    assert "rank 0 of 2 holds 5 of 9 rows" in given[0]
    assert "rank 1 of 2 holds 5 of 11 rows" in given[1]


def test_a_world_of_one_changes_nothing():
    x = torch.randn(2, 5, requires_grad=True)
    for layout in LAYOUTS:
        assert shard_sequence(x, layout=layout) is x
        assert unshard_sequence(x, layout=layout, length=5) is x
        assert unshard_sequence(x, layout=layout) is x


@pytest.mark.parametrize("function", [shard_sequence, unshard_sequence])
@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        ([1, 2], {}, "expected a tensor. Got list"),
        (torch.zeros(3), {}, "expected dim from -1 to 0. Got dim=1"),
        (torch.zeros(2, 3), {"layout": "ring"}, "expected layout to be one of"),
    ],
)
def test_what_is_no_sequence_is_refused(function, x, options, words):
    with pytest.raises(InvalidInput, match=words):
        function(x, **options)


def test_a_length_that_is_not_held_is_refused():
    with pytest.raises(InvalidInput, match=r"holds 4 of 4 rows.*Got 3"):
        unshard_sequence(torch.zeros(1, 3), length=4)
