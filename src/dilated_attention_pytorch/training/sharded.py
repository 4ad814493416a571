"""A training state of several ranks on disk, without pickle: each writes its shards, any number of ranks reads them.

PyTorch's Distributed Checkpoint (DCP) does both, in files of safetensors:

step-00000008/               a whole checkpoint: it gets this name last
    shard-*.safetensors      tensors by their names in checkpoint.py; `random.cpu.R`, `random.cuda.R` of each rank R
    complete.json            format, progress, number of ranks, and the size of every file in bytes
step-00000012.unfinished/    one that is being written, or whose writing was cut off: never read

The folder must be one that all ranks see.
"""

import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.checkpoint import (
    Progress,
    random_state,
    read_progress,
    set_random_state,
    set_state,
    state_of,
)
from dilated_attention_pytorch.training.files import read_json, sync_folder, write_json

FORMAT = "dilated-attention-pytorch sharded checkpoint 1"
COMPLETE = "complete.json"
UNFINISHED = ".unfinished"
KEPT = 2  # whole checkpoints: the newest, and one before it should that be damaged


def start_saving(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    progress: Progress,
    group: dist.ProcessGroup,
) -> "Future[object]":
    """The whole state is copied, and goes to a checkpoint below `folder` in the background; called by all ranks.

    Training may go on at once. When the future ends, on any rank, the checkpoint has its name and those before the
    last two are gone; the future raises when a rank could not write. `group` has a CPU backend and nobody else uses it
    until then.
    """
    state = state_of(model, optimizer)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for name, value in random_state(next(model.parameters()).device).items():
        state[f"{name}.{rank}"] = value
    stager = DefaultStager(StagingOptions(False, False, False, False))  # copies before it returns
    future = async_save(state, storage_writer=_Writer(folder, progress, size), process_group=group, async_stager=stager)
    assert isinstance(future, Future)
    future.add_done_callback(lambda _: stager.close())
    return future


def load_sharded(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW, group: dist.ProcessGroup | None = None
) -> tuple[Progress, bool]:
    """Model and optimizer stand where the checkpoint `path` left them, at any number of ranks; called by all of them.

    The second value says whether the random generators continue too: at the number of ranks that saved they do, at
    another they are left alone. Everything is read and checked before anything is changed. Raises InvalidInput, on
    every rank and naming `path`, for a damaged checkpoint or one of another model.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    device = next(model.parameters()).device
    progress, saved_by = read_complete(path)
    tensors = {name: torch.empty_like(value).detach() for name, value in state_of(model).items()}
    mine = random_state(device) if size == saved_by else {}
    wanted = tensors | {f"{name}.{rank}": value for name, value in mine.items()}
    try:
        with warnings.catch_warnings():  # that one process reads alone is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(wanted, storage_reader=_Reader(path, wanted), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if isinstance(failure, InvalidInput):
            raise failure from error
        raise InvalidInput(f"{path} is damaged: {failure}") from error
    if mine:
        set_random_state(path, mine, device)
    set_state(model, optimizer, tensors)
    return progress, bool(mine)


def finish_saving(saving: "Future[object]") -> None:
    """What `start_saving` began is a whole checkpoint. Raises OSError, on every rank, when a rank could not write."""
    try:
        saving.result()
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank} could not write a checkpoint: {failure}") from error


def sharded_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, the newest first, whole or damaged since; not those that were cut off."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_complete(path: Path) -> tuple[Progress, int]:
    """How far the run had come, and how many ranks saved it. Raises InvalidInput unless every file has its size."""
    file = path / COMPLETE
    if not file.is_file():
        raise InvalidInput(f"{path} is damaged: it has no {COMPLETE}")
    record = read_json(file)
    ranks, files = record.get("ranks"), record.get("files")
    if record.get("format") != FORMAT:
        raise InvalidInput(f"{file}: expected format {FORMAT!r}, got {record.get('format')!r:.80}")
    if type(ranks) is not int or ranks < 1 or not isinstance(files, dict) or not files:
        raise InvalidInput(f"{file} is damaged: expected a number of ranks and the sizes of files")
    for name, size in files.items():
        there = path / Path(name).name
        got = there.stat().st_size if there.is_file() else "no file"
        if got != size:
            raise InvalidInput(f"{there} is truncated or damaged: expected {size!r:.40} bytes, got {got}")
    progress = read_progress(file, json.dumps(record.get("progress")))
    if progress.step == 0:
        raise InvalidInput(f"{file} is damaged: a checkpoint is written after at least one step")
    return progress, ranks


class _Writer(HuggingFaceStorageWriter):
    """DCP's writer of safetensors; what it overrides, DCP calls on one rank, between steps that all ranks take."""

    def __init__(self, folder: Path, progress: Progress, ranks: int) -> None:
        self._whole = folder / f"step-{progress.step:08d}"
        self._unfinished = self._whole.with_name(self._whole.name + UNFINISHED)
        self._record = {"format": FORMAT, "progress": {"step": progress.step, "seconds": progress.seconds}}
        self._ranks = ranks
        super().__init__(str(self._unfinished), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing that an earlier, cut off writing left stays; no rank writes before this."""
        for file in self._unfinished.iterdir():
            file.unlink()
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Every rank has written: the checkpoint gets its name, and older ones go."""
        sizes = {file.name: file.stat().st_size for file in sorted(self._unfinished.iterdir())}
        write_json(self._unfinished / COMPLETE, self._record | {"ranks": self._ranks, "files": sizes})
        if self._whole.exists():  # a damaged one that the run had to go back behind
            _remove(self._whole)
        os.rename(self._unfinished, self._whole)
        sync_folder(self._whole.parent)
        whole = 0
        for path in sharded_checkpoints(self._whole.parent):
            if whole == KEPT:
                _remove(path)
            whole += _is_whole(path)
        for path in self._whole.parent.glob(f"step-*{UNFINISHED}"):
            _remove(path)


def _is_whole(path: Path) -> bool:
    try:
        read_complete(path)
    except InvalidInput:
        return False
    return True


def _remove(path: Path) -> None:
    """The checkpoint is gone; cut off in the middle, what is left of it is not whole."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


class _Reader(HuggingFaceStorageReader):
    """DCP's reader of safetensors, which checks names, shapes and dtypes against `expected` before any is read."""

    def __init__(self, path: Path, expected: dict[str, torch.Tensor]) -> None:
        super().__init__(str(path))
        self._folder, self._expected = path, expected

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the files hold. Raises InvalidInput when it is not what the model needs."""
        try:
            metadata = super().read_metadata(*args, **kwargs)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{self._folder} is damaged: {error}") from error
        stored = metadata.state_dict_metadata
        names = {name for name in stored if not name.startswith("random.")}
        wanted = {name for name in self._expected if not name.startswith("random.")}
        missing = sorted((names ^ wanted) | (set(self._expected) - set(stored)))
        if missing:
            raise InvalidInput(f"{self._folder} belongs to another model; first names that differ: {missing[:3]}")
        for name, like in self._expected.items():
            found = stored[name]
            assert isinstance(found, TensorStorageMetadata)
            got = (tuple(found.size), found.properties.dtype)
            if got != (tuple(like.shape), like.dtype):
                raise InvalidInput(
                    f"{self._folder}: {name} must have shape {tuple(like.shape)} and {like.dtype}, got {got[0]} and "
                    f"{got[1]}"
                )
        return metadata
