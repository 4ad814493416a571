"""Exact mass of blocks against dense attention in float64, and recall against loops."""

import pytest
import torch
from naive_blocks import SIZES, Sizes

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import BlockSparse, Causal, Full, longnet
from dilated_attention_pytorch.selection import SelectedTiles, block_mass, mass_recall
from dilated_attention_pytorch.selection.blocks import table_shape

MORE = {
    "summed": Sizes(40, 40, 0, 8, longnet([8, 40], [1, 2]) & Causal(), heads=(4, 2)),
    "blocks_by_sample": Sizes(
        24, 24, 0, 8, BlockSparse(6, torch.randint(0, 3, (2, 4, 4, 4), generator=torch.Generator().manual_seed(4)))
    ),
}


@pytest.mark.parametrize("pairs", [1, 1 << 20])
@pytest.mark.parametrize("name", [*SIZES, *MORE])
def test_mass_is_that_of_dense_attention(name, pairs, monkeypatch):
    monkeypatch.setattr("dilated_attention_pytorch.selection.mass._PAIRS", pairs)
    sizes = (SIZES | MORE)[name]
    q, k, mask = sizes.tensors()
    found = block_mass(q, k, sizes.pattern, sizes.block, key_padding_mask=mask, query_start=sizes.start, scale=0.7)
    counts = sizes.counts().double()
    keys = k.double().repeat_interleave(sizes.heads[0] // sizes.heads[1], 2)
    weight = counts * torch.exp(0.7 * torch.einsum("bihd,bjhd->bhij", q.double(), keys))
    share = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    wanted = torch.zeros(2, sizes.heads[0], max(sizes.rows) + 1, len(sizes.columns), dtype=torch.float64)
    for b in range(2):
        for row in sizes.rows:
            mine = share[b][:, sizes.own_rows(b, row)].mean(1)
            for column in sizes.columns:
                wanted[b, :, row, column] = mine[:, column * sizes.block : (column + 1) * sizes.block].sum(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_no_tokens_have_no_mass():
    q, k = torch.zeros(1, 0, 2, 4), torch.zeros(1, 5, 2, 4)
    assert block_mass(q, k, Full(), 2, query_start=0).tolist() == [[[[0.0] * 3]] * 2]


@pytest.mark.parametrize("size", [0, True, 2.0])
def test_a_block_has_at_least_one_token(size):
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(InvalidInput, match="block_mass: expected a block_size of at least 1"):
        block_mass(x, x, Full(), size)


def test_recall_is_the_share_of_chosen_mass():
    mass = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.0, 0.0]]]])
    layout = torch.tensor([[[1, 0], [0, 2]]])
    assert mass_recall(layout, mass).tolist() == [[1.25 / 2, 1.0]]
    assert mass_recall(SelectedTiles(BlockSparse(4, layout), Causal()), mass).tolist() == [[1.25 / 2, 1.0]]
    assert mass_recall(torch.zeros(2, 2), mass).tolist() == [[0.0, 0.0]]
    assert mass_recall(torch.zeros(2, 2), torch.zeros_like(mass)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 2), (2, 2, 2, 2), (1, 1, 2, 2, 2), (2,)])
def test_recall_refuses_tables_of_other_shapes(shape):
    with pytest.raises(InvalidInput, match="take block_mass with the selector's block_size"):
        mass_recall(torch.zeros(shape), torch.zeros(1, 2, 2, 2))


def test_tables_cover_all_positions():
    assert table_shape(SIZES["causal_placed"].problem(), 8) == (2, 4, 5, 5)
