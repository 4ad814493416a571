"""The tables that FlexAttention reads hold the plan's counts; the lists are those of torch's own BlockMask."""

import threading

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from dilated_attention_pytorch.backends.flex.tables import BlockLists, Tables, row_positions, table_bytes, tables_of
from dilated_attention_pytorch.patterns import Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.plans import tile_plan
from dilated_attention_pytorch.problem import Run, make_problem

PATTERNS = {
    "causal": Causal(),
    "window": Window(5),
    "longnet": longnet([16, 32], [1, 2]),
    "sum": Full() + Full() + Causal(),
    "documents": Documents([[30, 20], [9, 41]]).of(Causal()),
}


def problem_of(n=50, nk=None, batch=2, padded=False):
    q, k = torch.zeros(batch, n, 2, 4), torch.zeros(batch, nk or n, 2, 4)
    mask = None
    if padded:
        mask = torch.arange(k.shape[1]) >= torch.tensor([[k.shape[1]], [17]])
    return make_problem(q, k, k, scale=1.0, query_start=0, key_padding_mask=mask)


def held_counts(tables: Tables, problem) -> torch.Tensor:
    """The count of every pair as score_mod and mask_mod read it."""
    b, h, i, j = (
        torch.arange(n).view([-1 if d == e else 1 for e in range(4)])
        for d, n in enumerate((problem.batch, problem.num_heads, problem.query_length, problem.key_length))
    )
    (block_q, block_k), strides = tables.block_size, tables.strides
    table = tables.entries[b * strides[0] + h * strides[1] + i // block_q * strides[2] + j // block_k]
    return tables.counts[(table * block_q + i % block_q) * block_k + j % block_k].long()


def visited(num: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """Lists of blocks as a mask (.., blocks, blocks)."""
    held = torch.arange(idx.shape[-1]) < num.unsqueeze(-1)
    return torch.zeros(idx.shape, dtype=torch.bool).scatter(-1, idx.long(), held)


@pytest.mark.parametrize("least_block", [1, 16])
@pytest.mark.parametrize("shape", [(50, None, False), (37, 50, True), (5, 5, False)])
@pytest.mark.parametrize("name", PATTERNS)
def test_tables_hold_the_plan(name, shape, least_block):
    problem, pattern = problem_of(shape[0], shape[1], padded=shape[2]), PATTERNS[name]
    plan = tile_plan(pattern, problem, (8, 4))
    tables = tables_of(plan, least_block, training=True)
    assert tables.block_size == ((8, 4) if least_block == 1 else (16, 16))
    counts = plan.expand(problem)
    assert torch.equal(held_counts(tables, problem), counts)
    assert tables.weighted == bool(counts.max() > 1)
    lists, by_key = tables.by_query, tables.by_key
    assert isinstance(by_key, BlockLists)
    full, partial = visited(lists.full_num, lists.full_idx), visited(lists.num, lists.idx)
    assert not bool((full & partial).any())
    if least_block == 1:
        assert int(full.sum() + partial.sum()) == plan.num_tiles
    mask = BlockMask.from_kv_blocks(lists.num, lists.idx, lists.full_num, lists.full_idx, BLOCK_SIZE=tables.block_size)
    for mine, theirs in (
        ((by_key.num, by_key.idx), (mask.q_num_blocks, mask.q_indices)),
        ((by_key.full_num, by_key.full_idx), (mask.full_q_num_blocks, mask.full_q_indices)),
    ):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(visited(*mine), visited(*theirs))


def test_tables_are_made_once_and_only_what_is_needed():
    plan = tile_plan(Causal(), problem_of())
    assert tables_of(plan).by_key is None
    found = []
    threads = [threading.Thread(target=lambda: found.append(tables_of(plan, training=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert tables_of(plan).entries.numel() == tables_of(tile_plan(Window(2), problem_of(9))).entries.numel()


def test_bytes_of_tables():
    plan = tile_plan(longnet([64], [2]), problem_of(64), (8, 4))  # tables by head
    assert table_bytes(plan, 1, training=False) == 2 * 8 * 16 * 4 * 3
    assert table_bytes(plan, 16, training=True) == 2 * 4 * 4 * 4 * 5


def test_positions_take_32_bits_where_they_fit():
    near, far = ((Run(start, 2, 3), Run(4, 1, 1)) for start in (7, 2**31 - 4))
    assert row_positions(near, torch.device("cpu"))[:4].tolist() == [7, 9, 11, 4]
    assert row_positions(near, torch.device("cpu")).dtype == torch.int32
    assert row_positions(far, torch.device("cpu"))[:4].tolist() == [2**31 - 4, 2**31 - 2, 2**31, 4]
