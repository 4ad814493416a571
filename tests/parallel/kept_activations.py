"""A small `LongNetLM`, and what autograd keeps of its forward pass."""

import dataclasses

import torch

from dilated_attention_pytorch import Causal, longnet
from dilated_attention_pytorch.models.longnet import LongNetLM
from dilated_attention_pytorch.nn.context import set_context_parallel
from dilated_attention_pytorch.parallel.estimate import Stack

SMALL = Stack(hidden=24, layers=2, heads=6, feedforward=40, vocabulary=32)
SEGMENTS, RATES = [16, 48], [1, 2]
PATTERN = longnet(SEGMENTS, RATES) & Causal()


def model_of(stack, **options):
    return LongNetLM(
        stack.vocabulary,
        stack.hidden,
        stack.heads,
        num_decoder_layers=stack.layers,
        dim_feedforward=stack.width,
        num_kv_heads=stack.kv_heads,
        segment_lengths=SEGMENTS,
        dilation_rates=RATES,
        **options,
    )


def kept_bytes(stack, context, length, **options):
    """Bytes that autograd keeps of a forward pass beside parameters, each storage once."""
    model = model_of(stack, **options)
    tokens = torch.randint(stack.vocabulary, (1, length))
    if context is not None:
        set_context_parallel(model, context)
        tokens = context.shard(tokens)
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.hidden(tokens)
    assert hidden.shape == (*tokens.shape, stack.hidden)
    return sum(kept.values())


def kept_of_a_layer(context, kv_heads, length):
    """Bytes that one more layer keeps on this rank."""
    two, three = (kept_bytes(dataclasses.replace(SMALL, layers=n, kv_heads=kv_heads), context, length) for n in (2, 3))
    return three - two
