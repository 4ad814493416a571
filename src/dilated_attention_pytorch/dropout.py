"""Attention dropout as a pure function of (seed, sample, head, query position, key position).

The generator is Philox-4x32-10 (Salmon et al., SC 2011), computed with int64 arithmetic that every device has. A pair
is kept or dropped alike in the reference, in any chunk of any backend, and on any rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * constant``; 16-bit halves keep the products within int64."""
    high, low = a >> 16, a & 0xFFFF
    carry = high * constant + ((low * constant) >> 16)  # < 2^49
    return carry >> 16, ((carry & 0xFFFF) << 16) | ((low * constant) & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """The first 32-bit word of Philox-4x32-10 for broadcastable int64 counters and keys, as int64 in [0, 2^32).

    Example:
        >>> import torch
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> hex(int(philox((zero, zero, zero, zero), (zero, zero))))
        '0x6627e8d5'
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0


def dropout_factors(
    seed: Tensor, dropout_p: float, row: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``M`` in {0, 1 / (1 - dropout_p)} for pairs of positions ``q`` and ``k``, in ``dtype``, of the broadcast shape.

    ``row`` numbers the (sample, head): ``b * H + h``. All integer tensors broadcast.
    """
    seed = seed.reshape(())
    word = philox(
        (q & WORD, k & WORD, row & WORD, ((q >> 32) & 0xFFFF) | (((k >> 32) & 0xFFFF) << 16)),
        (seed & WORD, (seed >> 32) & WORD),
    )
    return (word >= int(dropout_p * 2.0**32)).to(dtype) / (1.0 - dropout_p)
