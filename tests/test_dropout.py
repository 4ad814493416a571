"""The generator against its published vectors, and dropout against its meaning."""

import math

import pytest
import torch

from dilated_attention_pytorch import Causal, Full, attend, longnet, reference_attention
from dilated_attention_pytorch.backends import dense
from dilated_attention_pytorch.dropout import dropout_factors, philox


def words(*numbers):
    return tuple(torch.tensor(n, dtype=torch.int64) for n in numbers)


@pytest.mark.parametrize(
    ("counter", "key", "first"),
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_known_answers_of_random123(counter, key, first):
    assert int(philox(words(*counter), words(*key))) == first


def test_a_draw_depends_on_each_of_its_places():
    base = {"row": 3, "q": 5, "k": 7, "seed": 11}

    def word(**change):
        n = base | change
        grid = torch.arange(64)
        return dropout_factors(
            torch.tensor([n["seed"]]), 0.5, torch.tensor(n["row"]), torch.tensor(n["q"]) + grid, torch.tensor(n["k"])
        )

    for name in base:
        assert not torch.equal(word(), word(**{name: base[name] + 1})), name
        assert not torch.equal(word(), word(**{name: base[name] + 2**32})) or name == "row", name
    assert torch.equal(word(), word())


def test_keep_rate_and_mean():
    n = 1000
    for p in (0.1, 0.5, 0.9):
        factors = dropout_factors(torch.tensor([42]), p, torch.tensor(0), torch.arange(n).view(n, 1), torch.arange(n))
        assert set(factors.unique().tolist()) == {0.0, 1 / (1 - p)}
        kept = float((factors > 0).double().mean())
        assert kept == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p)) / n)
        assert float(factors.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p)) / n)


def test_rate_zero_keeps_everything():
    assert bool(
        (dropout_factors(torch.tensor([1]), 0.0, torch.tensor(0), torch.arange(99), torch.tensor(1)) == 1).all()
    )


def seed_of(state):
    """The seed that attend draws next."""
    torch.set_rng_state(state)
    return torch.randint(0, 2**62, (1,))


@pytest.mark.parametrize("pattern", [Full(), longnet([4, 8], [1, 2]) & Causal()], ids=["full", "longnet"])
def test_equals_the_reference_with_the_same_seed(pattern):
    x = [torch.randn(2, 13, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    state = torch.get_rng_state()
    mine = attend(*x, pattern, dropout_p=0.35, return_lse=True)
    expected = reference_attention(*x, pattern, dropout_p=0.35, seed=seed_of(state))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    given = (torch.randn_like(mine[0]), torch.randn_like(mine[1]))
    torch.testing.assert_close(
        torch.autograd.grad(mine, x, given), torch.autograd.grad(expected, x, given), rtol=1e-10, atol=1e-10
    )


def test_lse_is_without_dropout():
    x = torch.randn(1, 13, 2, 8)
    _, lse = attend(x, x, x, Causal(), dropout_p=0.5, return_lse=True)
    _, plain = attend(x, x, x, Causal(), return_lse=True)
    torch.testing.assert_close(lse, plain, rtol=1e-5, atol=1e-5)


def test_one_draw_whatever_the_chunks(monkeypatch):
    x = torch.randn(3, 29, 4, 8, dtype=torch.float64)
    torch.manual_seed(7)
    whole = attend(x, x, x, Causal(), dropout_p=0.4)
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 100)
    torch.manual_seed(7)
    torch.testing.assert_close(attend(x, x, x, Causal(), dropout_p=0.4), whole, rtol=1e-12, atol=1e-12)
    torch.manual_seed(8)
    assert not torch.allclose(attend(x, x, x, Causal(), dropout_p=0.4), whole)


def test_shifted_queries_draw_by_position():
    x = torch.randn(1, 20, 2, 8, dtype=torch.float64)
    torch.manual_seed(3)
    whole = attend(x, x, x, Causal(), dropout_p=0.4)
    torch.manual_seed(3)
    part = attend(x[:, 6:9], x, x, Causal(), dropout_p=0.4, query_start=6)
    torch.testing.assert_close(part, whole[:, 6:9], rtol=1e-12, atol=1e-12)


def test_the_mean_over_seeds_is_the_output_without_dropout():
    x = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    many = attend(*(x.expand(4000, 6, 1, 4) for _ in range(3)), Full(), dropout_p=0.3)
    plain = attend(x, x, x, Full())
    error = (many.mean(0) - plain[0]).abs()
    assert bool((error < 5 * many.std(0) / math.sqrt(4000)).all())
    assert float(many.std(0).min()) > 0
