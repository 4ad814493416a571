"""Whole models with their configs, saved and loaded without pickle."""

from dilated_attention_pytorch.models.config import (
    LongNetConfig,
    LongNetEncoderConfig,
    LongNetLMConfig,
    TransformerConfig,
)
from dilated_attention_pytorch.models.longnet import LongNet, LongNetEncoder, LongNetLM
from dilated_attention_pytorch.models.pretrained import PretrainedModel

__all__ = [
    "LongNet",
    "LongNetConfig",
    "LongNetEncoder",
    "LongNetEncoderConfig",
    "LongNetLM",
    "LongNetLMConfig",
    "PretrainedModel",
    "TransformerConfig",
]
