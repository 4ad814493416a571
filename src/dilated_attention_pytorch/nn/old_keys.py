"""Weights saved by versions 0.1 and 0.2: which of their keys are ours under which name, and why some cannot be.

The functions rename in place what ``load_state_dict`` hands a module, before it looks for its own keys. Whatever has
only today's keys is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput

ENCODER_BLOCK = {
    "norm1": "norm",
    "norm2": "feed_forward.norm",
    "linear1": "feed_forward.linear1",
    "norm3": "feed_forward.sub_norm",
    "linear2": "feed_forward.linear2",
}
DECODER_BLOCK = {
    "norm1": "norm",
    "norm2": "cross_norm",
    "multihead_attn": "cross_attn",
    "norm3": "feed_forward.norm",
    "linear1": "feed_forward.linear1",
    "norm4": "feed_forward.sub_norm",
    "linear2": "feed_forward.linear2",
}
_WRAPPERS = ("attention_core.", "qkv_projection.")


def rename_attention_keys(state: dict[str, Any], prefix: str) -> None:
    """A multihead layer's keys of 0.1 and 0.2 in ``state`` become ours, under ``prefix``.

    Separate ``q_proj``, ``k_proj`` and ``v_proj`` are joined into ``qkv_proj``. Fused layers of 0.2 kept the
    sub-LayerNorm under ``q_ln`` and never used ``k_ln``. Raises InvalidInput, and changes nothing, for weights of a
    computation that no layer here does.

    Example:
        >>> state = {f"{name}_proj.weight": torch.eye(2) for name in "qkv"}
        >>> rename_attention_keys(state, "")
        >>> {key: tuple(x.shape) for key, x in state.items()}
        {'qkv_proj.weight': (6, 2)}
    """
    for wrapper in _WRAPPERS:
        _move(state, f"{prefix}{wrapper}", prefix)
    separate = [f"{prefix}{name}_proj." for name in "qkv"]
    normed = sorted(key for key in state if key.startswith((f"{prefix}q_ln.", f"{prefix}k_ln.")))
    outer = sorted(key for key in state if key.startswith(f"{prefix}layer_norm."))
    if normed and any(key.startswith(separate[0]) for key in state):
        raise InvalidInput(
            f"keys {normed}: version 0.2 normalised queries and keys before attention, and its result by q_ln again; "
            "no layer here does. The projections load without these keys, with strict=False; then train on."
        )
    if outer:
        raise InvalidInput(
            f"keys {outer}: version 0.2 normalised the result of the output projection; no layer here does. Load "
            "without these keys and put an nn.LayerNorm behind the layer."
        )
    _move(state, f"{prefix}q_ln.", f"{prefix}norm.")
    for key in [key for key in state if key.startswith(f"{prefix}k_ln.")]:
        del state[key]
    for kind in ("weight", "bias"):
        keys = [start + kind for start in separate]
        if all(isinstance(state.get(key), Tensor) for key in keys):
            state[f"{prefix}qkv_proj.{kind}"] = torch.cat([state.pop(key) for key in keys])


def rename_block_keys(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """A transformer block's keys of 0.1 and 0.2 become ours; ``names`` is `ENCODER_BLOCK` or `DECODER_BLOCK`.

    Raises InvalidInput, before anything is loaded, where the attention inside cannot be loaded.

    Example:
        >>> state = {"norm1.weight": 1, "norm2.weight": 2, "linear1.bias": 3}
        >>> rename_block_keys(state, "", ENCODER_BLOCK)
        >>> sorted(state)
        ['feed_forward.linear1.bias', 'feed_forward.norm.weight', 'norm.weight']
    """
    if not any(key.startswith(f"{prefix}norm1.") for key in state):
        return
    norms = tuple(f"{prefix}multihead_attn.{name}." for name in ("norm", "q_ln"))
    elsewhere = sorted(key for key in state if key.startswith(norms))
    if elsewhere:
        raise InvalidInput(
            f"keys {elsewhere}: decoder layers of 0.1 and 0.2 had the sub-LayerNorm in cross-attention, which was "
            "dilated; here it is in self-attention, as in MAGNETO, and cross-attention has none. These weights belong "
            "to another computation: train anew."
        )
    for old, new in names.items():
        _move(state, f"{prefix}{old}.", f"{prefix}{new}.")
    for attention in ("self_attn", "cross_attn"):
        rename_attention_keys(state, f"{prefix}{attention}.")


def refuse_model_keys(state: Mapping[str, Any]) -> None:
    """Raise InvalidInput, which says why, where ``state`` is that of a whole model of 0.1 or 0.2.

    Example:
        >>> refuse_model_keys({"embedding.weight": 0})
    """
    old = [key for key in state if key.startswith(("long_net.", "token_embedding.", "encoder.layers.0.norm1."))]
    if old:
        raise InvalidInput(
            f"keys {old[:3]}, ...: LongNet and LongNetLM of 0.1 and 0.2 were encoder and decoder without a LayerNorm "
            "behind their stacks, with the sub-LayerNorm of decoder layers in cross-attention, and LongNetLM with xPos "
            "added to embeddings; models here compute something else. Encoder layers load one by one, into "
            "DilatedTransformerEncoderLayer: those keys begin with encoder.layers.0, encoder.layers.1, ..."
        )


def _move(state: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)
