"""Any model that calls `attend` becomes context parallel in five lines; here one does, and checks itself.

Every rank holds a shard of the tokens. Output and gradients are those of one process.

Run: torchrun --standalone --nproc-per-node 2 examples/parallel_in_five_lines.py
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dilated_attention_pytorch import Causal, attend, longnet
from dilated_attention_pytorch.parallel import ContextParallel

PATTERN = longnet([64, 256], [1, 4]) & Causal()
TOKENS, WIDTH, HEADS = 500, 32, 4


class Reader(nn.Module):
    """A model that knows nothing of ranks: it calls a function that it was given."""

    def __init__(self, attention: Callable[..., Tensor] = attend) -> None:
        super().__init__()
        self.attention = attention
        self.heads = nn.Linear(WIDTH, 3 * WIDTH)
        self.judge = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, N) of tokens x (B, N, E)."""
        q, k, v = self.heads(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        return self.judge(x + self.attention(q, k, v, PATTERN).flatten(2)).squeeze(-1)


def squares(scores: Tensor, labels: Tensor) -> Tensor:
    """A loss that is a sum over tokens: the whole's is the sum of the shards'."""
    return (scores - labels).square().sum()


def main() -> float:
    """Train a step alone and a step in parallel, and return the largest difference between both."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS)
    model = Reader().double()
    x, labels = x.double(), labels.double()
    alone = model(x)
    expected = torch.autograd.grad(squares(alone, labels), tuple(model.parameters()))

    context = ContextParallel(layout="zigzag")  # 1: the ranks, and which rows each holds
    model.attention = context.attend  # 2: attention over all shards
    x, labels = context.shard(x), context.shard(labels)  # 3: this rank's tokens
    loss = squares(model(x), labels)
    grads = torch.autograd.grad(loss, tuple(model.parameters()))
    if dist.is_initialized():
        for grad in grads:
            dist.all_reduce(grad)  # 4: weights are the same on every rank, so their gradients are sums
    scores = context.unshard(model(x))  # 5: the whole, where it is wanted

    pairs = zip((scores, *grads), (alone, *expected))
    return max(float((found - wanted).detach().abs().max()) for found, wanted in pairs)


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    error = main()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    print(f"rank {rank} of {size}: largest difference from one process {error:.1e}")
    if dist.is_initialized():
        dist.destroy_process_group()
