"""What branches cost and reach is counted against brute force; presets and their page say what is computed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dilated_attention_pytorch import InvalidInput, longnet
from dilated_attention_pytorch.core import (
    PRESETS,
    create_attention_from_preset,
    create_multihead_dilated_attention,
    describe_branches,
    suggest_branches,
)
from dilated_attention_pytorch.core import presets as module
from dilated_attention_pytorch.models.config import LongNetLMConfig

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
BRANCHES = {
    "longnet": ([8, 16, 64], [1, 2, 8], 64, 8, "modulo"),
    "fewer heads than places": ([8, 64], [1, 8], 64, 3, "modulo"),
    "torchscale's": ([8, 64], [2, 16], 64, 12, "torchscale"),
    "no nesting": ([7, 30], [1, 3], 61, 3, "modulo"),
    "several segments": ([16, 32], [1, 2], 64, 2, "modulo"),
    "longer than the sequence": ([4, 100], [1, 5], 37, 5, "modulo"),
}


def counts_of(lengths, rates, tokens, heads, offset):
    places = torch.arange(tokens)
    pattern = longnet(lengths, rates, head_offset=offset)
    return torch.stack([pattern.count(h, heads, places[:, None], places) for h in range(heads)])


@pytest.mark.parametrize("name", BRANCHES)
def test_cost_reach_and_coverage_are_those_of_brute_force(name):
    lengths, rates, tokens, heads, offset = BRANCHES[name]
    counts = counts_of(*BRANCHES[name])
    facts = describe_branches(lengths, rates, tokens, num_heads=heads, head_dim=8, head_offset=offset)
    assert facts.is_exact
    assert facts.flops_per_token == pytest.approx(4 * 8 * int(counts.sum()) / tokens)
    sees = (counts.sum(0) > 0).float()
    assert facts.coverage == pytest.approx(float(sees.mean()))
    paths, reach = (sees + torch.eye(tokens)).clamp(max=1), 1
    heard = paths
    while not bool(heard.bool().all()) and reach < tokens:
        heard, reach = (heard @ paths).clamp(max=1), reach + 1
    assert facts.reach == (reach if bool(heard.bool().all()) else None)


def test_many_tokens_are_sampled_and_the_estimate_is_near(monkeypatch):
    exact = describe_branches([128, 512, 2048], [1, 4, 16], num_heads=16)
    monkeypatch.setattr(module, "EXACT_TOKENS", 1024)
    sampled = describe_branches([128, 512, 2048], [1, 4, 16], num_heads=16)
    assert (exact.is_exact, sampled.is_exact) == (True, False)
    assert sampled.flops_per_token == exact.flops_per_token
    assert sampled.reach == exact.reach
    assert sampled.coverage == pytest.approx(exact.coverage, rel=0.1)


def test_rates_beyond_the_heads_are_reached_through_their_grids():
    facts = describe_branches([256, 2048, 16384, 131072, 1 << 20], [1, 8, 64, 512, 4096], num_heads=12)
    assert facts.reach is not None  # samples that missed the sparse grid would say never


def test_branches_are_suggested_within_the_budget():
    for budget in (2e6, 8e6):
        facts = suggest_branches(32768, flop_budget_per_token=budget, num_heads=8, head_dim=64)
        assert budget / 4 < facts.flops_per_token <= budget
        assert facts.segment_lengths[-1] == facts.tokens == 32768
        assert facts.reach is not None
        assert facts == describe_branches(facts.segment_lengths, facts.dilation_rates, 32768, num_heads=8)
    full = suggest_branches(1000, flop_budget_per_token=1e12)
    assert (full.segment_lengths, full.dilation_rates, full.reach, full.coverage) == ((1000,), (1,), 1, 1.0)
    with pytest.raises(InvalidInput, match="is below what 32768 tokens"):
        suggest_branches(32768, flop_budget_per_token=1e3)


@pytest.mark.parametrize("word", ["tokens", "num_heads", "head_dim"])
def test_numbers_are_checked(word):
    with pytest.raises(InvalidInput, match=f"{word} must be an int from 1"):
        describe_branches([4], [1], **{"tokens": 4, word: 0})


def test_presets_are_layers_by_name():
    assert set(PRESETS) >= {"small", "medium", "large", "longnet-base", "gigapath", "code", "genome"}
    assert {name for name in PRESETS if "longvit" in name} == {f"longvit-{size}k" for size in (1, 4, 8, 16, 32)}
    for name, preset in PRESETS.items():
        layer = create_attention_from_preset(name, 32, 16, position="rotary")
        assert layer.attention.pattern == longnet(**preset)
        assert layer.position == "rotary"
    twin = create_multihead_dilated_attention("auto", embed_dim=32, num_heads=4, **PRESETS["small"])
    assert twin.attention.segment_lengths == (1024, 2048)
    base = LongNetLMConfig(num_tokens=256)
    assert PRESETS["longnet-base"] == {"segment_lengths": base.segment_lengths, "dilation_rates": base.dilation_rates}
    assert create_attention_from_preset("large", 32, 4, "standard").attention.backend == ("sdpa", "dense")
    with pytest.raises(InvalidInput, match="there is no preset 'largest'; did you mean 'large'"):
        create_attention_from_preset("largest", 32, 4)
    with pytest.raises(TypeError):
        PRESETS["small"]["segment_lengths"] = (1,)


def test_the_page_s_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["layer"].attention.segment_lengths == (2048, 4096, 8192)
    assert names["found"].flops_per_token <= 2e7


def test_the_page_shows_what_is_computed():
    table = re.search(r"<!-- table: presets -->\n(.*?)<!-- end -->", PAGE.read_text(), re.S)[1]
    assert table == module.preset_table(num_heads=16)


def test_places_of_samples_are_tokens():
    config = module.DilatedAttentionConfig([128, 1 << 30], [1, 1 << 20])
    for tokens in (module.EXACT_TOKENS + 1, 100_000, 1 << 30):
        places = module._places(config, tokens)
        assert places[0] == 0
        assert places[-1] == tokens - 1
        assert len(np.unique(places)) == len(places) <= 2 * module.SAMPLED_TOKENS
