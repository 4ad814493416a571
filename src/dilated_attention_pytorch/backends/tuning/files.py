"""Which tables are in force: the user's file for this device, then the one that is shipped."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import platformdirs
import torch

from dilated_attention_pytorch.backends.base import Backend
from dilated_attention_pytorch.backends.tuning.keys import device_name, device_type, key_of
from dilated_attention_pytorch.backends.tuning.table import Ranking, Table, table_from_dict
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.plans import Plan
from dilated_attention_pytorch.problem import Problem

SHIPPED = {"cpu": Path(__file__).parent.parent / "default_tuning.json"}
"""Tables that come with the package, by device type: for any device of that type."""


@lru_cache(maxsize=64)
def user_file(device: torch.device) -> Path:
    """Where `dilated-attention tune` keeps the table of this device, in the user's cache folder."""
    words = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return platformdirs.user_cache_path("dilated-attention-pytorch") / "tuning" / f"{words}.json"


class _Files:
    """Tables read from files, each once until the file changes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.read: dict[Path, tuple[tuple[int, int] | None, Table | None]] = {}
        self.given: tuple[Table, ...] | None = None


_files = _Files()


def load_table(path: Path, device: torch.device, backends: Sequence[Backend]) -> Table | None:
    """The table in a file for this device, or None when there is no file; it is read again when the file has changed.

    A file that cannot be used is ignored with one warning that names it and says why.
    """
    try:
        stat = path.stat()
        stamp: tuple[int, int] | None = (stat.st_mtime_ns, stat.st_size)
    except OSError:
        stamp = None
    with _files.lock:
        before = _files.read.get(path)
        if before is None or before[0] != stamp:
            table = None if stamp is None else _read(path, device, backends)
            before = _files.read[path] = (stamp, table)
        return before[1]


def _read(path: Path, device: torch.device, backends: Sequence[Backend]) -> Table | None:
    name = device_name(device)
    try:
        table = table_from_dict(json.loads(path.read_bytes()), backends, str(path))
        if table.device not in (name, device_type(device)):
            raise InvalidInput(f"measured on {table.device!r}, this is {name!r}")
    except (OSError, ValueError, RecursionError) as error:  # InvalidInput and damaged JSON are ValueErrors
        warnings.warn(
            f"ignored the tuning file {path}: {error}. Run 'dilated-attention tune --force', or delete it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return table


def tables_in_force(device: torch.device, backends: Sequence[Backend]) -> tuple[Table, ...]:
    """The tables that are asked for this device, in this order: the user's, then the one that is shipped."""
    if _files.given is not None:
        return _files.given
    shipped = SHIPPED.get(device_type(device))
    paths = [user_file(device)] if shipped is None else [user_file(device), shipped]
    found = (load_table(path, device, backends) for path in paths)
    return tuple(table for table in found if table is not None)


@contextmanager
def using(*tables: Table) -> Iterator[None]:
    """Within it, in every thread, these tables are in force instead of files; without any, nothing is measured."""
    before = _files.given
    _files.given = tables
    try:
        yield
    finally:
        _files.given = before


def ranking(problem: Problem, plans: Sequence[Plan], backends: Sequence[Backend]) -> tuple[Ranking, Table | None]:
    """What was measured for problems like this one, the fastest first, and the table that says so."""
    tables = tables_in_force(problem.q.device, backends)
    if tables:
        key = key_of(problem, plans)
        for table in tables:
            found = table.nearest(key)
            if found:
                return found, table
    return (), None
