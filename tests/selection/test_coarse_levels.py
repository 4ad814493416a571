"""Coarse levels against a dense computation in float64, with gradients; causality; and the limits."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, InvalidInput, attend, longnet
from dilated_attention_pytorch.patterns import BlockSparse, Full
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.selection import MeanPooled, SelectedTiles, Selector, TopBlocks, coarse
from dilated_attention_pytorch.selection.coarse import attend_with_coarse, pooled, pooled_counts


def _dense(q, k, v, selected, lengths=None, start=None, scale=None):
    """(out, lse) by the words of the docstring: one softmax over all keys and all means, each with its counts."""
    q, k, v = q.double(), k.double(), v.double()
    (b, nq, h, d), nk = q.shape, k.shape[1]
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    start = nk - nq if start is None else start
    lengths = (nk,) * b if lengths is None else lengths
    rows, size = selected.blocks.block_size
    blocks, columns = -(-(start + nq) // rows), -(-nk // size)
    sees = selected.right.to_mask(h, blocks * rows, nk, query_start=0).expand(b, h, blocks * rows, nk)
    layout = selected.layout.expand(b, h, *selected.layout.shape[-2:])
    fine, coarse = torch.zeros(b, h, nq, nk).double(), torch.zeros(b, h, nq, columns).double()
    mean_k, mean_v = (x.new_zeros(b, columns, h, x.shape[3]) for x in (k, v))
    for n in range(b):
        for j in range(columns):
            keys = slice(j * size, min((j + 1) * size, lengths[n]))
            if keys.start >= keys.stop:
                continue
            mean_k[n, j], mean_v[n, j] = k[n, keys].mean(0), v[n, keys].mean(0)
            for i in range(start // rows, blocks):
                block = slice(i * rows, (i + 1) * rows)
                held = slice(max(0, block.start - start), block.stop - start)
                for head in range(h):
                    whole, cell = sees[n, head, block, keys], layout[n, head, i, j]
                    if cell > 0:
                        place = slice(held.start + start, held.stop + start)
                        fine[n, head, held, keys] = (cell * sees[n, head, place, keys])[: nq - held.start].double()
                    elif whole.min() == whole.max():
                        coarse[n, head, held, j] = float(whole[0].sum())
    counts, k, v = torch.cat((fine, coarse), -1), torch.cat((k, mean_k), 1), torch.cat((v, mean_v), 1)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * (d**-0.5 if scale is None else scale)
    logits = torch.where(counts > 0, logits + counts.log(), -torch.inf)
    seen = (counts > 0).any(-1)
    weights = torch.where(seen[..., None], logits, 0.0).softmax(-1) * seen[..., None]
    return torch.einsum("bhij,bjhd->bihd", weights, v), logits.logsumexp(-1)


def _chosen(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


CASES = {
    "full": (SelectedTiles(BlockSparse(8, _chosen(2, 4, 5, 5)), Full()), 37, 37, None, {}),
    "causal": (SelectedTiles(BlockSparse(8, _chosen(2, 4, 5, 5)), Causal()), 37, 37, None, {}),
    "shared table": (SelectedTiles(BlockSparse(8, _chosen(5, 5)), Causal()), 40, 40, None, {}),
    "table per head": (SelectedTiles(BlockSparse(8, _chosen(4, 5, 5)), Causal()), 40, 40, None, {}),
    "two block sizes": (SelectedTiles(BlockSparse((8, 4), _chosen(4, 5, 10)), Causal()), 37, 37, None, {}),
    "padded": (SelectedTiles(BlockSparse(8, _chosen(2, 4, 5, 5)), Causal()), 40, 40, (40, 21), {}),
    "padded full": (SelectedTiles(BlockSparse(8, _chosen(2, 4, 5, 5)), Full()), 40, 40, (13, 37), {"scale": 0.2}),
    "last rows": (SelectedTiles(BlockSparse(8, _chosen(2, 4, 6, 6)), Causal()), 11, 43, None, {}),
    "placed rows": (SelectedTiles(BlockSparse(8, _chosen(6, 3)), Causal()), 30, 20, None, {"query_start": 16}),
    "documents": (
        SelectedTiles(BlockSparse(8, _chosen(4, 5, 5)), Documents([[18, 22], [40, 0]]).of(Causal())),
        40,
        40,
        None,
        {},
    ),
    "counts above 1": (SelectedTiles(BlockSparse(4, _chosen(4, 10, 10)), longnet([8, 16], [1, 1])), 40, 40, None, {}),
    "per head": (SelectedTiles(BlockSparse(8, _chosen(5, 5)), longnet([16, 40], [1, 2])), 40, 40, None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_coarse_attention_with_gradients_is_the_dense_computation(name):
    selected, nq, nk, lengths, options = CASES[name]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, n, h, d, generator=generator, requires_grad=True)
        for n, h, d in ((nq, 4, 8), (nk, 2, 8), (nk, 2, 6))
    )
    mask = None if lengths is None else torch.arange(nk) >= torch.tensor(lengths)[:, None]
    out, lse = attend_with_coarse(q, k, v, selected, key_padding_mask=mask, return_lse=True, **options)
    expected, expected_lse = _dense(q, k, v, selected, lengths, options.get("query_start"), options.get("scale"))
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
    seed, lse_seed = torch.randn_like(out), torch.randn_like(lse).where(expected_lse > -torch.inf, 0.0)

    def gradients(x, y):
        y = y.where(expected_lse.detach() > -torch.inf, 0.0)
        return torch.autograd.grad((x * seed).sum() + (y * lse_seed).sum(), (q, k, v))

    for mine, other in zip(gradients(out, lse), gradients(expected, expected_lse)):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)], ids=str)
def test_coarse_attention_in_other_dtypes(dtype, limit):
    selected = CASES["causal"][0]
    q, k, v = (torch.randn(2, 37, h, 8, dtype=dtype) for h in (4, 2, 2))
    out, lse = attend_with_coarse(q, k, v, selected, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, expected_lse = _dense(q, k, v, selected)
    torch.testing.assert_close(out.double(), expected, atol=limit, rtol=limit)
    torch.testing.assert_close(lse.double(), expected_lse, atol=limit, rtol=limit)


def test_all_blocks_chosen_is_attend():
    q, k, v = torch.randn(3, 2, 40, 2, 8).unbind(0)
    for pattern in (Full(), Causal()):
        whole = SelectedTiles(BlockSparse(8, torch.ones(5, 5).bool()), pattern)
        out, lse = attend_with_coarse(q, k, v, whole, return_lse=True)
        expected, expected_lse = attend(q, k, v, whole, return_lse=True)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        assert torch.equal(attend_with_coarse(q, k, v, whole), expected)


def test_equal_keys_in_a_block_lose_nothing():
    k = torch.randn(1, 5, 2, 8).repeat_interleave(8, 1)
    q, v = torch.randn(2, 1, 40, 2, 8).unbind(0)
    diagonal = SelectedTiles(BlockSparse(8, torch.eye(5).bool()), Causal())
    torch.testing.assert_close(attend_with_coarse(q, k, v, diagonal), attend(q, k, v, Causal()))


def test_later_tokens_change_no_bit_of_coarse_rows():
    torch.manual_seed(1)
    x = torch.randn(3, 1, 512, 2, 16)
    y, cut = x.clone(), 301
    y[:, :, cut:] = torch.randn_like(y[:, :, cut:])
    selector = Selector(MeanPooled(), TopBlocks(), block_size=32)
    (out, lse), (other, other_lse) = (
        attend_with_coarse(*z.unbind(0), selector(z[0], z[1], 3, Causal()), return_lse=True) for z in (x, y)
    )
    assert torch.equal(out[:, :cut], other[:, :cut])
    assert torch.equal(lse[..., :cut], other_lse[..., :cut])


def test_decoding_equals_prefill():
    q, k, v = torch.randn(3, 1, 40, 2, 8).unbind(0)
    chosen = SelectedTiles(BlockSparse(8, _chosen(5, 5) | torch.eye(5).bool()), Causal())
    whole = attend_with_coarse(q, k, v, chosen)
    for i in (7, 8, 30):
        row = attend_with_coarse(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], chosen, query_start=i)
        torch.testing.assert_close(row, whole[:, i : i + 1])


def test_blocks_of_more_keys_than_a_count_may_be():
    q, k, v = torch.randn(3, 1, 1100, 1, 8).unbind(0)
    none = SelectedTiles(BlockSparse(512, torch.zeros(3, 3).bool()), Full())
    out, lse = attend_with_coarse(q, k, v, none, return_lse=True)
    keys, values = pooled(k, 512), pooled(v, 512)
    logits = torch.einsum("bihd,bjhd->bhij", q, keys) * 8**-0.5 + torch.tensor([512.0, 512.0, 76.0]).log()
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), values))


def test_pooled_rows_and_their_counts(monkeypatch):
    x = torch.randn(2, 10, 3, 4, dtype=torch.float64)
    x[1, 6:] = torch.nan  # padding may hold anything
    means = pooled(x, 4, (10, 6))
    assert means.shape == (2, 3, 3, 4)
    torch.testing.assert_close(means[0], torch.stack([x[0, :4].mean(0), x[0, 4:8].mean(0), x[0, 8:].mean(0)]))
    torch.testing.assert_close(means[1, 1], x[1, 4:6].mean(0))
    assert (means[1, 2] == 0).all()
    padding = torch.arange(10) >= torch.tensor([[10], [6]])
    problem = make_problem(x, x, x, scale=1.0, query_start=0, key_padding_mask=padding)
    monkeypatch.setattr(coarse, "BOUND_CELLS", 1)  # one row at a time
    counts = pooled_counts(problem, Causal(), (4, 4))
    assert counts[:, 0].tolist() == [[[0, 0, 0], [4, 0, 0], [4, 4, 0]], [[0, 0, 0], [4, 0, 0], [4, 2, 0]]]
    last = make_problem(x[:1, 8:], x[:1], x[:1], scale=1.0, query_start=8)
    assert pooled_counts(last, Full(), (4, 2))[0, 0].tolist() == [[0] * 5, [0] * 5, [2] * 5]


def test_nothing_to_attend_to():
    q, k = torch.randn(1, 4, 2, 8), torch.zeros(1, 0, 2, 8)
    none = SelectedTiles(BlockSparse(4, torch.zeros(1, 1).bool()), Full())
    out, lse = attend_with_coarse(q, k, k, none, query_start=0, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_coarse_levels_want_a_selection():
    x = torch.zeros(1, 8, 1, 4)
    with pytest.raises(InvalidInput, match=r"expected the SelectedTiles.*Got Causal"):
        attend_with_coarse(x, x, x, Causal())
    with pytest.raises(InvalidInput, match="need 4 rows, the layout has 3"):
        attend_with_coarse(x, x, x, SelectedTiles(BlockSparse(2, torch.ones(3, 4).bool()), Full()))
