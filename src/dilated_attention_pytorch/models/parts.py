"""What the whole models are put together from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.models.config import TransformerConfig
from dilated_attention_pytorch.nn.transformer import DilatedTransformer, DilatedTransformerEncoderLayer


def config_options(config: TransformerConfig) -> dict[str, Any]:
    """The config's fields as arguments of the model's constructor."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name != "format_version"}


def block_options(config: TransformerConfig) -> dict[str, Any]:
    """The config's fields that each of the model's layers takes."""
    shared = {f.name for f in fields(TransformerConfig)} - {"checkpoint_activations"}
    return {name: value for name, value in config_options(config).items() if name in shared}


def encoder_stack(
    config: TransformerConfig,
    num_layers: int,
    gain: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> DilatedTransformer:
    """``num_layers`` encoder layers of the config; their weights start with ``gain``."""
    options = block_options(config)
    layers = [
        DilatedTransformerEncoderLayer(**options, gamma_init=gain, device=device, dtype=dtype)
        for _ in range(num_layers)
    ]
    return DilatedTransformer(layers, checkpoint_activations=config.checkpoint_activations)


def check_rows(name: str, x: object, d_model: int) -> None:
    """Raise InvalidInput unless x is a tensor (B, N, d_model)."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != d_model:
        got = tuple(x.shape) if isinstance(x, Tensor) else repr(x)
        raise InvalidInput(
            f"expected {name} of shape (B, N, d_model = {d_model}). Got {got}; is_causal, second in 0.2, "
            "is a keyword now."
        )
