"""Attention over many ranks: each holds a shard of the tokens and gets its shard of the output, exact in gradient."""

from dilated_attention_pytorch.parallel.choice import Choice, choose_method
from dilated_attention_pytorch.parallel.context import ContextParallel, context_parallel_attend
from dilated_attention_pytorch.parallel.costs import best_layout
from dilated_attention_pytorch.parallel.explanation import WorldExplanation, explain_world
from dilated_attention_pytorch.parallel.layouts import Layout
from dilated_attention_pytorch.parallel.machines import MACHINES, Machine
from dilated_attention_pytorch.parallel.sharding import shard_sequence, unshard_sequence

__all__ = [
    "MACHINES",
    "Choice",
    "ContextParallel",
    "Layout",
    "Machine",
    "WorldExplanation",
    "best_layout",
    "choose_method",
    "context_parallel_attend",
    "explain_world",
    "shard_sequence",
    "unshard_sequence",
]
