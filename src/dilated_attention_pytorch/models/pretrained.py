"""Saving and loading: safetensors and JSON, written aside and renamed, checked before a model exists. No pickle."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.models.config import TransformerConfig
from dilated_attention_pytorch.nn.old_keys import refuse_model_keys
from dilated_attention_pytorch.problem import FLOATS

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
LARGEST_CONFIG = 1 << 20  # bytes

Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A model with a config, which goes to a folder and comes back with the same outputs."""

    config_class: ClassVar[type[TransformerConfig]]
    config: TransformerConfig

    @classmethod
    def from_config(
        cls: type[Model],
        config: TransformerConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Model:
        """A freshly initialised model of ``config``. Raises InvalidInput for the config of another model."""
        if not isinstance(config, cls.config_class):
            raise InvalidInput(
                f"{cls.__name__}.from_config: expected a {cls.config_class.__name__}. Got {type(config).__name__}."
            )
        return cls(**cls._arguments(config), device=device, dtype=dtype)

    @classmethod
    def _arguments(cls, config: Any) -> dict[str, Any]:
        """The constructor's arguments that give ``config``."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        refuse_model_keys({key.removeprefix(prefix): x for key, x in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def save_pretrained(self, folder: str | Path) -> None:
        """``folder`` holds ``model.safetensors`` and ``config.json``; each is written aside, then renamed.

        The weights carry a copy of the config, so that a pair of files from two saves is noticed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config.to_dict(), indent=2)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        metadata = {"format": "pt", "config": config}
        _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata))
        _replace(folder / CONFIG_FILE, lambda path: path.write_text(config + "\n", encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Model:
        """The model that ``save_pretrained`` wrote, in evaluation mode; ``dtype`` None keeps the file's.

        Everything is checked before a model exists: InvalidInput names the file that is missing, truncated, of another
        model, or holds other tensors than its config says. Nothing is unpickled or run.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG_FILE, cls.config_class)
        path = folder / WEIGHTS_FILE
        try:
            with safe_open(path, framework="pt") as file:
                _check_pair(path, file.metadata(), config)
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                _check_size(path, config, len(shapes))
                model = _on_meta(path, cls, config)
                _check_shapes(path, model.state_dict(), shapes)
                tensors = {name: file.get_tensor(name) for name in shapes}
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read ({error}); expected a file from save_pretrained.") from error
        except SafetensorError as error:
            raise InvalidInput(
                f"{path}: not a whole safetensors file ({error}); copy it again, or save the model again."
            ) from error
        _check_dtypes(path, tensors)
        # The file is mapped into memory: a copy keeps the model whole when the file changes.
        tensors = {name: x.to(device=device, dtype=dtype, copy=True) for name, x in tensors.items()}
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.eval()


def read_config(path: Path, config_class: type[TransformerConfig]) -> TransformerConfig:
    """The config in a JSON file. Raises InvalidInput, which names the file, for anything else."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise InvalidInput(f"{path}: expected a config of at most {LARGEST_CONFIG} bytes.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error}); expected a file from save_pretrained.") from error
    except InvalidInput:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error}); save the model again.") from error
    if not isinstance(values, dict):
        raise InvalidInput(f"{path}: expected a JSON object. Got a {type(values).__name__}.")
    try:
        return config_class.from_dict(values)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """``path`` holds what ``write`` wrote, wholly or not at all: written beside it, synced, renamed."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.touch()
    mode = aside.stat().st_mode  # that of any new file; safetensors' own files are for their owner only
    try:
        write(aside)
        aside.chmod(mode)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _check_pair(path: Path, metadata: dict[str, str] | None, config: TransformerConfig) -> None:
    saved = (metadata or {}).get("config")
    if saved is not None and saved != json.dumps(config.to_dict(), indent=2):
        raise InvalidInput(
            f"{path}: was saved with another config than {CONFIG_FILE} beside it; restore the two files of one save."
        )


def _check_size(path: Path, config: TransformerConfig, tensors: int) -> None:
    """A config may claim any depth; a model is built only when the file has a tensor for each layer at least."""
    layers = sum(getattr(config, name, 0) for name in ("num_layers", "num_encoder_layers", "num_decoder_layers"))
    if layers > tensors:
        raise InvalidInput(f"{path}: {CONFIG_FILE} says {layers} layers, the file holds {tensors} tensors only.")


def _on_meta(path: Path, cls: type[Model], config: TransformerConfig) -> Model:
    """A model without memory: shapes only."""
    try:
        return cls.from_config(config, device="meta")
    except RuntimeError as error:  # sizes whose product overflows
        raise InvalidInput(f"{path}: {CONFIG_FILE} beside it asks for an impossible size ({error}).") from error


def _check_shapes(path: Path, expected: dict[str, Tensor], got: dict[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        raise InvalidInput(f"{path}: tensors missing {missing[:4]}, unknown {unknown[:4]}; is it of another model?")
    for name, x in expected.items():
        if tuple(x.shape) != got[name]:
            raise InvalidInput(
                f"{path}: expected {name} of shape {tuple(x.shape)}, as {CONFIG_FILE} says. Got {got[name]}."
            )


def _check_dtypes(path: Path, tensors: dict[str, Tensor]) -> None:
    dtypes = {x.dtype for x in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise InvalidInput(f"{path}: expected tensors of one floating dtype. Got {sorted(map(str, dtypes))}.")
