"""What is estimated is what a model has, what autograd keeps, and what process groups carry."""

import dataclasses
import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention_pytorch import Causal, InvalidInput, longnet
from dilated_attention_pytorch.benchmark.received import ReceivedBytes
from dilated_attention_pytorch.nn.context import set_context_parallel
from dilated_attention_pytorch.parallel import ContextParallel, Layout, context_parallel_attend
from dilated_attention_pytorch.parallel.choice import METHODS, rank_problem
from dilated_attention_pytorch.parallel.costs import planned_world
from dilated_attention_pytorch.parallel.estimate import Job, Stack, estimate
from dilated_attention_pytorch.parallel.explanation import explain_world
from dilated_attention_pytorch.parallel.machines import MACHINES
from dilated_attention_pytorch.problem import make_problem
from parallel.kept_activations import PATTERN, SMALL, kept_bytes, kept_of_a_layer, model_of
from parallel.worlds import run_world

H100 = MACHINES["h100"]
LENGTH = 101
FAR = longnet([16, 256], [1, 4])  # among shards of 16 rows


@pytest.mark.parametrize("stack", [Stack(), SMALL, Stack(64, 3, 4, kv_heads=2, feedforward=100, vocabulary=50)])
def test_parameters_are_the_models(stack):
    model = model_of(stack, device="meta")
    assert stack.parameters == sum(p.numel() for p in model.parameters())
    assert stack.layer_parameters == sum(p.numel() for p in model.decoder.layers[0].parameters())
    weights = [p.numel() for p in model.decoder.layers[0].parameters() if p.dim() == 2]
    assert stack.layer_weights == sum(weights)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_activations_are_what_autograd_keeps(kv_heads):
    stack = dataclasses.replace(SMALL, kv_heads=kv_heads)
    assert kept_of_a_layer(None, kv_heads, LENGTH) == LENGTH * stack.kept(4)
    with_checkpoints = [
        kept_bytes(dataclasses.replace(stack, layers=n), None, LENGTH, checkpoint_activations=True) for n in (2, 3)
    ]
    assert with_checkpoints[1] - with_checkpoints[0] == LENGTH * stack.hidden * 4


def kept_and_carried():
    """By method: bytes that a layer keeps here; by case: bytes that came to this rank forward and backward."""
    kept = {
        method: kept_of_a_layer(ContextParallel(method=method), None, 96) for method in ("ring", "gather", "all_to_all")
    }
    carried = {}
    for layout, method in CASES:
        carried[layout, method] = carried_by(layout, method, LENGTH, 6)
    return kept, carried


CASES = [("contiguous", "ring"), ("contiguous", "gather"), ("contiguous", "all_to_all"), ("zigzag", "gather"),
         ("striped", "ring")]  # fmt: skip


def carried_by(layout, method, length, heads, mesh=None):
    """What the process group brings to this rank in one call, forward and backward."""
    own = Layout(layout, length, dist.get_world_size()).count(dist.get_rank())
    q, k, v = (torch.randn(1, own, heads, 4, requires_grad=True) for _ in range(3))
    ways = []
    with ReceivedBytes() as came:
        out = context_parallel_attend(q, k, v, PATTERN, layout=layout, method=method, mesh=mesh, total_length=length)
    ways.append(came.total)
    with ReceivedBytes() as came:
        out.sum().backward()
    return (*ways, came.total)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_what_gloo_carries(size):
    kept, carried = zip(*run_world(size, kept_and_carried))
    x = torch.empty(1, LENGTH, 6, 4, device="meta")
    for case in CASES:
        told = explain_world(x, x, x, PATTERN, world=size, layout=case[0], method=case[1])
        found = [of_rank[case] for of_rank in carried]
        assert told.received == tuple(map(max, zip(*found))), case
        assert told.mean_received == tuple(round(sum(way) / size) for way in zip(*found)), case
        assert told.received.forward == sum(leg.received.forward for leg in told.legs)
    for method in ("ring", "gather", "all_to_all"):
        job = Job(SMALL, PATTERN, 96, size, method=method, dtype="fp32")
        found = estimate(job, H100)
        (activations,) = (x.amount for x in found.memory if x.name == "activations")
        assert activations == 2 * max(of_rank[method] for of_rank in kept), method
        calls = {c.name.partition(",")[2]: c for c in found.wire if c.name.startswith(("attention", "heads"))}
        y = torch.empty(1, 96, 6, 4, device="meta")
        one = explain_world(y, y, y, PATTERN, world=size, method=method).received
        assert (calls[" forward"].received, calls[" backward"].received) == (2 * one.forward, 2 * one.backward)


