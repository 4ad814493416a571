"""Which NUMA node a thread runs on, so that a buffer is handed out again where its pages lie."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Topology:
    """The node of each CPU. On one node, which is most machines, placement does nothing.

    Linux gives a page to the node of the thread that writes it first and leaves it there. A pool therefore keeps
    one shelf of buffers per node and serves a thread from the shelf of the node it runs on.
    """

    node_of_cpu: Mapping[int, int]

    @property
    def nodes(self) -> tuple[int, ...]:
        """The numbers of the nodes that have CPUs, ascending; (0,) where nothing is known."""
        return tuple(sorted(set(self.node_of_cpu.values()))) or (0,)

    def node_of(self, cpu: int) -> int:
        """The node of this CPU; the first node for a CPU that is not listed, as one plugged in later."""
        return self.node_of_cpu.get(cpu, self.nodes[0])


def machine_topology(root: Path = Path("/")) -> Topology:
    """What Linux says of this machine under /sys/devices/system/node; one node where it says nothing."""
    found = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        try:
            cpus = _numbers((folder / "cpulist").read_text())
        except OSError:
            continue
        found.update(dict.fromkeys(cpus, int(folder.name.removeprefix("node"))))
    return Topology(found)


def _numbers(text: str) -> list[int]:
    """The numbers of a Linux list.

    >>> _numbers("0-2,8")
    [0, 1, 2, 8]
    """
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def node_finder(topology: Topology, current_cpu: Callable[[], int] | None = None) -> Callable[[], int] | None:
    """A function that gives the calling thread's node; None on one node, or where the system does not tell the CPU."""
    if len(topology.nodes) < 2:
        return None
    if current_cpu is None:
        current_cpu = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None
    if current_cpu is None:
        return None
    ask, node_of = current_cpu, topology.node_of
    return lambda: node_of(ask())
