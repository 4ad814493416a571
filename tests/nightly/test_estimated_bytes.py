"""What is explained and estimated of worlds of two to eight is what gloo carries there, on meshes too."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dilated_attention_pytorch import Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.benchmark.received import ReceivedBytes
from dilated_attention_pytorch.parallel import ContextParallel, Layout, context_parallel_attend
from dilated_attention_pytorch.parallel.estimate import Job, estimate
from dilated_attention_pytorch.parallel.explanation import explain_world
from dilated_attention_pytorch.parallel.machines import MACHINES
from parallel.kept_activations import PATTERN, SMALL, kept_of_a_layer
from parallel.worlds import run_world

pytestmark = pytest.mark.nightly

PATTERNS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(30) & Causal(),
    "longnet": longnet([16, 48, 300], [1, 2, 8]),
    "longnet_causal": longnet([16, 48, 300], [1, 2, 8]) & Causal(),
    "not_nesting": longnet([50, 130], [3, 4]) & Causal(),
    "documents": Documents([70, 0, 110, 121]).of(longnet([16, 64], [1, 4])),
}
LAYOUTS = ("contiguous", "zigzag", "striped")
METHODS = ("ring", "gather", "all_to_all")
LENGTH = 301
MESHES = {4: (2,), 6: (2, 3), 8: (2, 4)}


def carried(inners):
    rank, size, found = dist.get_rank(), dist.get_world_size(), {}
    meshes = {
        inner: init_device_mesh("cpu", (size // inner, inner), mesh_dim_names=("outer", "inner")) for inner in inners
    }
    for name, pattern in PATTERNS.items():
        for layout in LAYOUTS:
            own = Layout(layout, LENGTH, size).count(rank)
            for inner, method in [(1, m) for m in METHODS] + [(i, m) for i in inners for m in ("ring", "gather")]:
                q, k, v = (torch.randn(1, own, 24, 4, requires_grad=True) for _ in range(3))
                options = {"layout": layout, "method": method, "total_length": LENGTH, "mesh": meshes.get(inner)}
                with ReceivedBytes() as forward:
                    out = context_parallel_attend(q, k, v, pattern, **options)
                with ReceivedBytes() as backward:
                    out.sum().backward()
                found[name, layout, inner, method] = forward.total, backward.total
    return found


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_bytes_of_a_world(size):
    told = run_world(size, carried, MESHES.get(size, ()), timeout=600)
    x = torch.empty(1, LENGTH, 24, 4, device="meta")
    for case in told[0]:
        name, layout, inner, method = case
        found = explain_world(x, x, x, PATTERNS[name], world=size, inner=inner, layout=layout, method=method)
        of_ranks = [of_rank[case] for of_rank in told]
        assert found.received == tuple(map(max, zip(*of_ranks))), case
        assert found.mean_received == tuple(round(sum(way) / size) for way in zip(*of_ranks)), case


def kept_on_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return {
        (method, kv_heads): kept_of_a_layer(ContextParallel(mesh=mesh, method=method), kv_heads, 96)
        for method in ("ring", "gather")
        for kv_heads in (6, 2, 1)
    }


def test_activations_on_a_mesh_are_what_autograd_keeps():
    told = run_world(4, kept_on_a_mesh)
    for method, kv_heads in told[0]:
        stack = dataclasses.replace(SMALL, kv_heads=kv_heads)
        found = estimate(Job(stack, PATTERN, 96, 4, inner=2, method=method, dtype="fp32"), MACHINES["h100"])
        (activations,) = (x.amount for x in found.memory if x.name == "activations")
        assert activations == stack.layers * max(of_rank[method, kv_heads] for of_rank in told)
