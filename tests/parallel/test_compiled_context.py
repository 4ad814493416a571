"""A compiled model stops at attention over ranks, runs it as it is, and goes on behind it."""

import torch
import torch.distributed as dist

from dilated_attention_pytorch import Causal, ContextParallel
from parallel.worlds import run_world


def _differences():
    context = ContextParallel(layout="zigzag")
    q = torch.randn(1, 32, 2, 8, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()

    def model(x):
        return context.attend(x * 2, x, x, Causal()) + 1

    def both(function):
        out = function(q)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), q)]

    return [float((a - b).abs().max()) for a, b in zip(both(model), both(torch.compile(model, backend="eager")))]


def test_a_compiled_model_gives_the_same():
    for differences in run_world(2, _differences, timeout=120):
        assert differences == [0.0, 0.0]
