"""Where a run goes on: at its newest whole checkpoint, whichever number of processes wrote it.

One process writes one file, `checkpoint.safetensors`, to the last bit (checkpoint.py); several write folders below
`checkpoints`, in the background (sharded.py). Each kind is read by any number of processes. Windows of text are a
function of the step, so all that another number of processes changes is the order of sums, and which random numbers
dropout of hidden rows draws.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.checkpoint import (
    Progress,
    checkpoint_progress,
    load_checkpoint,
    save_checkpoint,
)
from dilated_attention_pytorch.training.environment import launch
from dilated_attention_pytorch.training.faults import GRACE
from dilated_attention_pytorch.training.ranks import ALONE, Ranks
from dilated_attention_pytorch.training.run import Run
from dilated_attention_pytorch.training.settings import TrainingSettings

log = logging.getLogger("dilated_attention_pytorch")


def newest_checkpoint(run: Run) -> Path | None:
    """The newest whole checkpoint of the run, a file or a folder; None when there is none.

    A damaged one is left out for an earlier one, and a log line says so. Raises InvalidInput when all are damaged: a
    run is not begun anew in silence.
    """
    found: list[tuple[int, Path]] = []
    damage: list[InvalidInput] = []
    if run.checkpoint.exists():
        try:
            found.append((checkpoint_progress(run.checkpoint).step, run.checkpoint))
        except InvalidInput as error:
            damage.append(error)
    if run.checkpoints.is_dir():
        from dilated_attention_pytorch.training.sharded import read_complete, sharded_checkpoints

        for path in sharded_checkpoints(run.checkpoints):
            try:
                found.append((read_complete(path)[0].step, path))
            except InvalidInput as error:
                damage.append(error)
    if damage and not found:
        raise damage[0]
    for left_out in damage:
        log.warning("%s; the checkpoint is left out", left_out)
    return max(found)[1] if found else None


def check_restart(folder: Path | None) -> None:
    """Raise InvalidInput when torchrun may run this command again, and a second time could not find its `folder`."""
    if folder is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise InvalidInput(
            "torchrun --max-restarts runs this command again after a failure, and it must find its run; name the "
            "folder with --folder"
        )


def run_before_restart(path: Path, settings: TrainingSettings, model_config: dict[str, Any]) -> Run | None:
    """The run in `path` that this very launch of torchrun began before it ran the command again; None without one.

    The launch decides, not torchrun's count of restarts, which differs between nodes. Raises InvalidInput when the
    launch has begun a run there with other settings or another model.
    """
    if launch() is None or not (path / "training.json").is_file():
        return None
    run = Run.open(path)
    if run.record.get("launch") != launch():
        return None
    if run.settings != settings or run.model_config != json.loads(json.dumps(model_config)):
        raise InvalidInput(
            f"{path} holds a run of this launch with other settings or another model; name another folder, or continue "
            f"it with --resume {path}"
        )
    return run


class Checkpoints:
    """The checkpoints of one training of `run` by `ranks`; inside `with`, which ends when the last is on the disk.

    All ranks make it and call its methods together.
    """

    def __init__(self, run: Run, ranks: Ranks = ALONE) -> None:
        self._run, self._ranks = run, ranks
        self._group = None
        if ranks.size > 1:  # of its own: it is used in the background
            self._group = dist.new_group(backend="gloo", timeout=ranks.timeout)
        self._saving: Future[object] | None = None

    def load(self, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> Progress:
        """Model, optimizer and random generators stand where the newest checkpoint left them, or at the start.

        At another number of processes than wrote it, the generators begin anew from the seed, the step and the rank.
        Raises InvalidInput, on every rank, as `newest_checkpoint` does and for a checkpoint of another model.
        """
        path = self._ranks.on_first(lambda: newest_checkpoint(self._run))
        progress, continued = Progress(0, 0.0), False
        if path is not None and path.is_dir():
            from dilated_attention_pytorch.training.sharded import load_sharded

            progress, continued = load_sharded(path, model, optimizer, self._group)
        elif path is not None:
            continued = self._ranks.size == 1
            progress = load_checkpoint(path, model, optimizer, continue_random=continued)
        if path is not None and progress.step > self._run.settings.steps:
            raise InvalidInput(f"{path} is at step {progress.step}, past the {self._run.settings.steps} of its run")
        if not continued:
            torch.manual_seed(self._run.settings.seed + self._ranks.rank + 2**32 * progress.step)
        if path is not None and self._ranks.is_first:
            log.info("continuing %s after step %d, from %s", self._run.path, progress.step, path.name)
        return progress

    def save(self, model: torch.nn.Module, optimizer: torch.optim.AdamW, progress: Progress) -> None:
        """The state is in a checkpoint, or, with several ranks, copied and on its way to one; see `wait`."""
        if self._group is None:
            save_checkpoint(self._run.checkpoint, model, optimizer, progress)
            return
        from dilated_attention_pytorch.training.sharded import start_saving

        self.wait()
        self._saving = start_saving(self._run.checkpoints, model, optimizer, progress, self._group)

    def wait(self) -> None:
        """The checkpoint under way is whole. Raises OSError, on every rank, when a rank could not write."""
        if self._saving is not None:
            from dilated_attention_pytorch.training.sharded import finish_saving

            saving, self._saving = self._saving, None
            finish_saving(saving)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._saving is not None:  # it may still become whole; if not, `error` is what matters
            done, _ = wait([self._saving], GRACE.total_seconds())
            late = self._saving.exception() if done else TimeoutError("a rank has not written")
            if late is not None:
                log.warning("the last checkpoint was not written: %s", late)
