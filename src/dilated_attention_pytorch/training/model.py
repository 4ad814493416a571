"""The model of a run: the default one of `make run`, built from the run's seed, or read from its folder."""

from __future__ import annotations

from typing import Any

import torch

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.models.config import LongNetLMConfig
from dilated_attention_pytorch.models.longnet import LongNetLM
from dilated_attention_pytorch.training.files import read_json
from dilated_attention_pytorch.training.ranks import Ranks
from dilated_attention_pytorch.training.run import Run

BYTES = 256  # one token per byte value

# Heads are dealt out among the branches (2, 1, 1). Rows that carry the tokens before them, and a start from which the
# first layer copies, let four minutes of training reach for far context; docs/training.md has what was measured.
DEFAULT_MODEL = LongNetLMConfig(
    num_tokens=BYTES,
    d_model=128,
    nhead=4,
    num_layers=3,
    dim_feedforward=512,
    segment_lengths=(256, 2048, 8192),
    dilation_rates=(1, 1, 2),
    head_groups=True,
    activation="silu",
    position="none",
    embedding_width=6,
    copying_start=True,
)


def build_model(run: Run) -> LongNetLM:
    """A freshly initialised model of the run's configuration, from its seed; the global random state stays as it was.

    Raises InvalidInput, naming the file, when the configuration cannot be a model of bytes.
    """
    path = run.path / "training.json"
    try:
        config = LongNetLMConfig.from_dict(run.model_config)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    if config.num_tokens != BYTES:
        raise InvalidInput(f"{path}: expected num_tokens {BYTES}, one per byte, got {config.num_tokens}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.settings.seed)
        return LongNetLM.from_config(config)


def gathered_model(model: LongNetLM, ranks: Ranks) -> LongNetLM | None:
    """The model that `ranks` hold together, whole on the first of them and None on the others, which all call it.

    One process gets its own model back.
    """
    if ranks.size == 1:
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not ranks.is_first:
        return None
    whole = LongNetLM.from_config(model.config, device="meta")
    whole.load_state_dict(weights, assign=True)
    return whole.to(next(model.parameters()).device)


def finished_model(run: Run, device: str | None = None) -> LongNetLM:
    """The trained model of the run. Raises InvalidInput when training has not ended, or a file is damaged."""
    if not (run.path / "model.safetensors").is_file():
        raise InvalidInput(
            f"{run.path} has no model.safetensors: its training has not ended. Continue it with "
            f"`dilated-attention train --resume {run.path}`"
        )
    model = LongNetLM.from_pretrained(run.path, device=device)
    if model.config.to_dict() != run.model_config:
        raise InvalidInput(f"{run.path / 'config.json'} is not the configuration in training.json; the run is damaged")
    return model


def evaluation_contexts(window: int) -> list[int]:
    """256, 512, ... up to `window` bytes; three lengths below a window under 512.

    >>> evaluation_contexts(2048), evaluation_contexts(128)
    ([256, 512, 1024, 2048], [32, 64, 128])
    """
    context = 256 if window >= 512 else max(2, window // 4)
    contexts = []
    while context <= window:
        contexts.append(context)
        context *= 2
    return contexts


def read_evaluation(run: Run) -> dict[str, Any]:
    """The evaluation that the run folder holds. Raises InvalidInput when it holds none."""
    return read_json(run.path / "evaluation.json")
