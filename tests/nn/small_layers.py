"""Small heads, rows and layers that tests of sparse layers share."""

import torch

from dilated_attention_pytorch import reference_attention
from dilated_attention_pytorch.nn import (
    MultiheadAdaptiveSparseAttention,
    MultiheadBlockSparseAttention,
    MultiheadDilatedAttention,
)
from dilated_attention_pytorch.selection import (
    MeanPooled,
    Selector,
    TopBlocks,
)

CHOOSER = Selector(MeanPooled(), TopBlocks(), block_size=8)


def heads(length=48, num_heads=4, kv_heads=None, queries=None, seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    sizes = ((queries or length, num_heads), (length, kv_heads or num_heads), (length, kv_heads or num_heads))
    return tuple(torch.randn(batch, n, h, 8, generator=g, dtype=torch.float64) for n, h in sizes)


def rows(length=48, batch=2, seed=1):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_sparse(*arguments, seed=0, **options):
    torch.manual_seed(seed)
    return MultiheadBlockSparseAttention(32, 4, *arguments, dtype=torch.float64, **options).eval()


def adaptive(selector=CHOOSER, budget=3, seed=0, **options):
    torch.manual_seed(seed)
    return MultiheadAdaptiveSparseAttention(32, 4, selector, budget, dtype=torch.float64, **options).eval()


def dilated_twin(module, pattern, **options):
    """The same weights in a layer whose pattern is given."""
    twin = MultiheadDilatedAttention(32, 4, pattern=pattern, dtype=torch.float64, **options).eval()
    twin.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("attention.")})
    return twin


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def attended(pattern, q, k, v, **options):
    return reference_attention(q, k, v, pattern, **options)[0]
