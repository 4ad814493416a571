"""Each rule against a loop over blocks, ties and blocks that are always chosen included."""

import math

import pytest
import torch

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Full
from dilated_attention_pytorch.selection import Mass, QueryBlocks, Rule, Threshold, TokenBlocks, TopBlocks

BUDGETS = [None, 1, 3, 100, 0.25, 1.0]


def blocks_with(open_blocks, always):
    """What a rule reads of blocks; the tokens do not matter to it."""
    rows, columns = open_blocks.shape[-2:]
    queries, keys = (
        TokenBlocks(torch.zeros(1, n, 2, 1, 1), torch.ones(1, n, 2, dtype=torch.bool)) for n in (rows, columns)
    )
    return QueryBlocks(queries, keys, open_blocks, always, 1.0, Full(), 0, True, torch.zeros(rows).long())


def draw(seed, levels=None):
    """Scores (2, 3, 5, 12), with ties when there are few levels, and what is open and always chosen."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 5, 12, generator=generator)
    if levels is not None:
        scores = (scores * levels).round() / levels
    open_blocks = torch.rand(2, 1, 5, 12, generator=generator) < 0.8
    always = torch.rand(2, 1, 5, 12, generator=generator) < 0.15
    open_blocks[0, 0, 1], always[0, 0, 1] = False, False
    open_blocks[1, 0, 2] = False
    return scores, blocks_with(open_blocks, always)


def rows_of(scores, blocks):
    """(place, scores, open, always) of each row, as lists."""
    for b, h, i in torch.ones(scores.shape[:3]).nonzero().tolist():
        may, must = blocks.open_blocks[b, 0, i].tolist(), blocks.always[b, 0, i].tolist()
        yield (b, h, i), scores[b, h, i].tolist(), may, must


def number(may, must, budget):
    visible = sum(a or b for a, b in zip(may, must))
    if budget is None:
        return visible
    return math.ceil(visible * budget - 1e-9) if isinstance(budget, float) else min(budget, visible)


def share_of(scores, may):
    total = sum(math.exp(s) for s, m in zip(scores, may) if m)
    return [math.exp(s) / total if m else 0.0 for s, m in zip(scores, may)]


def chosen_by_loop(rule, scores, may, must, budget):
    chosen = {c for c, m in enumerate(must) if m}
    left = max(0, number(may, must, budget) - len(chosen))
    share = share_of(scores, may)
    ranked = sorted((c for c in range(len(may)) if may[c] and c not in chosen), key=lambda c: (-scores[c], c))
    if isinstance(rule, Threshold):
        ranked = [c for c in ranked if share[c] >= rule.value]
    for c in ranked[:left]:
        if isinstance(rule, Mass) and sum(share[x] for x in chosen) >= rule.gamma - 1e-7:
            break
        chosen.add(c)
    return chosen


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("rule", [TopBlocks(), Mass(0.35), Mass(0.9), Mass(1.0), Threshold(0.1), Threshold(0.0)])
def test_rules_choose_what_a_loop_chooses(rule, levels, budget):
    assert isinstance(rule, Rule)
    scores, blocks = draw(3, levels)
    found = rule(scores, blocks, budget)
    assert found.shape == scores.shape
    assert found.dtype == torch.bool
    for at, row, may, must in rows_of(scores, blocks):
        assert set(found[at].nonzero().flatten().tolist()) == chosen_by_loop(rule, row, may, must, budget), at


@pytest.mark.parametrize("rule", [TopBlocks(), Mass(0.5), Threshold(0.05)])
def test_equal_scores_go_to_lower_blocks(rule):
    nothing = torch.zeros(1, 1, 2, 8, dtype=torch.bool)
    found = rule(torch.zeros(1, 4, 2, 8), blocks_with(~nothing, nothing), 3)
    assert found.long().tolist() == [[[[1, 1, 1, 0, 0, 0, 0, 0]] * 2] * 4]


@pytest.mark.parametrize("rule", [TopBlocks(), Mass(0.5), Threshold(0.05)])
def test_scores_of_closed_blocks_do_not_matter(rule):
    scores, blocks = draw(5)
    other = scores.masked_fill(~blocks.open_blocks, torch.nan)
    high = scores.masked_fill(~blocks.open_blocks, 1e30)
    wanted = rule(scores, blocks, 4)
    assert torch.equal(rule(other, blocks, 4), wanted)
    assert torch.equal(rule(high, blocks, 4), wanted)


def test_no_blocks_and_no_rows():
    nothing = torch.zeros(1, 1, 0, 4, dtype=torch.bool)
    assert TopBlocks()(torch.zeros(1, 1, 0, 4), blocks_with(nothing, nothing), 2).shape == (1, 1, 0, 4)


def test_shares_are_rounded_up_exactly():
    visible = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    blocks = blocks_with(visible, torch.zeros_like(visible))
    for percent in range(1, 101):
        wanted = [-(-percent * n // 100) for n in range(1, 301)]
        assert blocks.allowed(percent / 100)[0, 0].tolist() == wanted


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_mass_and_threshold_are_shares(value):
    with pytest.raises(InvalidInput, match="gamma in"):
        Mass(value)
    if value != 0.0:
        with pytest.raises(InvalidInput, match="value in"):
            Threshold(value)


def test_top_blocks_alone_needs_a_budget():
    assert [rule.needs_budget for rule in (TopBlocks(), Mass(0.5), Threshold(0.5))] == [True, False, False]
