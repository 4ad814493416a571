"""A training state on disk, in one safetensors file without pickle, read back to the last bit or not at all.

Tensors: `model.<name>`, `optimizer.<quantity>.<name>`, `random.cpu`, and `random.cuda` on a GPU. The file's metadata
holds the step and the seconds spent. The file is written aside and renamed, so a run always has its last whole
checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.files import write_whole

FORMAT = "dilated-attention-pytorch training checkpoint 1"
QUANTITIES = ("step", "exp_avg", "exp_avg_sq")  # what torch.optim.AdamW keeps per parameter


@dataclass(frozen=True)
class Progress:
    """How far a run has come: `step` steps done in `seconds` of training."""

    step: int
    seconds: float


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """`path` holds the whole state of the run; until it does, the earlier checkpoint stays."""
    tensors = state_of(model, optimizer) | random_state(next(model.parameters()).device)
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": FORMAT, "progress": json.dumps({"step": progress.step, "seconds": progress.seconds})}
    write_whole(path, save(stored, metadata=metadata))


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW, continue_random: bool = True
) -> Progress:
    """Model, optimizer and random generators stand where the checkpoint left them.

    Everything is read and checked before anything is changed. A model whose parameters are sharded takes its share of
    each tensor. With `continue_random` false the generators are left alone. Raises InvalidInput, naming the file, when
    the file is missing, truncated, no checkpoint, or one of another model.
    """
    device = next(model.parameters()).device
    progress, tensors = _read(path, state_of(model) | random_state(device))
    if continue_random:
        set_random_state(path, tensors, device)
    set_state(model, optimizer, tensors)
    return progress


def checkpoint_progress(path: Path) -> Progress:
    """How far the run had come when it wrote `path`. Raises InvalidInput, naming the file, as `load_checkpoint`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path} is truncated or damaged: {error}") from error
    return _checked_progress(path, metadata)


def state_of(model: torch.nn.Module, optimizer: torch.optim.AdamW | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer by its name in a checkpoint; zeros for moments that do not exist yet.

    Parameters that are sharded over ranks come as the DTensors that they are, and their moments too.
    """
    tensors = {f"model.{name}": value for name, value in _weights(model).items()}
    for name, parameter in model.named_parameters():
        known = {} if optimizer is None else optimizer.state.get(parameter, {})
        for quantity in QUANTITIES:
            if quantity not in known:
                known = known | {quantity: torch.zeros(()) if quantity == "step" else torch.zeros_like(parameter)}
            tensors[f"optimizer.{quantity}.{name}"] = known[quantity]
    return tensors


def set_state(model: torch.nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor]) -> None:
    """Model and optimizer hold `tensors`, which have the names, shapes and dtypes of `state_of`."""
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.copy_(_placed(tensors[f"model.{name}"], weight))
        for name, parameter in model.named_parameters():
            state = {quantity: tensors[f"optimizer.{quantity}.{name}"] for quantity in QUANTITIES}
            placed = {q: value if q == "step" else _placed(value, parameter) for q, value in state.items()}
            optimizer.state[parameter] = placed


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's random generators, by their names in a checkpoint."""
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(path: Path, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """This process's random generators continue from `tensors`. Raises InvalidInput, naming `path`, for damaged
    ones."""
    try:
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except RuntimeError as error:
        raise InvalidInput(f"{path} is damaged: its random state is not one ({error})") from error


def _placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` on the device of `like`; this rank's shard of it where `like` is sharded."""
    value = value.to(like.device)
    if not hasattr(like, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor  # most of a second that one process does not need

    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, each tied tensor once."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: value for name, value in model.state_dict().items() if name not in tied}


def _read(path: Path, expected: dict[str, torch.Tensor]) -> tuple[Progress, dict[str, torch.Tensor]]:
    """What the file holds, once its names, shapes and dtypes are those of `expected`."""
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; expected a training checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            progress = _checked_progress(path, metadata)
            if names != set(expected):
                odd = sorted(names ^ set(expected))[:3]
                raise InvalidInput(f"{path} belongs to another model; first names that differ: {odd}")
            for name, like in expected.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(like.shape):
                    raise InvalidInput(f"{path}: {name} must have shape {tuple(like.shape)}, got {shape}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path} is truncated or damaged: {error}") from error
    for name, like in expected.items():
        if tensors[name].dtype != like.dtype:
            raise InvalidInput(f"{path}: {name} must be {like.dtype}, got {tensors[name].dtype}")
    return progress, tensors


def _checked_progress(path: Path, metadata: dict[str, str]) -> Progress:
    if metadata.get("format") != FORMAT:
        raise InvalidInput(f"{path}: expected a file of format {FORMAT!r}, got {metadata.get('format')!r:.80}")
    progress = read_progress(path, metadata.get("progress", ""))
    if progress.step == 0:
        raise InvalidInput(f"{path} is damaged: a checkpoint is written after at least one step")
    return progress


def read_progress(path: Path, text: str) -> Progress:
    """How far the run had come, of the JSON in a checkpoint. Raises InvalidInput, naming `path`, for another text."""
    try:
        values = json.loads(text)
        step, seconds = values["step"], values["seconds"]
        if type(step) is int and step >= 0 and isinstance(seconds, (int, float)) and 0 <= seconds < 1e12:
            return Progress(step, float(seconds))
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise InvalidInput(f"{path} is damaged: its metadata does not say how far the run had come") from error
    raise InvalidInput(f"{path} is damaged: step {step!r:.40} after {seconds!r:.40} seconds is impossible")
