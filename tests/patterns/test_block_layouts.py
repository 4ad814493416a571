"""Builders of block patterns: each cell is what its definition says, densities are met as closely as the kind can."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, InvalidInput, Window, attend, reference_attention
from dilated_attention_pytorch.patterns import (
    BlockSparse,
    axial,
    dilated_sparse,
    global_local,
    hierarchical,
    hybrid,
    local_window,
    random_blocks,
    strided,
)

SIZES = [(5, 5), (7, 4), (3, 9), (1, 6), (6, 1)]


def table(rows, columns, seen):
    return torch.tensor([[bool(seen(i, j)) for j in range(columns)] for i in range(rows)])


def same(pattern, expected):
    assert torch.equal(pattern.layout > 0, expected), pattern.layout


def lengths(rows, columns, size=4):
    """Tokens of so many blocks, the last one ragged."""
    return {"query_length": rows * size - 1, "key_length": columns * size - 2, "block_size": size}


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_local_window_holds_the_blocks_of_the_exact_window(rows, columns):
    given = lengths(rows, columns)
    for window in (1, 2, 5, 6, 9, 40):
        mask = Window(window).to_mask(1, 4 * rows, 4 * columns, query_start=0)[0]
        blocks = mask.unflatten(1, (columns, 4)).unflatten(0, (rows, 4)).amax((1, 3)) > 0
        same(local_window(window=window, **given), blocks)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_dilated_sparse_steps_by_each_rate(rows, columns):
    given = lengths(rows, columns)
    rates, links = (1, 3), 2

    def seen(i, j, head=0):
        steps = {m * r + head % r for r in rates for m in range(-links, links + 1)}
        return i == j or i - j in steps

    same(dilated_sparse(links=links, dilation_rates=rates, **given), table(rows, columns, seen))
    by_head = [table(rows, columns, lambda i, j, h=h: seen(i, j, h)) for h in range(4)]
    same(dilated_sparse(links=links, dilation_rates=rates, num_heads=4, **given), torch.stack(by_head))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_global_local_adds_the_first_blocks(rows, columns):
    given = lengths(rows, columns)
    for g in range(min(rows, columns) + 1):
        expected = table(rows, columns, lambda i, j, g=g: abs(i - j) <= 1 or i < g or j < g)
        same(global_local(window=5, global_blocks=g, **given), expected)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_strided_and_hierarchical_step_from_each_block(rows, columns):
    given = lengths(rows, columns)

    def every(i, j, head, stride=3):
        return i == j or (i - j) % stride == head % stride

    def coarser(i, j, head, near=2):
        distance, step = abs(i - j), 1
        while distance >= near * step:
            step *= 2
        return i == j or (i - j - head) % step == 0

    for build, seen in (
        (lambda **heads: strided(stride=3, **heads, **given), every),
        (lambda **heads: hierarchical(window=5, **heads, **given), coarser),
    ):
        same(build(), table(rows, columns, lambda i, j, seen=seen: seen(i, j, 0)))
        by_head = [table(rows, columns, lambda i, j, h=h, seen=seen: seen(i, j, h)) for h in range(4)]
        same(build(num_heads=4), torch.stack(by_head))


@pytest.mark.parametrize(("grid", "size"), [((6, 6), 1), ((4, 10), 3), ((5, 7), 4), ((9, 3), 4), ((2, 12), 5)])
def test_axial_holds_the_blocks_of_rows_and_columns(grid, size):
    n, width = grid[0] * grid[1], grid[1]
    place = torch.arange(n)
    blocks = -(-n // size)
    apart = [(x[:, None] - x).abs() for x in (place // width, place % width)]
    for thickness in (1, 2, 4):
        pairs = torch.minimum(*apart) < thickness
        expected = torch.zeros(blocks, blocks, dtype=torch.bool)
        for i, j in pairs.nonzero().tolist():
            expected[i // size, j // size] = True
        same(axial(n, grid=grid, block_size=size, thickness=thickness), expected)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_random_blocks_keep_the_diagonal_and_the_number_of_links(rows, columns, heads):
    given = lengths(rows, columns) | {"num_heads": heads}
    for links in range(1, columns + 1):
        pattern = random_blocks(links=links, **given)
        assert pattern.layout.shape == ((rows, columns) if heads is None else (heads, rows, columns))
        assert bool((pattern.layout.sum(-1) == links).all())
        assert bool((pattern.layout.diagonal(dim1=-2, dim2=-1) > 0).all())
    for density in (0.2, 0.5, 0.77, 1.0):
        layout = random_blocks(density=density, **given).layout
        lines = rows * (heads or 1)
        assert int(layout.sum()) == max(lines, round(density * lines * columns))
        each = layout.sum(-1)
        assert int(each.max() - each.min()) <= 1


def test_random_blocks_follow_their_seed_and_have_no_preference():
    before = torch.get_rng_state()
    first, again, other = (random_blocks(640, block_size=16, links=4, num_heads=2, seed=s).layout for s in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator is left alone"
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "heads have other links"
    drawn = sum(random_blocks(12, block_size=1, links=4, seed=s).layout.long() for s in range(400))
    elsewhere = drawn[~torch.eye(12, dtype=torch.bool)]  # 3 of 11 cells, 400 times: 109 on average, deviation 8.9
    assert int(elsewhere.min()) > 109 - 45
    assert int(elsewhere.max()) < 109 + 45


BY_DENSITY = {
    "local_window": (local_window, "window", [1 + 4 * i for i in range(20)], {}),
    "dilated_sparse": (dilated_sparse, "links", range(1, 20), {"dilation_rates": (1, 3)}),
    "dilated_sparse_heads": (dilated_sparse, "links", range(1, 20), {"num_heads": 3}),
    "global_local": (global_local, "window", [1 + 4 * i for i in range(20)], {"global_blocks": 2}),
    "strided": (strided, "stride", range(1, 20), {}),
    "strided_heads": (strided, "stride", range(1, 20), {"num_heads": 3}),
    "random_blocks": (random_blocks, "links", range(1, 12), {}),
    "hierarchical": (hierarchical, "window", [1 + 4 * i for i in range(20)], {}),
    "hierarchical_heads": (hierarchical, "window", [1 + 4 * i for i in range(20)], {"num_heads": 3}),
}


@pytest.mark.parametrize("density", [0.01, 0.13, 0.3, 0.55, 0.81, 1.0])
@pytest.mark.parametrize("name", BY_DENSITY)
def test_no_size_comes_nearer_to_a_density(name, density):
    build, own, sizes, options = BY_DENSITY[name]
    given = lengths(13, 11) | options
    missed = abs(build(density=density, **given).density - density)
    assert missed <= min(abs(build(**{own: size}, **given).density - density) for size in sizes) + 1e-12


def test_no_thickness_comes_nearer_to_a_density():
    for density in (0.1, 0.4, 0.6, 0.9, 1.0):
        missed = abs(axial(88, grid=(8, 11), block_size=3, density=density).density - density)
        others = [axial(88, grid=(8, 11), block_size=3, thickness=t).density for t in range(1, 12)]
        assert missed <= min(abs(x - density) for x in others) + 1e-12


def test_hybrid_takes_the_greatest_count_or_the_sum():
    a = BlockSparse(4, torch.tensor([[2, 0, 1], [0, 1, 1]]))
    b = BlockSparse(4, torch.tensor([[[1, 1, 0], [0, 3, 1]], [[0, 0, 0], [9, 0, 0]]]))
    assert torch.equal(hybrid(a, b).layout, torch.maximum(a.layout, b.layout).byte())
    summed = hybrid(a, b, mode="sum")
    assert summed.layout.shape == (2, 2, 3)
    assert torch.equal(summed.to_mask(2, 8, 12, query_start=0), (a + b).to_mask(2, 8, 12, query_start=0))
    many = hybrid(*[BlockSparse(4, torch.full((1, 1), 200, dtype=torch.uint8))] * 3, mode="sum")
    assert many.layout.tolist() == [[600]]
    assert hybrid(a).layout.tolist() == a.layout.tolist()


COMBINED = {
    "causal": lambda p: p & Causal(),
    "documents_of": lambda p: Documents([30, 0, 41]).of(p) & Causal(),
    "documents_cut": lambda p: Documents([30, 41]) & p,
    "summed": lambda p: p + local_window(71, block_size=5, window=6),
}


@pytest.mark.parametrize("combine", COMBINED)
def test_combined_patterns_are_the_reference(combine):
    torch.manual_seed(0)
    base = random_blocks(71, block_size=8, density=0.3, num_heads=2, seed=3)
    pattern = COMBINED[combine](base)
    q, k, v = torch.randn(3, 1, 71, 2, 8)
    out, lse = attend(q, k, v, pattern, return_lse=True)
    expected, expected_lse = reference_attention(q, k, v, pattern)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
    mask, alone = pattern.to_mask(2, 71), base.to_mask(2, 71)
    i, j = torch.arange(71).view(-1, 1), torch.arange(71)
    together = (i < 30) == (j < 30)
    restarted = torch.zeros_like(alone)
    restarted[:, :30, :30], restarted[:, 30:, 30:] = alone[:, :30, :30], alone[:, :41, :41]
    expected_mask = {
        "causal": alone * (i >= j),
        "documents_of": restarted * (i >= j),
        "documents_cut": alone * together,
        "summed": alone + ((i // 5 - j // 5).abs() <= 1),
    }[combine]
    assert torch.equal(mask, expected_mask)


def test_packed_documents_need_a_table_for_the_longest_one_only():
    inner = strided(40, block_size=8, stride=2)
    q = torch.randn(1, 100, 1, 8)
    packed = Documents([40, 25, 35]).of(inner)
    out = attend(q, q, q, packed)
    torch.testing.assert_close(out[:, 40:65], attend(q[:, 40:65], q[:, 40:65], q[:, 40:65], inner))
    with pytest.raises(InvalidInput, match="need 6 rows, the layout has 5"):
        attend(q, q, q, Documents([41, 24, 35]).of(inner))


@pytest.mark.parametrize("build", [local_window, hierarchical, strided, random_blocks, dilated_sparse, global_local])
def test_sizes_that_are_none(build):
    own = {"strided": "stride", "random_blocks": "links", "dilated_sparse": "links"}.get(build.__name__, "window")
    for density in (0, -0.5, 1.5, float("nan"), True):
        with pytest.raises(InvalidInput, match=r"density.* in \(0, 1\]"):
            build(100, density=density)
    for bad in (0, -3, 1.5, True):
        with pytest.raises(InvalidInput, match=f"expected {own} to be an int of at least 1. Got {bad}"):
            build(100, **{own: bad})
        with pytest.raises(InvalidInput, match="expected query_length to be an int"):
            build(bad, density=0.5)
        with pytest.raises(InvalidInput, match="expected key_length to be an int"):
            build(100, bad, density=0.5)
        with pytest.raises(InvalidInput, match="expected block_size to be an int"):
            build(100, block_size=bad, density=0.5)
    with pytest.raises(InvalidInput, match=f"expected either {own}= or density="):
        build(100)
    with pytest.raises(InvalidInput, match=f"expected either {own}= or density="):
        build(100, density=0.5, **{own: 4})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: global_local(100, block_size=30, window=1, global_blocks=5),
            "from 0 to 4, the blocks there are. Got 5",
        ),
        (lambda: axial(100, grid=(9, 11), thickness=1), "of 100 tokens"),
        (lambda: axial(100, grid=(0, 11), thickness=1), "of 100 tokens"),
        (lambda: axial(100, grid=(10, 10)), "either thickness= or density="),
        (lambda: random_blocks(100, block_size=30, links=5), "at most 4 links"),
        (lambda: axial(100, grid=100, thickness=1), "of 100 tokens"),
        (lambda: random_blocks(100, density=0.5, num_heads=0), "num_heads"),
        (lambda: random_blocks(100, density=0.5, seed=None), "seed to be an int"),
        (lambda: dilated_sparse(100, links=1, dilation_rates=[]), "dilation_rates of at least 1"),
        (lambda: dilated_sparse(100, links=1, dilation_rates=[2, 0]), "dilation_rates of at least 1"),
        (lambda: hybrid(), "at least one"),
        (lambda: hybrid(Causal()), "BlockSparse patterns"),
        (lambda: hybrid(strided(64, density=0.5), mode="mean"), "'union' or 'sum'"),
        (
            lambda: hybrid(strided(64, block_size=4, density=0.5), strided(64, block_size=8, density=0.5)),
            "one size.*\\+",
        ),
        (lambda: hybrid(strided(64, block_size=4, density=0.5), strided(32, block_size=4, density=0.5)), "one size"),
    ],
)
def test_tables_that_cannot_be_built(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_half_a_million_tokens_are_one_table():
    pattern = random_blocks(1 << 19, density=0.005)
    assert pattern.layout.shape == (4096, 4096)
    assert abs(pattern.density - 0.005) < 1e-6
