"""Layers: attention with and without projections, transformer blocks, positions, and the key-value cache."""

from dilated_attention_pytorch.nn.adaptive import AdaptiveSparseAttention, MultiheadAdaptiveSparseAttention
from dilated_attention_pytorch.nn.attention import DilatedAttention, MultiheadDilatedAttention
from dilated_attention_pytorch.nn.cache import KeyValueCache, LayerCache
from dilated_attention_pytorch.nn.context import set_context_parallel
from dilated_attention_pytorch.nn.convolution import ShortConvolution
from dilated_attention_pytorch.nn.multihead import MultiheadPatternAttention
from dilated_attention_pytorch.nn.ordered import Ordered
from dilated_attention_pytorch.nn.positions import Rotary, Rotation, XPos, alibi_slopes, rotate
from dilated_attention_pytorch.nn.sparse import BlockSparseAttention, MultiheadBlockSparseAttention
from dilated_attention_pytorch.nn.transformer import (
    DilatedTransformer,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    FeedForward,
    encoder_decoder_gains,
    stack_gain,
)

__all__ = [
    "AdaptiveSparseAttention",
    "BlockSparseAttention",
    "DilatedAttention",
    "DilatedTransformer",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "FeedForward",
    "KeyValueCache",
    "LayerCache",
    "MultiheadAdaptiveSparseAttention",
    "MultiheadBlockSparseAttention",
    "MultiheadDilatedAttention",
    "MultiheadPatternAttention",
    "Ordered",
    "Rotary",
    "Rotation",
    "ShortConvolution",
    "XPos",
    "alibi_slopes",
    "encoder_decoder_gains",
    "rotate",
    "set_context_parallel",
    "stack_gain",
]
