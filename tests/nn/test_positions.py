import math

import pytest
import torch

from dilated_attention_pytorch import Documents, InvalidInput
from dilated_attention_pytorch.nn import Rotary, XPos, alibi_slopes, rotate
from dilated_attention_pytorch.nn.positions import make_positions


def rotated_by_complex_numbers(x, places, base=10000.0):
    """The paper's rotation written independently: pair (i, i + D/2) is one complex number."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(len(places), half, dtype=torch.float64), places.double()[:, None] * frequency)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn[:, None, :]
    return torch.cat((z.real, z.imag), -1)


def logits(positions, q, k, **where):
    table = positions.table(q.shape[1], dtype=q.dtype, **where)
    q, k = rotate(q, table.query_cos, table.query_sin), rotate(k, table.key_cos, table.key_sin)
    return torch.einsum("bihd,bjhd->bhij", q, k)


def pair(length=12, heads=2, dim=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, length, heads, dim, generator=generator, dtype=dtype) for _ in "qk")


def test_rotation_is_the_papers():
    x, _ = pair()
    table = Rotary(16).table(12, start=5, dtype=torch.float64)
    expected = rotated_by_complex_numbers(x, torch.arange(5, 17))
    torch.testing.assert_close(rotate(x, table.query_cos, table.query_sin), expected, rtol=0, atol=1e-12)


def test_rotary_logits_depend_on_distance_only():
    q, k = pair()
    near, far = logits(Rotary(16), q, k), logits(Rotary(16), q, k, start=123_456)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-8)
    assert (near - torch.einsum("bihd,bjhd->bhij", q, k)).abs().max() > 0.1


def test_float32_angles_hold_at_a_million_tokens():
    x, _ = pair(dtype=torch.float32)
    table = Rotary(16).table(12, start=10**6)
    expected = rotated_by_complex_numbers(x, torch.arange(10**6, 10**6 + 12))
    assert (rotate(x, table.query_cos, table.query_sin).double() - expected).abs().max() < 2e-6


def test_half_types_are_rotated_in_float32():
    x, _ = pair(dtype=torch.bfloat16)
    table = Rotary(16).table(12, start=1000, dtype=torch.bfloat16)
    assert table.query_cos.dtype == torch.float32
    out = rotate(x, table.query_cos, table.query_sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotated_by_complex_numbers(x, torch.arange(1000, 1012)).float().bfloat16())


def test_position_ids_place_rows():
    rotary = Rotary(16)
    shuffled = torch.tensor([[4, 2, 9], [0, 1, 2]])
    table, whole = rotary.table(3, position_ids=shuffled), rotary.table(10)
    assert table.query_cos.shape == (2, 3, 1, 16)
    assert torch.equal(table.query_sin, whole.query_sin[shuffled])
    assert torch.equal(rotary.table(3, position_ids=shuffled[0]).key_cos, whole.key_cos[shuffled[0]])


def test_documents_restart_positions():
    documents = Documents([[3, 5], [6, 2]])
    table, whole = Rotary(8).table(8, documents=documents), Rotary(8).table(8)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    assert torch.equal(table.query_sin, whole.query_sin[places])


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (torch.zeros(3), "integer"),
        (torch.zeros(3, dtype=torch.bool), "integer"),
        (torch.zeros(4, dtype=torch.long), r"\(N,\) or \(B, N\)"),
        (torch.zeros(1, 1, 3, dtype=torch.long), r"\(N,\) or \(B, N\)"),
    ],
)
def test_bad_position_ids(ids, word):
    with pytest.raises(InvalidInput, match=word):
        Rotary(8).table(3, position_ids=ids)


def xpos_decay(distance, dim=16):
    """zeta_i ^ (distance / 512) for the pairs of a head."""
    return [((2 * i / dim + 0.4) / 1.4) ** (distance / 512) for i in range(dim // 2)]


@pytest.mark.parametrize(
    ("segments", "start"), [((16, 64), 0), ((16, 64), 3), ((16, 64), 64_000), ((24, 64), 3), ((24, 64), 640)]
)
def test_xpos_decays_with_distance(segments, start):
    q, k = torch.zeros(1, 2, 1, 16).double(), torch.zeros(1, 2, 1, 16).double()
    q[..., 3], k[..., 3] = 1.0, 1.0  # pair 3 alone
    s = logits(XPos(16, segment_lengths=segments), q, k, start=start)[0, 0]
    frequency = 10000 ** (-6 / 16)
    zeta = xpos_decay(1)[3]
    expected = torch.tensor([[1, math.cos(frequency) / zeta], [math.cos(frequency) * zeta, 1]], dtype=torch.float64)
    torch.testing.assert_close(s, expected, rtol=1e-9, atol=0)


def test_xpos_keeps_the_decay_of_rows_with_ids_of_their_own():
    q, k = pair(8)
    positions = XPos(16, segment_lengths=(4, 8))
    in_order = logits(positions, q, k, start=8)
    placed = logits(positions, q, k, start=8, position_ids=torch.arange(8) + 100)
    torch.testing.assert_close(in_order, placed, rtol=1e-9, atol=1e-9)


def test_xpos_in_documents_equals_the_sample_alone():
    q, k = pair(12)
    positions = XPos(16, segment_lengths=(4, 8))
    packed = logits(positions, q, k, documents=Documents([5, 7]))
    torch.testing.assert_close(packed[..., 5:, 5:], logits(positions, q[:, 5:], k[:, 5:]), rtol=1e-9, atol=1e-9)


def test_xpos_counts_from_the_middle_and_never_leaves_nested_segments():
    table = XPos(2, segment_lengths=(512, 1024)).table(1024, dtype=torch.float64)
    size = table.query_cos.square().add(table.query_sin.square()).sqrt()[:, 0, 0]
    zeta = 0.4 / 1.4
    assert size[512].item() == pytest.approx(1.0)
    assert size[0].item() == pytest.approx(zeta**-1)
    assert size[1023].item() == pytest.approx(zeta ** (511 / 512))
    far = XPos(2, segment_lengths=(512, 1024)).table(4, start=10**7 // 1024 * 1024)
    assert torch.isfinite(far.query_cos).all()
    torch.testing.assert_close(far.query_cos.abs() <= 1 / zeta + 1e-6, torch.ones(4, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("segments", "dtype", "start"),
    [((32768,), torch.float16, 0), ((100, 150), torch.float32, 60_000), ((100_000,), torch.float32, 0)],
)
def test_xpos_names_rotary_when_a_factor_leaves_the_dtype(segments, dtype, start):
    positions = XPos(16, segment_lengths=segments)
    with pytest.raises(InvalidInput, match="rotary"):
        positions.table(10, start=start, dtype=dtype)
    with pytest.raises(InvalidInput, match="rotary"):
        positions.table(10, position_ids=torch.arange(10) + 200_000, dtype=dtype)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 7), (3, 2), (5, 6), (7, 2), (8, 8), (15, 1), (3, 40)])
def test_xpos_reach_bounds_the_count(start, length):
    rows = torch.arange(start, start + length)
    for segments in ((4, 8), (6, 8)):
        positions = XPos(4, segment_lengths=segments)
        counted = (rows - positions._origins(rows)).abs().max()
        reach = positions._reach(length, start)
        assert reach >= counted
        assert reach == (4 if segments == (4, 8) else counted)  # where segments nest, that of a whole segment


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_what_each_kind_stands_for():
    assert make_positions("none", 7, [8]) is None
    assert make_positions("alibi", 7, [8]) is None
    assert make_positions("xpos", 8, [4, 8]) == XPos(8, segment_lengths=(4, 8))
    with pytest.raises(InvalidInput, match="even head dim"):
        make_positions("rotary", 7, [8])
    with pytest.raises(InvalidInput, match="one of"):
        make_positions("learned", 8, [8])
    with pytest.raises(InvalidInput, match="rotary"):
        make_positions("xpos", 8, None)
