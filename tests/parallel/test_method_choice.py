"""The method of "auto" has the least on the wire among even ones, is the same on every rank, and is explained."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch import (
    BlockSparse,
    Causal,
    Documents,
    Full,
    InvalidInput,
    NoBackend,
    Relative,
    Window,
    longnet,
)
from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.parallel import choice as choice_module
from dilated_attention_pytorch.parallel.choice import (
    METHODS,
    Choice,
    asked_ranks,
    choose_method,
    most_received,
    rank_problem,
    received_by,
)
from dilated_attention_pytorch.parallel.costs import EVEN, planned_world, rank_work
from dilated_attention_pytorch.parallel.explanation import Overlap, WorldExplanation, explain_world
from dilated_attention_pytorch.parallel.machines import MACHINES, Machine, machine_named
from dilated_attention_pytorch.parallel.traffic import Traffic
from dilated_attention_pytorch.problem import make_problem

GIGAPATH = longnet([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16])


def tensors(length=4096, heads=8, kv_heads=None, dtype=torch.bfloat16, dim=16):
    one = torch.empty(1, dtype=dtype, device="meta")
    kv = one.expand(1, length, kv_heads or heads, dim)
    return one.expand(1, length, heads, dim), kv, kv


def whole(**options):
    return make_problem(*tensors(**options), scale=1.0, query_start=0)


def chosen(pattern, layout="contiguous", size=4, name="auto", rank=0, problem=None):
    problem = problem or whole()
    world = planned_world(problem, layout, size, rank)
    return choose_method(rank_problem(problem, world, rank), pattern, world, name)


@pytest.mark.parametrize("pattern", [longnet([256, 4096], [1, 8]), Full(), Window(64), longnet([64, 512], [1, 2])])
def test_auto_takes_the_fewest_bytes(pattern):
    found = chosen(pattern)
    assert not found.refused
    assert set(found.received) == set(METHODS)
    assert found.received[found.name].total == min(traffic.total for traffic in found.received.values())
    assert "fewest bytes" in found.because
    problem = whole()
    world = planned_world(problem, "contiguous", 4)
    for name, method in METHODS.items():
        each = [method.traffic(rank_problem(problem, world, r), pattern, replace(world, rank=r)) for r in range(4)]
        assert found.received[name] == (max(t.forward for t in each), max(t.backward for t in each))


def test_short_segments_are_gathered_and_full_attention_deals_out_heads():
    assert chosen(longnet([256, 4096], [1, 8])).name == "gather"
    assert chosen(Full()).name == "all_to_all"
    assert chosen(Full(), problem=whole(heads=7)).name != "all_to_all"


def test_uneven_work_outweighs_bytes():
    """Contiguous causal shards are uneven for own queries; what heads bring is more here, but even."""
    pattern, problem = longnet([4096], [8]) & Causal(), whole()
    found = chosen(pattern, problem=problem)
    assert found.name == "all_to_all"
    assert found.received["gather"].total < found.received["all_to_all"].total
    assert found.imbalance["gather"] > EVEN * found.imbalance["all_to_all"]
    assert "gather, ring is not" in found.because
    world = planned_world(problem, "contiguous", 4)
    assert found.imbalance["ring"] == rank_work(problem, pattern, world).imbalance
    assert found.imbalance["all_to_all"] == rank_work(problem, pattern, world, 4).imbalance
    assert chosen(pattern, "zigzag", problem=problem).name == "gather"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_all_ranks_choose_alike(layout, monkeypatch):
    problem, found = whole(length=1001), []
    for rank in range(4):
        monkeypatch.setattr(choice_module, "_cache", BoundedCache(256))
        found.append(chosen(longnet([100, 900], [1, 4]) & Causal(), layout, rank=rank, problem=problem))
    assert found == [found[0]] * 4


def test_what_cannot_is_refused_with_its_reasons():
    blocks = BlockSparse(64, torch.ones(64, 64, dtype=torch.bool))
    found = chosen(blocks, problem=whole(heads=6), size=4)
    assert found.name == "ring"
    assert "closed form" in found.refused["gather"][0]
    assert "must divide" in found.refused["all_to_all"][0]
    with pytest.raises(NoBackend, match="closed form"):
        chosen(blocks, name="gather")
    biased = replace(whole(), bias=torch.zeros(1, device="meta"))
    with pytest.raises(NoBackend, match=r"4 ranks.*bias"):
        chosen(Full(), problem=biased)
    with pytest.raises(InvalidInput, match=r"'auto', 'gather', 'ring', 'all_to_all'.*'tree'"):
        chosen(Full(), name="tree")


def test_a_method_asked_for_by_name_is_taken():
    assert chosen(Full(), name="ring") == Choice("ring", "it was asked for")
    sloped = replace(whole(), score=Relative(slopes=torch.ones(8)))
    assert set(chosen(Full(), problem=sloped).refused) == {"gather"}


def test_one_rank_sends_nothing():
    found = chosen(GIGAPATH, size=1)
    assert (found.because, found.refused) == ("nothing is sent", {})


def test_choices_are_kept(monkeypatch):
    problem, pattern = whole(length=3000), longnet([77, 3000], [1, 3])
    first = chosen(pattern, problem=problem)
    monkeypatch.setattr(choice_module, "received_by", None)  # would fail if asked again
    assert chosen(pattern, problem=problem, rank=2) == first
    monkeypatch.undo()
    monkeypatch.setattr(choice_module._cache, "size", 3)
    for length in range(100, 110):
        chosen(Full(), problem=whole(length=length))
    assert len(choice_module._cache) == 3
    other = torch.zeros(47, 47, dtype=torch.bool)
    world = planned_world(problem, "contiguous", 4)
    many = received_by("ring", problem, BlockSparse(64, ~other), world)
    none = received_by("ring", problem, BlockSparse(64, other), world)  # another table of the same text
    assert most_received(none) == (0, 0) < most_received(many)


def test_of_a_large_world_some_ranks_stand_for_all():
    ranks = asked_ranks(1000)
    assert (len(ranks), ranks[0], ranks[-1]) == (32, 0, 999)
    assert ranks == sorted(set(ranks))
    assert asked_ranks(32) == list(range(32))
    assert asked_ranks(9, 3) == [0, 4, 8]
    big = chosen(Full(), size=16, problem=whole(heads=16))
    world = planned_world(whole(heads=16), "contiguous", 16)
    assert big.received["ring"] == most_received(received_by("ring", whole(heads=16), Full(), world))


def test_explanation_of_a_world():
    q, k, v = tensors(length=1 << 20, heads=16, dim=48)
    found = explain_world(q, k, v, GIGAPATH, world=8)
    assert isinstance(found, WorldExplanation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.layout = "zigzag"
    problem = make_problem(q, k, v, scale=1.0, query_start=0)
    world = planned_world(problem, "contiguous", 8)
    work = rank_work(problem, GIGAPATH, world)
    assert found.work == work
    assert found.forward_flops == 2 * (48 + 48) * work.heaviest
    assert found.backward_flops == 5 * found.forward_flops // 2
    each = received_by("gather", problem, GIGAPATH, world)
    assert found.received == most_received(each)
    assert found.mean_received.forward == round(sum(t.forward for t in each) / 8)
    machine = MACHINES["h100"]
    seconds = (found.forward_flops + found.backward_flops) / (machine.half_rate * machine.attained)
    assert found.seconds == pytest.approx(seconds + found.forward.exposed + found.backward.exposed)
    text = str(found)
    for part in (
        "8 ranks, contiguous",
        "gather among 8: the fewest bytes",
        f"{work.heaviest:,}",
        "imbalance  1.010",
        "h100",
    ):
        assert part in text
    assert f"{found.received.forward / 2**20:,.1f} MiB forward" in text
    assert f"{found.forward.share:.0%} of" in text


def test_overlap_is_what_can_go_on_beside_the_wire():
    machine = Machine(
        "slow", 1e12, 1e11, 1e9, 1e8, 1e7, 2, "made up", attained=0.5, attained_bandwidth=0.5, overlap=0.5
    )
    q, k, v = tensors(length=1 << 14)
    pattern = longnet([2048, 1 << 14], [1, 8])
    found = {name: explain_world(q, k, v, pattern, world=2, method=name, machine=machine) for name in METHODS}
    for name, one in found.items():
        messages = {"gather": 1, "ring": 1, "all_to_all": 2}[name]
        assert one.forward.wire == pytest.approx(messages * 10e-6 + one.received.forward / 5e7)
        assert one.forward.hidden == min(one.forward.wire, 0.5 * one.forward.beside)
    assert found["all_to_all"].forward.beside == 0 == found["all_to_all"].forward.share
    assert found["ring"].forward.beside == pytest.approx(0.5 * found["ring"].forward_flops / 5e11)
    own = found["gather"].work.heaviest  # each rank sees half of the long branch's rows beside its own
    long = (1 << 14) // 8
    crossing = 8 * (long // 2) ** 2
    assert found["gather"].forward.beside == pytest.approx(
        (own - crossing) / own * found["gather"].forward_flops / 5e11
    )
    apart = explain_world(q, k, v, pattern, world=4, method="ring", machine=machine)  # more than a node holds
    assert apart.forward.wire == pytest.approx(3 * 20e-6 + apart.received.forward / 5e6)
    assert Overlap(0.0, 1.0, 0.0).share == 1.0


def test_padding_and_documents_are_read():
    x = torch.zeros(2, 512, 4, 8)
    mask = torch.arange(512) >= torch.tensor([512, 100])[:, None]
    told, bare = (explain_world(x, x, x, Full(), world=4, method="gather", key_padding_mask=m) for m in (mask, None))
    assert told.work.total == 4 * 512 * (512 + 100)
    assert bare.work.total == 4 * 512 * 1024
    assert told.received.forward < bare.received.forward
    packed = explain_world(x, x, x, Documents([128] * 4).of(Full()), world=4)
    assert packed.received == (0, 0)
    assert packed.forward.share == 1.0
    assert "nothing is sent" in str(packed)


def test_heads_inside_rows_of_a_mesh():
    q, k, v = tensors(length=1 << 16, heads=8)
    pattern = longnet([1024, 1 << 16], [1, 16])
    mixed = explain_world(q, k, v, pattern, world=8, inner=2, method="gather")
    inside, between = mixed.legs
    assert (inside.method, inside.ranks, between.method, between.ranks) == ("all_to_all", 2, "gather", 4)
    assert "all_to_all among 2 and gather among 4" in str(mixed)
    # half of a rank's q, k, v rows of all heads go, as many come; and its outputs and lse come home
    row = (1 << 13) * 4 * 16
    lse = (1 << 13) * 4 * 4
    assert inside.received.forward == 3 * row * 2 + row * 2 + lse
    assert mixed.received.forward == inside.received.forward + between.received.forward
    assert (
        mixed.work.pairs
        == rank_work(whole(length=1 << 16), pattern, planned_world(whole(length=1 << 16), "contiguous", 8), 2).pairs
    )
    alone = explain_world(q, k, v, pattern, world=8, method="gather")
    assert between.received.forward < alone.received.forward
    with pytest.raises(InvalidInput, match="divisor"):
        explain_world(q, k, v, pattern, world=8, inner=3)
    with pytest.raises(InvalidInput, match="must divide"):
        explain_world(q[:, :, :7], k[:, :, :7], v[:, :, :7], pattern, world=8, inner=2)


def test_the_layout_is_chosen_by_expected_time():
    q, k, v = tensors(length=1 << 16, heads=7)
    found = explain_world(q, k, v, Causal(), world=8, layout="auto")
    assert found.layout in ("zigzag", "striped")
    assert found.seconds == min(
        explain_world(q, k, v, Causal(), world=8, layout=name).seconds for name in ("contiguous", "zigzag", "striped")
    )
    assert explain_world(q, k, v, longnet([512], [1]), world=8, layout="auto").layout == "contiguous"


def test_a_thousand_ranks_and_a_billion_tokens(monkeypatch):
    monkeypatch.setattr(choice_module, "ASKED_RANKS", 4)
    q, k, v = tensors(length=10**9, heads=16, dim=48)
    found = explain_world(q, k, v, GIGAPATH & Causal(), world=1024)
    assert found.choice.name == "gather"
    assert found.rows == (976562, 976563)
    assert found.work.is_exact
    assert "all_to_all no:" in str(found)


def test_worlds_that_cannot_be():
    q, k, v = tensors()
    for bad in (0, -1, True, 2.0):
        with pytest.raises(InvalidInput, match="at least one rank"):
            explain_world(q, k, v, Full(), world=bad)
    with pytest.raises(InvalidInput, match="a pattern"):
        explain_world(q, k, v, "full", world=2)
    with pytest.raises(InvalidInput, match="layout"):
        explain_world(q, k, v, Full(), world=2, layout="spiral")
    with pytest.raises(InvalidInput, match=r"a100, h100.*'abacus'"):
        machine_named("abacus")
    with pytest.raises(InvalidInput, match="attained"):
        Machine("none", 1, 1, 1, 1, 1, 1, "made up", attained=0.0)
    with pytest.raises(InvalidInput, match="memory"):
        Machine("none", 1, 1, -1, 1, 1, 1, "made up")
    assert Traffic(1, 2).total == 3
