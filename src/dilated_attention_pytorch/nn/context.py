"""Every attention layer of a model told at once that tokens are dealt over ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import PatternAttention
from dilated_attention_pytorch.parallel.context import ContextParallel


def set_context_parallel(model: nn.Module, context: ContextParallel | DeviceMesh | None) -> None:
    """Every attention layer in ``model`` takes its rank's shards and gives shards; with None, whole sequences again.

    Inputs, padding masks and labels are then shards, as ``context.shard`` gives them. Rotary and xPos positions, and
    the tokens that rows of `LongNetLM` look back to, are those of the whole sequence. A mesh of one dim, such as
    ``mesh["context"]``, means ``ContextParallel(mesh=...)``. Nothing of this is in a state dict or a config. Dropout of
    attention weights draws as one process does; each rank draws other dropout from its own generator, so seed the ranks
    differently.

    Raises InvalidInput, and changes nothing, where there is no such layer, or one that needs whole sequences.

    Example:
        >>> from dilated_attention_pytorch.nn.attention import DilatedAttention
        >>> model = nn.Sequential(DilatedAttention([32], [1]))
        >>> set_context_parallel(model, ContextParallel(layout="zigzag"))
        >>> model[0].context_parallel.layout
        'zigzag'
    """
    layers = [module for module in model.modules() if isinstance(module, PatternAttention)]
    if not layers:
        raise InvalidInput(
            f"{type(model).__name__} has no attention layer of this library, so its tokens cannot be dealt over ranks."
        )
    checked = [layer.checked_context(context) for layer in layers]
    for layer, its in zip(layers, checked):
        layer.context_parallel = its
