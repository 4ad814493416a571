"""What is explained and estimated of worlds of two to eight is what gloo carries there, on meshes too."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dilated_attention_pytorch import Causal, Documents, Full, Window, longnet
from dilated_attention_pytorch.benchmark.received import ReceivedBytes
from dilated_attention_pytorch.parallel import Layout, context_parallel_attend
from dilated_attention_pytorch.parallel.explanation import explain_world
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
