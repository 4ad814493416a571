"""Attention over many ranks: each holds a shard of the tokens and gets its shard of the output, exact in gradient."""

from dilated_attention_pytorch.parallel.choice import Choice, choose_method
from dilated_attention_pytorch.parallel.context import ContextParallel, context_parallel_attend
from dilated_attention_pytorch.parallel.layouts import Layout
from dilated_attention_pytorch.parallel.sharding import shard_sequence, unshard_sequence

__all__ = [
    "Choice",
    "ContextParallel",
    "Layout",
    "choose_method",
    "context_parallel_attend",
    "shard_sequence",
    "unshard_sequence",
]