class Parameters(TorchDispatchMode):
    """Bytes that FSDP2's collectives bring to this rank, and how many there are, by name."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in ("_allgather_base_", "_reduce_scatter_base_") and args[0].is_floating_point():
            small, large = sorted((x.numel() * x.element_size()) for x in args[:2])
            came = large - small if name == "_allgather_base_" else small * (dist.get_world_size() - 1)
            self.bytes[name] = self.bytes.get(name, 0) + came
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def sharded_step():
    from torch.distributed.fsdp import fully_shard

    stack = Stack(hidden=48, layers=2, heads=6, feedforward=96, vocabulary=64)
    model = model_of(stack)
    context = ContextParallel(method="gather")
    set_context_parallel(model, context)
    for layer in model.decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    tokens = context.shard(torch.randint(64, (1, 96)))
    with Parameters() as came:
        logits = model(tokens)
        logits.square().mean().backward()
    return stack, came.bytes, came.calls


def test_parameters_on_the_wire_are_those_of_fsdp():
    ((stack, came, calls), _) = run_world(2, sharded_step)
    found = {c.name: c for c in estimate(Job(stack, PATTERN, 96, 2), H100).wire}
    forward, backward, gradients = (
        found[name]
        for name in (
            "parameters, forward (all_gather)",
            "parameters, backward (all_gather)",
            "gradients (reduce_scatter)",
        )
    )
    assert forward.received + backward.received == pytest.approx(came["_allgather_base_"], rel=0.02)
    assert gradients.received == pytest.approx(came["_reduce_scatter_base_"], rel=0.02)
    assert forward.calls + backward.calls == calls["_allgather_base_"]
    assert gradients.calls == calls["_reduce_scatter_base_"]


def among_a_thousand(length, rank):
    """What a rank of 1024 would receive, said by a process group that moves nothing, and the collectives it counts."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=1024, store=FakeStore())
    own = Layout("contiguous", length, 1024).count(rank)
    found = {}
    for method in ("gather", "ring"):
        q, k, v = (torch.zeros(1, own, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with CommDebugMode() as counted, ReceivedBytes() as forward:
            out = context_parallel_attend(q, k, v, FAR, method=method, total_length=length)
        with ReceivedBytes() as backward:
            out.sum().backward()
        counts = {str(op): n for op, n in counted.get_comm_counts().items()}
        found[method] = forward.total, backward.total, counts
    return found


def test_bytes_and_collectives_among_a_thousand_ranks():
    length = 16 * 1024 + 5
    x = torch.empty(1, 1, 4, 8, dtype=torch.bfloat16, device="meta").expand(1, length, 4, 8)
    whole = make_problem(x, x, x, scale=1.0, query_start=0)
    world = planned_world(whole, "contiguous", 1024, 33)
    (found,) = run_world(1, among_a_thousand, length, 33)
    for method in ("gather", "ring"):
        told = METHODS[method].traffic(rank_problem(whole, world, 33), FAR, world)
        assert found[method][:2] == told, method
    assert sum(found["gather"][2].values()) == 1  # one all-to-all brings the rows of all branches


def test_a_job_is_counted_as_its_parts():
    job = Job(Stack(), longnet([2048, 1 << 20], [1, 256]) & Causal(), 10**8, 64, dtype="bf16")
    plain = estimate(job, H100)
    again = estimate(dataclasses.replace(job, checkpoint_activations=True), H100)
    rows, layers = plain.attention.rows[1], 12
    amounts, saved = ({x.name: x.amount for x in found.memory} for found in (plain, again))
    assert amounts["parameters"] == amounts["gradients"] == 4 * math.ceil(job.stack.parameters / 64)
    assert amounts["optimizer"] == 2 * amounts["parameters"]
    came = plain.attention.received.forward
    assert amounts["activations"] == layers * (rows * job.stack.kept(2) + came)
    assert saved["activations"] == layers * rows * 768 * 2 + rows * job.stack.kept(2) + came
    work, more = ({x.name: x.amount for x in found.flops} for found in (plain, again))
    layer = 2 * rows * (4 * 768**2 + 2 * 768 * 3072)
    assert work["matrix products, forward"] == layers * layer + 2 * rows * 256 * 768
    assert work["attention, forward"] == layers * 2 * 128 * plain.attention.work.heaviest
    assert more["forward again"] == layers * layer + work["attention, forward"]
    assert plain.memory_bytes == sum(amounts.values()) > again.memory_bytes
    assert not plain.fits
    attained = H100.half_rate * H100.attained
    times = {x.name: x.amount for x in plain.times}
    assert times["attention, backward"] == pytest.approx(work["attention, backward"] / attained)
    assert plain.seconds == pytest.approx(sum(times.values()))
    assert plain.tokens_per_second == pytest.approx(10**8 / plain.seconds)
    four = estimate(dataclasses.replace(job, tokens=10**7, context=16), H100)
    assert four.tokens_per_second == pytest.approx(4 * 10**7 / four.seconds)
    assert json.loads(json.dumps(again.to_dict()))["machine"]["attained"] == H100.attained


def test_waiting_is_what_computing_does_not_hide():
    job = Job(Stack(), longnet([2048, 1 << 17], [1, 64]), 1 << 17, 8)
    fast, slow = (estimate(job, dataclasses.replace(H100, node_bandwidth=b)) for b in (1e12, 1e8))
    waits, waited = ({x.name: x.amount for x in found.times} for found in (fast, slow))
    assert waits["waiting for parameters"] == 0
    computing = sum(waited[x.name] for x in slow.flops)
    sent = sum(c.seconds for c in slow.wire if not c.name.startswith("attention"))
    assert waited["waiting for parameters"] == pytest.approx(sent - H100.overlap * computing)
    both = slow.attention.forward.exposed + slow.attention.backward.exposed
    assert both > 0
    assert waited["waiting for attention's rows"] == pytest.approx(12 * both)
    alone = estimate(dataclasses.replace(job, world=1), H100)
    assert alone.wire == ()
    assert alone.seconds == pytest.approx(sum(x.amount for x in alone.flops) / (H100.half_rate * H100.attained))


def test_jobs_that_cannot_be():
    for bad in ({"tokens": 0}, {"world": 0}, {"context": 3}, {"dtype": "int8"}, {"inner": True}):
        with pytest.raises(InvalidInput, match=r"^Job: "):
            Job(**{"stack": SMALL, "pattern": PATTERN, "tokens": 64, "world": 4} | bad)
    for bad in ({"heads": 5}, {"layers": 0}, {"kv_heads": 4}):
        with pytest.raises(InvalidInput, match=r"^Stack: "):
            dataclasses.replace(SMALL, **bad)
