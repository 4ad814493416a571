"""The run folder: everything that a run was told, made of and gave, readable without this library.

training.json           settings, model, text, versions, device: written last at the start, so it marks a whole folder
text/                   the bytes trained on and held out
checkpoint.safetensors  the training state as one process writes it, see checkpoint.py
checkpoints/            the training state as several processes write it, see sharded.py
metrics.jsonl           one line per step
model.safetensors, config.json   the model, for LongNetLM.from_pretrained
evaluation.json, continuation.txt, loss.png, context.png, report.html
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.data import Corpus, open_corpus, write_corpus
from dilated_attention_pytorch.training.environment import device_name, launch, versions
from dilated_attention_pytorch.training.files import read_json, write_json, write_whole
from dilated_attention_pytorch.training.settings import TrainingSettings

FORMAT_VERSION = 1
log = logging.getLogger("dilated_attention_pytorch")


@dataclass(frozen=True)
class Run:
    """One run on disk: its folder, settings, the model's configuration as a dict, its text, and the whole record."""

    path: Path
    settings: TrainingSettings
    model_config: dict[str, Any]
    corpus: Corpus
    record: dict[str, Any]

    @classmethod
    def create(cls, path: Path, settings: TrainingSettings, model_config: dict[str, Any], data: Path | None) -> "Run":
        """A new run in `path`, its text written there. Raises InvalidInput when the folder holds something
        already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InvalidInput(
                f"{path} exists and is not empty; name another folder, or continue it with --resume {path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        try:
            corpus = write_corpus(data, path / "text", settings.window)
        except InvalidInput:
            shutil.rmtree(path)
            raise
        record = {
            "format_version": FORMAT_VERSION,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": dataclasses.asdict(settings),
            "model": model_config,
            "text": {
                "origin": corpus.origin,
                "digest": corpus.digest,
                "train_bytes": len(corpus.train),
                "held_out_bytes": len(corpus.held_out),
            },
            "versions": versions(),
            "device": device_name(settings.device),
            "launch": launch(),
        }
        write_json(path / "training.json", record)
        return cls(path, settings, model_config, corpus, record)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run in `path`. Raises InvalidInput when the folder is none, or when a file in it is damaged."""
        file = path / "training.json"
        if not file.is_file():
            what = "has no training.json" if path.is_dir() else "does not exist"
            raise InvalidInput(f"{path} is not a run folder: it {what}; start one with `dilated-attention train`")
        record = read_json(file)
        if record.get("format_version") != FORMAT_VERSION:
            found = record.get("format_version")
            raise InvalidInput(f"{file}: expected format_version {FORMAT_VERSION}, got {found!r:.40}")
        model_config, text = record.get("model"), record.get("text")
        if not isinstance(model_config, dict) or not isinstance(text, dict):
            raise InvalidInput(f"{file} is damaged: expected objects under 'model' and 'text'")
        digest, origin = text.get("digest"), text.get("origin")
        if not isinstance(digest, str) or not digest.isalnum() or not isinstance(origin, str):
            raise InvalidInput(f"{file} is damaged: 'text' needs a digest and an origin")
        try:
            settings = TrainingSettings.from_dict(record.get("settings"))
        except InvalidInput as error:
            raise InvalidInput(f"{file}: {error}") from error
        return cls(path, settings, model_config, open_corpus(path / "text", digest, origin), record)

    @property
    def checkpoint(self) -> Path:
        """The file of the training state that one process writes."""
        return self.path / "checkpoint.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of the training states that several processes write."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file with one JSON object per step."""
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """This process alone trains the run. Raises InvalidInput when another does; a lock dies with its process."""
        if os.name != "posix":
            yield
            return
        import fcntl

        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidInput(
                    f"{self.path} is being trained by another process; wait for it, or stop it"
                ) from error
            yield

    def keep_metrics(self, steps: int) -> None:
        """Only the lines of the first `steps` steps are left: those behind the checkpoint will be made again."""
        lines = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= steps]
        write_whole(self.metrics, "".join(lines).encode())

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl in order, up to the first that a killed process left torn."""
        lines: list[dict[str, float]] = []
        if not self.metrics.is_file():
            return lines
        for text in self.metrics.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            numbers = isinstance(line, dict) and all(isinstance(value, (int, float)) for value in line.values())
            if not numbers or line.get("step", 0) <= (lines[-1]["step"] if lines else 0):
                break
            lines.append(line)
        return lines


def new_run_folder(root: Path) -> Path:
    """A free name below `root`, made of the present time, so that no run is written over another."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        path = root / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise InvalidInput(f"{root} holds a thousand runs of this second; name a folder with --run")


def point_latest(run: Path) -> None:
    """`latest` beside the run leads to it. Where links cannot be made, or `latest` is a real folder, a log line says
    so."""
    link = run.parent / "latest"
    if link.exists() and not link.is_symlink():
        log.warning("%s is a folder, not a link, and is left as it is; the new run is %s", link, run)
        return
    aside = run.parent / f".latest-{os.getpid()}"
    try:
        aside.symlink_to(run.name, target_is_directory=True)
        os.replace(aside, link)
    except OSError as error:
        log.warning("cannot make the link %s (%s); the new run is %s", link, error.strerror, run)
