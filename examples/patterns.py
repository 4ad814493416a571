"""Patterns: draw them, combine them, ask what they cost, and check one against the float64 reference.

Run: python examples/patterns.py
"""

import torch

from dilated_attention_pytorch import Causal, Documents, Window, attend, explain, longnet, reference_attention


def main() -> None:
    """Draw three patterns, explain one at a million tokens, and measure its error on a short sequence."""
    dilated = longnet(segment_lengths=[4, 8, 16], dilation_rates=[1, 2, 4])
    patterns = {
        "LongNet, causal": dilated & Causal(),
        "LongNet and a window": dilated + Window(2),
        "LongNet in two packed documents": Documents([10, 6]).of(dilated),
    }
    for name, pattern in patterns.items():
        print(f"{name} (digits: how often a query sees a key)\n{pattern.draw(16)}\n")

    million = torch.empty(1, 1_000_000, 12, 64, device="meta")
    print(explain(million, million, million, longnet([2048, 8192, 32768], [1, 2, 4]) & Causal()))

    q, k, v = (torch.randn(2, 500, 4, 32) for _ in range(3))
    for name, pattern in patterns.items():
        packed = pattern if "documents" not in name else Documents([300, 200]).of(dilated)
        expected, _ = reference_attention(q, k, v, packed)
        error = (attend(q, k, v, packed) - expected).abs().max()
        print(f"{name}: largest error against the reference {error:.1e}")


if __name__ == "__main__":
    main()
