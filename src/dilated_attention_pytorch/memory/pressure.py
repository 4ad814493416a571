"""How much memory this process may still take: its control groups' limits and the machine's free memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60  # v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class Room:
    """Bytes that may be used at all, and bytes that are still free of them; whichever limit is nearest."""

    limit: int
    free: int


def memory_room(root: Path = Path("/")) -> Room | None:
    """The tightest of the machine's memory and the limits of the process's control groups (v1 and v2, and all above).

    Pages of files that the kernel may drop count as free. None where the system says nothing (no Linux).
    ``root`` is where /proc and /sys are looked for. Linux, Documentation/admin-guide/cgroup-v1/memory.rst and
    cgroup-v2.rst.
    """
    rooms = [*_machine(root), *_groups(root)]
    return min(rooms, key=lambda room: room.free / room.limit, default=None)


def _machine(root: Path) -> Iterator[Room]:
    found = _table(root / "proc/meminfo")
    if found.get("MemTotal:") and "MemAvailable:" in found:
        yield Room(found["MemTotal:"] * 1024, found["MemAvailable:"] * 1024)


def _groups(root: Path) -> Iterator[Room]:
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top, limit, used, dropped = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file"
        else:
            continue
        inner = PurePosixPath(path.strip().lstrip("/"))
        for group in (inner, *inner.parents):  # a limit of any group above holds too
            here = root / top / group
            most, taken = _number(here / limit), _number(here / used)
            if most is not None and taken is not None and 0 < most < UNLIMITED:
                free = most - taken + _table(here / "memory.stat").get(dropped, 0)
                yield Room(most, min(max(free, 0), most))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
