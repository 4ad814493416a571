"""Files that are there whole or not at all, whatever stops the process or the machine."""

import json
import os
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.errors import InvalidInput


def write_whole(path: Path, content: bytes) -> None:
    """`path` holds `content`, or what it held before: written aside, flushed to the disk, then renamed."""
    aside = path.with_name(f"{path.name}.unfinished")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """The names in the folder `path`, and so its renames, are on the disk."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """`path` holds `value` as indented JSON, written as `write_whole` writes."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InvalidInput, naming the file, when it is missing or is not one."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is damaged: expected JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value
