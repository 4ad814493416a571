"""The size of tiles is a choice of a backend's options: another size, the same result."""

import pytest
import torch

from dilated_attention_pytorch import Causal, Dilated, InvalidInput, reference_attention
from dilated_attention_pytorch.backends import NativeBackend, SdpaBackend, select
from dilated_attention_pytorch.backends.base import TILES, Options, check_tile
from dilated_attention_pytorch.backends.native.backend import NativeOptions
from dilated_attention_pytorch.backends.sdpa import SdpaOptions
from dilated_attention_pytorch.backends.tuning import Choice, Key, Measured, Table, Timing, pattern_class, using
from dilated_attention_pytorch.benchmark import tune
from dilated_attention_pytorch.patterns import BlockSparse, random_blocks
from dilated_attention_pytorch.plans import TilePlan, candidate_plans
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.selection import MeanPooled, Selector, TopBlocks

KINDS = [(NativeBackend, NativeOptions), (SdpaBackend, SdpaOptions)]


def _problem(tokens: int = 1100, heads: int = 2):
    q, k, v = torch.randn(3, 1, tokens, heads, 16)
    return make_problem(q, k, v, scale=0.25, query_start=0)


def _tiles(pattern, problem, largest: int) -> TilePlan:
    return next(p for p in candidate_plans(pattern, problem, True, largest) if isinstance(p, TilePlan))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k[0].name)
@pytest.mark.parametrize("tile", TILES)
def test_any_size_gives_the_same_result(kind, tile):
    backend = kind[0](kind[1](tile=tile))
    if backend.import_error() is not None:
        pytest.skip(f"{backend.name} cannot run here: {backend.import_error()}")
    problem = _problem()
    pattern = random_blocks(1100, block_size=256, links=2, seed=3) & Causal()
    plan = _tiles(pattern, problem, tile)
    assert plan.block_size == (tile, tile)
    out, lse = backend.forward(problem, plan)
    expected, expected_lse = reference_attention(problem.q, problem.k, problem.v, pattern, scale=0.25)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)


def test_tiles_follow_blocks_up_to_the_largest():
    problem = _problem()
    sizes = [_tiles(random_blocks(1100, block_size=32, links=4), problem, largest).block_size for largest in TILES]
    assert sizes == [(16, 16), (32, 32), (32, 32), (32, 32), (32, 32)]
    assert _tiles(Dilated(6, 2) & Dilated(9, 3), problem, 64).block_size == (64, 64)


def test_rows_that_were_chosen_apart_share_no_tile_at_any_size():
    problem = _problem()
    chosen = Selector(MeanPooled(), TopBlocks(), block_size=64)(problem.q, problem.k, 4, Causal())
    assert [_tiles(chosen, problem, largest).block_size[0] for largest in TILES] == [16, 32, 64, 64, 64]


def test_auto_walks_tiles_of_the_size_that_was_measured():
    problem, pattern = _problem(1024), random_blocks(1024, block_size=128, links=3)
    key = Key("float32", 16, "blocks", 1024, False, False)
    for tile in (64, 128):
        choice = Choice("sdpa", "TilePlan", SdpaOptions(tile=tile))
        with using(Table("cpu", {key: (Measured(choice, Timing(1.0, 1.0, 1.0, 1)),)})):
            backend, plan = select(problem, candidate_plans(pattern, problem))
        assert (backend.name, backend.options) == ("sdpa", choice.options)
        assert isinstance(plan, TilePlan)
        assert plan.block_size == (tile, tile)


def test_sizes_are_measured_where_they_make_a_difference():
    key = Key("float32", 64, "blocks", 4096, False, False)
    one = tune.example(key, torch.device("cpu"))
    found = tune.candidates(one.problem, one.pattern, key.pattern, (SdpaBackend(),))
    tiles = {
        choice.options.tile: tune.tiles_of(plan) for choice, (_, plan) in found.items() if choice.plan == "TilePlan"
    }
    assert tiles == {128: (128, 128), 64: (64, 64)}, "tiles of 256 would be those of 128: blocks have 128 tokens"
    strided = tune.candidates(one.problem, Causal(), "causal", (SdpaBackend(),))
    assert {c.options.tile for c in strided if c.plan == "StridedPlan"} == {128}


def test_block_patterns_are_a_class_of_their_own():
    blocks = BlockSparse(4, torch.ones(2, 2, dtype=torch.bool))
    assert pattern_class(blocks & Causal()) == "blocks"
    assert pattern_class(Dilated(4, 2) & Dilated(6, 3)) == "other"


def test_sizes_that_are_none():
    assert Options().tile == 128
    for kind in (NativeOptions, SdpaOptions):
        with pytest.raises(InvalidInput, match="tile to be one of 16"):
            kind(tile=100)
    with pytest.raises(InvalidInput, match="Got True"):
        check_tile("x", True)
