"""Layouts deal every row out once, as they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.parallel import Layout
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, joined, row_count
from dilated_attention_pytorch.problem import Run, positions_tensor


@settings(deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(0, 70), st.integers(1, 9), st.integers(0, 5))
def test_every_row_is_on_one_rank_in_order(name, length, world, start):
    layout = Layout(name, length, world, start)
    shards = [positions_tensor(layout.positions(rank)) for rank in range(world)]
    assert torch.cat(shards).sort().values.tolist() == list(range(start, start + length))
    for rank, shard in enumerate(shards):
        assert shard.tolist() == sorted(shard.tolist())
        assert layout.count(rank) == len(shard)
        assert all(run.length > 0 for run in layout.positions(rank))
    if name != "zigzag":
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(1, 9))
def test_contiguous_has_the_bounds_of_tensor_split(length, world):
    layout = Layout("contiguous", length, world)
    for rank, chunk in enumerate(torch.arange(length).tensor_split(world)):
        assert positions_tensor(layout.positions(rank)).tolist() == chunk.tolist()


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(1, 9))
def test_zigzag_pairs_the_chunks_of_twice_as_many_ranks(length, world):
    layout, chunks = Layout("zigzag", length, world), torch.arange(length).tensor_split(2 * world)
    for rank in range(world):
        expected = torch.cat((chunks[rank], chunks[2 * world - 1 - rank]))
        assert positions_tensor(layout.positions(rank)).tolist() == expected.tolist()


def test_striped_takes_every_so_many_rows():
    assert Layout("striped", 10, 3).positions(1) == (Run(1, 3, 3),)
    assert Layout("striped", 10, 3, start=4).positions(0) == (Run(4, 3, 4),)


def test_chunks_that_meet_are_one_run():
    assert Layout("zigzag", 12, 3).positions(2) == (Run(4, 1, 4),)
    assert joined([Run(0, 2, 2), Run(4, 2, 3), Run(11, 2, 1)]) == (Run(0, 2, 5), Run(11, 1, 1))
    assert row_count(joined([Run(0, 2, 2), Run(4, 2, 3), Run(11, 2, 1)])) == 6


def test_single_rows_of_a_step_are_one_run():
    assert joined(Run(3 + 4 * i, 4, 1) for i in range(5)) == (Run(3, 4, 5),)
    assert joined([Run(0, 4, 2), Run(8, 4, 1), Run(12, 3, 1), Run(13, 1, 2)]) == (
        Run(0, 4, 3),
        Run(12, 1, 1),
        Run(13, 1, 2),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spiral", 8, 2), r"'contiguous', 'zigzag', 'striped'.*'spiral'"),
        (("zigzag", -1, 2), "length=-1"),
        (("zigzag", 8, 0), "world=0"),
        (("zigzag", 8, 2, -3), "start=-3"),
    ],
)
def test_what_is_no_layout(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        Layout(*arguments)


def test_what_is_no_rank():
    with pytest.raises(InvalidInput, match=r"from 0 to 1.*2"):
        Layout("zigzag", 8, 2).positions(2)
