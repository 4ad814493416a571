"""Score rules: values, derivatives, texts, and what attend makes of them."""

import pytest
import torch

from dilated_attention_pytorch import Causal, InvalidInput, NoBackend, Relative, Softcap, attend, reference_attention
from dilated_attention_pytorch.scores import Score, score_from_text

RULES = {
    "slopes": Relative(slopes=torch.tensor([0.5, 0.25])),
    "table": Relative(table=torch.linspace(-1, 1, 10).view(2, 5)),
    "table_of_all_heads": Relative(table=torch.linspace(-1, 1, 5).view(1, 5)),
    "softcap": Softcap(1.5),
}


def places(heads=2, n=6):
    return torch.arange(heads).view(-1, 1, 1), torch.arange(n).view(-1, 1), torch.arange(n)


@pytest.mark.parametrize("name", RULES)
def test_derivative_is_that_of_value(name):
    s = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(RULES[name].value(s, *places()).sum(), s)
    found = RULES[name].derivative(s.detach(), *places()).expand_as(s)
    torch.testing.assert_close(found, expected)


def test_values_by_loops():
    s, (head, q, k) = torch.zeros(2, 6, 6, dtype=torch.float64), places()
    slopes, table = RULES["slopes"].value(s, head, q, k), RULES["table"].value(s, head, q, k)
    numbers = torch.linspace(-1, 1, 10).view(2, 5)
    for h in range(2):
        for i in range(6):
            for j in range(6):
                assert slopes[h, i, j] == -[0.5, 0.25][h] * abs(i - j)
                assert table[h, i, j].item() == pytest.approx(numbers[h, min(max(i - j, -2), 2) + 2].item())


@pytest.mark.parametrize("name", RULES)
def test_text_and_tables_are_the_whole_rule(name):
    rule = RULES[name]
    twin = score_from_text(rule.text, list(rule.tables))
    s = torch.randn(2, 6, 6)
    assert torch.equal(twin.value(s, *places()), rule.value(s, *places()))
    assert score_from_text("", []) is None
    assert isinstance(twin, Score)


@pytest.mark.parametrize("name", RULES)
def test_attend_equals_the_reference(name):
    x = [torch.randn(2, 7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mine = attend(*x, Causal(), score=RULES[name], return_lse=True)
    expected = reference_attention(*x, Causal(), score=RULES[name])
    torch.testing.assert_close(mine, expected)
    given = (torch.randn_like(mine[0]), torch.randn_like(mine[1]))
    torch.testing.assert_close(torch.autograd.grad(mine, x, given), torch.autograd.grad(expected, x, given))
    plain = attend(*x, Causal())
    assert not torch.allclose(mine[0], plain)


def test_distances_follow_query_start():
    x = torch.randn(1, 9, 2, 4, dtype=torch.float64)
    whole = attend(x, x, x, Causal(), score=RULES["slopes"])
    part = attend(x[:, 4:6], x, x, Causal(), score=RULES["slopes"], query_start=4)
    torch.testing.assert_close(part, whole[:, 4:6])


def test_sdpa_says_that_it_has_no_score_rules():
    x = torch.randn(1, 4, 2, 4)
    with pytest.raises(NoBackend, match="score rules"):
        attend(x, x, x, Causal(), score=Softcap(2.0), backend="sdpa")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Relative(), "exactly one"),
        (lambda: Relative(slopes=torch.ones(2), table=torch.ones(1, 3)), "exactly one"),
        (lambda: Relative(slopes=torch.ones(2, dtype=torch.int64)), "floating point"),
        (lambda: Relative(slopes=[0.5]), "floating point"),
        (lambda: Relative(slopes=torch.ones(2, requires_grad=True)), "detach"),
        (lambda: Relative(slopes=torch.ones(2, 2)), r"\(H,\)"),
        (lambda: Relative(table=torch.ones(2, 4)), "odd width"),
        (lambda: Relative(table=torch.ones(4)), "odd width"),
        (lambda: Softcap(0.0), "above 0"),
        (lambda: Softcap(float("nan")), "finite"),
        (lambda: Softcap(float("inf")), "finite"),
    ],
)
def test_bad_rules_say_what_was_expected(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
