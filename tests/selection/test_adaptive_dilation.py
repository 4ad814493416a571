"""Content-adaptive dilation: counts by the definition, bounds that hold, rates by the formula, and law 5 through it."""

import math

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, InvalidInput, attend, reference_attention
from dilated_attention_pytorch.backends import DenseBackend, NativeBackend, SdpaBackend
from dilated_attention_pytorch.patterns import Full, pattern_from_text
from dilated_attention_pytorch.patterns.base import Block
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan, candidate_plans
from dilated_attention_pytorch.plans.orders import fixed_classes, ordered_plan
from dilated_attention_pytorch.plans.tiles import visited_tiles
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.selection.dilation import AdaptiveDilation, DilatedBlocks
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import ContractReport, check_case


def _rates(*shape: int, most: int = 4, seed: int = 0) -> torch.Tensor:
    exponents = torch.randint(0, most.bit_length(), shape, generator=torch.Generator().manual_seed(seed))
    return 1 << exponents


def _visible(rate: int, head: int, q: int, k: int, size: int, keys: int) -> bool:
    same_block = q // size == k // size
    segment = keys * rate
    return same_block or (q // segment == k // segment and k % segment % rate == head % rate)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 5)], ids=str)
def test_counts_are_the_definition(shape):
    rates = _rates(*shape)
    mask = DilatedBlocks(4, 8, rates, 4).to_mask(3, 18, 40, query_start=0).expand(2, 3, 18, 40)
    table = rates.expand(2, 3, 5)
    for b in range(2):
        for h in range(3):
            expected = [[_visible(int(table[b, h, q // 4]), h, q, k, 4, 8) for k in range(40)] for q in range(18)]
            assert torch.equal(mask[b, h], torch.tensor(expected).long())


def test_every_rate_sees_as_many_keys():
    counts = [DilatedBlocks(4, 16, torch.full((16,), r), 4).to_mask(1, 64)[0, 32:].sum(-1) for r in (1, 2, 4)]
    assert counts[0].eq(16).all()
    for rate, seen in zip((2, 4), counts[1:]):  # and the own block, whose keys on the grid are among the 16
        assert seen.eq(16 + 4 - 4 // rate).all()


@pytest.mark.parametrize("step", [1, 2, 4, 3])
def test_bounds_hold_for_every_rectangle(step):
    pattern = DilatedBlocks(4, 8, _rates(2, 2, 10), 4)
    mask = pattern.to_mask(2, 40, 40)
    spans = [(a, b) for a in range(0, 40, 3) for b in (a, a + 3, a + 7, 39) if b < 40]
    keys = [(a, a + n * step) for a in range(0, 40, 3) for n in (0, 2, 7) if a + n * step < 40]
    corners = torch.tensor([[*q, *k] for q in spans for k in keys])
    top, bottom, left, right = corners.unbind(1)
    for head in range(2):
        low, high = pattern.count_bounds(
            torch.full_like(top, head),
            2,
            Block(top, bottom, (bottom > top).long()),
            Block(left, right, (right > left) * step),
        )
        assert low.shape == high.shape == (2, 1, 1, len(corners))
        for sample in range(2):
            for i, (a, b, c, d) in enumerate(corners.tolist()):
                found = mask[sample, head, a : b + 1, c : d + 1 : step]
                assert low[sample, 0, 0, i] <= found.min()
                assert found.max() <= high[sample, 0, 0, i]


def test_keys_by_residue_show_the_budget_in_the_tiles():
    q = torch.zeros(1, 4096, 1, 8)
    problem = make_problem(q, q, q, scale=1.0, query_start=0)
    pattern = DilatedBlocks(128, 512, torch.full((32,), 8), 8)
    assert pattern.key_classes == fixed_classes(pattern & Causal()) == 8
    assert fixed_classes(Causal()) is None
    assert DilatedBlocks(128, 256, torch.full((32,), 8), 8).key_classes == 4  # runs of at least one tile
    ordered = ordered_plan(pattern, problem)
    assert ordered is not None
    own_block = 7 * 64  # the seven other classes hold 16 of its keys each, in tiles of 64
    assert ordered.issued_pairs(problem) == 4096 * (512 + own_block)
    assert visited_tiles(pattern, problem) * 128 * 64 == 4096 * 4096
    assert torch.equal(ordered.expand(problem)[0], pattern.to_mask(1, 4096))


_HELD = DilatedBlocks(32, 128, _rates(2, 4, 10, seed=1), 4)
_CONTRACT = (
    Case("dilated_blocks", DilatedBlocks(8, 16, _rates(4, 7), 4), query_length=53),
    Case("dilated_blocks_causal", _HELD & Causal(), query_length=230, kv_heads=2, visible=(230, 157)),
    Case("dilated_blocks_documents", Documents([[140, 60], [200, 0]]).of(_HELD) & Causal(), query_length=200),
)


@pytest.mark.parametrize("backend", [DenseBackend(), SdpaBackend(), NativeBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize("case", _CONTRACT, ids=lambda c: c.name)
def test_dilated_blocks_pass_the_contract(backend, case):
    if backend.import_error() is not None:
        pytest.skip(f"{backend.name}: {backend.import_error()}")
    report = ContractReport()
    check_case(backend, case, torch.float32, "cpu", report)
    assert report.checked > 0
    assert not report.refused


@pytest.mark.parametrize("shape", [(3, 16), (2, 1, 16), (2, 3, 16)], ids=str)
def test_tables_of_tiles_expand_to_the_counts(shape):
    q = torch.zeros(2, 500, 3, 8)
    mask = torch.arange(500) >= torch.tensor([[500], [333]])
    for padding in (None, mask):
        problem = make_problem(q, q, q, scale=1.0, query_start=0, key_padding_mask=padding)
        for pattern in (
            DilatedBlocks(32, 128, _rates(*shape), 4),
            DilatedBlocks(32, 128, _rates(*shape), 4) & Causal(),
        ):
            ordered, dense = candidate_plans(pattern, problem)
            assert isinstance(ordered, OrderedPlan)  # and no plan in row order
            assert isinstance(dense, DensePlan)
            expected = pattern.to_mask(3, 500).expand(2, 3, 500, 500)
            if padding is not None:
                expected = expected * ~padding[:, None, None, :]
            assert torch.equal(ordered.expand(problem), expected)


def test_signs_of_tiles_tell_apart_what_differs():
    pattern = DilatedBlocks(4, 16, _rates(2, 16), 4)
    mask, pairs = pattern.to_mask(2, 64), torch.cartesian_prod(torch.arange(2), torch.arange(16), torch.arange(8))
    head, row, column = pairs.unbind(1)
    q, k = Block(row * 4, row * 4 + 3, row * 0 + 1), Block(column * 8, column * 8 + 7, row * 0 + 1)
    signs = torch.stack([*pattern.signs(head, 2, q, k), k.low - q.low], -1)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    for sign, (h, i, j) in zip(signs.tolist(), pairs.tolist()):
        tile = mask[h, 4 * i : 4 * i + 4, 8 * j : 8 * j + 8]
        assert torch.equal(seen.setdefault(tuple(sign), tile), tile)
    assert len(seen) < 0.7 * len(pairs)


@pytest.mark.parametrize("combine", ["alone", "causal", "documents", "padded"])
def test_attention_with_gradients_is_the_reference_of_dilated_blocks(combine):
    rates = DilatedBlocks(16, 32, _rates(2, 4, 10, seed=3), 4)
    pattern = Documents([70, 90]).of(rates) & Causal() if combine == "documents" else rates
    pattern = pattern & Causal() if combine == "causal" else pattern
    mask = torch.arange(160) >= torch.tensor([[160], [77]]) if combine == "padded" else None
    q, k, v = (torch.randn(2, 160, h, 16, requires_grad=True) for h in (4, 2, 2))
    out, lse = attend(q, k, v, pattern, key_padding_mask=mask, return_lse=True)
    expected, expected_lse = reference_attention(q, k, v, pattern, key_padding_mask=mask)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(out)
    for mine, other in zip(*(torch.autograd.grad((x * seed).sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_text_and_tables_rebuild_dilated_blocks():
    pattern = DilatedBlocks(4, 8, _rates(2, 2, 10), 4) & Causal()
    again = pattern_from_text(pattern.text(), pattern.tables)
    assert torch.equal(again.to_mask(2, 40), pattern.to_mask(2, 40))
    alone = pattern.of_sample(1)
    assert torch.equal(alone.to_mask(2, 40), pattern.to_mask(2, 40)[1])


def test_density_is_the_mean_step_inside_a_block():
    q = torch.randn(2, 10, 3, 5)
    rho = AdaptiveDilation(block_size=4).density(q, query_start=3)  # rows 3 | 4-7 | 8-11 | 12
    assert rho.shape == (2, 3, 4)
    inner = (q[:, 1:5].diff(dim=1).abs().mean((1, 3)), q[:, 5:9].diff(dim=1).abs().mean((1, 3)))
    torch.testing.assert_close(rho[..., 1:3], torch.stack(inner, -1))
    assert rho[..., 0].isinf().all()
    assert rho[..., 3].isinf().all()
    shared = AdaptiveDilation(block_size=4, per_head=False).density(q, query_start=3)
    torch.testing.assert_close(shared[:, 0, 1], inner[0].mean(-1))


def test_rates_follow_the_formula():
    rho = torch.linspace(0, 2, 101)
    rates = AdaptiveDilation(max_rate=16, tau=1.5).rates(rho)
    for x, rate in zip(rho.tolist(), rates.tolist()):
        share = 1 + (1 - min(x / 1.5, 1)) * (1 / 16 - 1)
        assert rate == 2 ** round(math.log2(1 / share))
    assert rates[0] == 16
    assert rates[-1] == 1


def _changing_queries(n: int = 256) -> torch.Tensor:
    """Smooth and rough stretches of 32 tokens, in different order in the two heads."""
    q = torch.randn(1, n, 2, 8)
    smooth = torch.stack((torch.arange(n) // 32 % 2 == 0, torch.arange(n) // 32 % 4 < 2), -1)
    return torch.where(smooth[..., None], 0.05 * q + 1.0, q)


def test_the_table_is_read_from_the_block_or_the_one_before():
    q, k = _changing_queries(), torch.randn(1, 256, 1, 8)
    selector = AdaptiveDilation(block_size=32, max_rate=8)
    own = selector(q, k, 2)
    assert isinstance(own, DilatedBlocks)
    assert own.keys == 64
    assert (own.rates[0, 0, ::2] == 8).all()
    assert (own.rates[0, 0, 1::2] == 1).all()
    causal = selector(q, k, 2, Causal())
    before = causal.right.rates
    assert (before[..., 0] == 1).all()
    assert torch.equal(before[..., 1:], own.rates[..., :-1])
    ahead = AdaptiveDilation(block_size=32, max_rate=8, lookahead=True)(q, k, 2, Causal())
    assert torch.equal(ahead.right.rates, own.rates)
    assert selector(q, k, 0.25, Full()).keys == 64
    assert selector(q, k, 0.26).keys == 96


@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa", "native"])
def test_later_tokens_change_no_bit_of_earlier_rows(backend):
    if backend == "native" and NativeBackend().import_error() is not None:
        pytest.skip(f"no C compiler: {NativeBackend().import_error()}")
    torch.manual_seed(0)
    selector, (k, v) = AdaptiveDilation(block_size=32, max_rate=4), torch.randn(2, 1, 1024, 1, 8)
    q, cut = _changing_queries(1024), 650
    later = [torch.cat((x[:, :cut], 0.01 * torch.randn_like(x[:, cut:])), 1) for x in (q, k, v)]
    patterns = [selector(x[0], x[1], 8, Causal()) for x in ((q, k, v), later)]
    assert patterns[0].right.key_classes == 4
    assert not torch.equal(patterns[0].right.rates, patterns[1].right.rates)
    (out, lse), (other, other_lse) = (
        attend(*x, pattern, backend=backend, return_lse=True) for x, pattern in zip(((q, k, v), later), patterns)
    )
    assert torch.equal(out[:, :cut], other[:, :cut])
    assert torch.equal(lse[..., :cut], other_lse[..., :cut])
    assert not torch.equal(out[:, cut:], other[:, cut:])


def test_a_padded_sample_is_dilated_as_it_is_alone():
    q, k = _changing_queries().expand(2, -1, -1, -1), torch.randn(2, 256, 1, 8)
    mask = torch.arange(256) >= torch.tensor([[256], [110]])
    selector = AdaptiveDilation(block_size=32, max_rate=8)
    together = selector(q, k, 2, key_padding_mask=mask).rates
    assert torch.equal(together[1:, :, :4], selector(q[1:, :110], k[1:, :110], 2).rates)


def test_queries_that_are_the_last_rows():
    q, k = _changing_queries(), torch.randn(1, 256, 1, 8)
    selector = AdaptiveDilation(block_size=32, max_rate=8)
    whole, part = selector(q, k, 2, Causal()).right, selector(q[:, 96:], k, 2, Causal()).right
    assert torch.equal(part.rates[..., 4:], whole.rates[..., 4:])
    assert (part.rates[..., :4] == 1).all()
    assert attend(q[:, :0], k, k, selector(q[:, :0], k, 1)).shape == (1, 0, 2, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DilatedBlocks(0, 8, torch.ones(4).long(), 4), "block_size of at least 1"),
        (lambda: DilatedBlocks(4, 6, torch.ones(4).long(), 4), r"multiple of block_size \(4\).*Got 6"),
        (lambda: DilatedBlocks(4, 8, torch.ones(4), 4), "tensor of integers"),
        (lambda: DilatedBlocks(4, 8, [1, 2], 4), "tensor of integers"),
        (lambda: DilatedBlocks(4, 8, torch.ones(1, 1, 1, 4).long(), 4), r"\(B, H, Q\)"),
        (lambda: DilatedBlocks(4, 8, torch.ones(4).long(), 3), "power of two. Got 3"),
        (lambda: AdaptiveDilation(max_rate=12), "power of two. Got 12"),
        (lambda: AdaptiveDilation(block_size=True), "block_size of at least 1"),
        (lambda: AdaptiveDilation(tau=0.0), "tau above 0"),
    ],
)
def test_parameters_that_make_no_dilation(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (torch.ones(3).long(), "need 4 rates, the table has 3"),
        (torch.ones(3, 4).long(), "for 3 heads, q has 2"),
        (torch.ones(5, 1, 4).long(), "for 5 samples, q has 1"),
        (torch.tensor([1, 3, 1, 1]), "powers of two up to max_rate .4.. Got 3"),
        (torch.tensor([1, 8, 1, 1]), "Got 8"),
        (torch.tensor([1, 0, 1, 1]), "Got 0"),
    ],
)
def test_tables_that_do_not_fit(rates, words):
    x = torch.zeros(1, 16, 2, 8)
    with pytest.raises(InvalidInput, match=words):
        attend(x, x, x, DilatedBlocks(4, 8, rates, 4))


@pytest.mark.parametrize("budget", [None, 0, 0.0, 0.2, 1.5, -1, True, float("nan")])
def test_budgets_that_are_less_than_a_block(budget):
    x = torch.zeros(1, 16, 2, 8)
    with pytest.raises(InvalidInput, match="at least one block of keys"):
        AdaptiveDilation(block_size=4)(x, x, budget)
