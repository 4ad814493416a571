"""A start from which a language model copies: what followed the same few tokens earlier is looked up from step one.

Induction heads (arXiv 2209.11895) match the tokens before a place with the tokens before the query, and read the place.
They form late in training from random weights. Here the first weights already hold the match, and all of them are
learned further; nothing in the computation is new.
"""

from __future__ import annotations

import torch
from torch import nn

from dilated_attention_pytorch.nn.attention import MultiheadDilatedAttention
from dilated_attention_pytorch.nn.convolution import ShortConvolution

MATCH = 8.0
"""The logit between a query and a key behind the same tokens, when attention starts; other pairs stand near 0."""
DECAY = 0.8
"""How much less each token further back counts in a match."""


@torch.no_grad()
def start_copying(embedding: nn.Embedding, convolution: ShortConvolution, attention: MultiheadDilatedAttention) -> None:
    """Set the first weights so that queries look for keys whose preceding tokens are their own latest ones.

    The embedding's halves become equal. The convolution writes the latest ``width - 1`` tokens, each by signs of its
    own, into the first half of a row, and the ones before the row's own into the second. Queries read the first half,
    keys the second, by the same random projection. ``d_model`` is even and ``width`` at least 2.
    """
    half = embedding.embedding_dim // 2
    embedding.weight[:, half:] = embedding.weight[:, :half]
    taps = convolution.taps
    reach = taps.shape[0] - 1
    signs = torch.randint(0, 2, (reach, half), device=taps.device).to(taps) * 2 - 1
    codes = signs * DECAY ** torch.arange(reach, device=taps.device).unsqueeze(1)
    taps.zero_()
    taps[:reach, :half] = codes
    taps[1:, half:] = codes
    dim, group = attention.head_dim, attention.num_heads // attention.num_kv_heads
    query, key, _ = attention.qkv_proj.weight.split((attention.embed_dim, attention.kv_dim, attention.kv_dim))
    projection = torch.randn(attention.num_kv_heads, dim, half, device=key.device, dtype=key.dtype)
    projection *= (MATCH / (half * dim**0.5)) ** 0.5
    query.zero_()
    key.zero_()
    query.view(attention.num_kv_heads, group, dim, 2 * half)[..., :half] = projection.unsqueeze(1)
    key.view(attention.num_kv_heads, dim, 2 * half)[..., half:] = projection
