"""A block-sparse attention layer in ten lines: what it keeps, and its error against the float64 reference.

Run: python examples/block_sparse.py
"""

import torch

from dilated_attention_pytorch import BlockSparseAttention, reference_attention


def main() -> float:
    """Attend, print the share of blocks computed, and return the largest error against the reference."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1024, 4, 32).unbind()
    layer = BlockSparseAttention("global_local", block_size=32, density=0.2)
    out = layer(q, k, v, is_causal=True)
    pattern = layer.choose_pattern(q, k, is_causal=True, query_start=None)
    pairs = pattern.to_mask(num_heads=1, query_length=1024).float().mean().item()
    error = (out - reference_attention(q, k, v, pattern)[0]).abs().max().item()
    print(f"{layer}\ncomputed: {pairs:.1%} of all pairs, causal attention has 50 %")
    print(f"largest error against the reference {error:.1e}")
    return error


if __name__ == "__main__":
    main()
