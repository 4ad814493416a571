"""How freed memory is found again: by size classes, or also as parts of larger buffers.

A strategy keeps the free extents of one shelf. It is called under the pool's lock, and never looks at tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import numpy as np

SMALLEST = 512  # bytes; extents start and end on multiples of it, so every dtype is aligned
MOST_CARVED = 8  # a request takes no part of an extent more than this many times its size: it would pin the rest
Bytes = np.ndarray[Any, np.dtype[Any]]


class Arena:
    """One allocation of bytes; its extents cover it without overlap."""

    __slots__ = ("data", "place", "shelf", "size", "taken", "used_at")

    def __init__(self, data: Bytes, shelf: Strategy, place: tuple[str, int], now: float) -> None:
        self.data, self.size, self.shelf, self.place = data, len(data), shelf, place  # place: pool type, NUMA node
        self.taken, self.used_at = 0, now  # how many of its extents are live; seconds of time.monotonic


class Extent:
    """Bytes [start, start + size) of an arena: a live buffer's, or free."""

    __slots__ = ("arena", "home", "nbytes", "request", "size", "start", "template")

    def __init__(self, arena: Arena, start: int, size: int) -> None:
        self.arena, self.start, self.size = arena, start, size
        self.home = arena.shelf.of_size(size)  # the list in which it lies while it is free
        self.request: Any = None  # the request that it served last
        self.template: Bytes  # its bytes in the form of that request
        self.nbytes = 0


class Strategy(Protocol):
    """What a pool asks of a way to find free memory again. An extent is given back by appending it to its home."""

    def size_of(self, nbytes: int) -> int:
        """The bytes set aside for a request: at least ``nbytes``, a multiple of SMALLEST."""

    def of_size(self, size: int) -> list[Extent]:
        """The free extents of exactly this size; always the same list, from which a pool may pop."""

    def take_larger(self, size: int) -> Extent | None:
        """An extent of this size out of larger ones or joined ones, no longer free; None when there is none."""

    def forget(self, arenas: Collection[Arena]) -> None:
        """The extents of these arenas, all of them free, are gone."""

    def free(self) -> Iterator[Extent]:
        """All free extents."""


class SizeClasses:
    """Requests are rounded up to one of eight sizes per power of two; an extent serves its own class only.

    At most an eighth of a request (or SMALLEST) is lost to rounding, and nothing is ever split.

    Example:
        >>> SizeClasses().size_of(100_000)
        106496
    """

    def __init__(self) -> None:
        self._by_size: dict[int, list[Extent]] = {}

    def size_of(self, nbytes: int) -> int:
        step = max(SMALLEST, 1 << max(0, (nbytes - 1).bit_length() - 4))
        return -(-nbytes // step) * step

    def of_size(self, size: int) -> list[Extent]:
        return self._by_size.setdefault(size, [])

    def take_larger(self, size: int) -> Extent | None:
        return None

    def forget(self, arenas: Collection[Arena]) -> None:
        for extents in list(self._by_size.values()):
            extents[:] = [extent for extent in extents if extent.arena not in arenas]

    def free(self) -> Iterator[Extent]:
        for extents in list(self._by_size.values()):  # a finalizer's request may add a size meanwhile
            yield from extents


class Slices(SizeClasses):
    """Size classes first; then the smallest larger extent, of which the rest stays free; joined again when needed.

    Example:
        >>> shelf = Slices()
        >>> shelf.of_size(4096).append(Extent(Arena(np.empty(4096, np.uint8), shelf, ("default", 0), 0.0), 0, 4096))
        >>> part = shelf.take_larger(1024)
        >>> part.size, [extent.size for extent in shelf.free()]
        (1024, [3072])
    """

    def take_larger(self, size: int) -> Extent | None:
        part = self._part(size)
        if part is None and self._join():
            free = self.of_size(size)
            part = free.pop() if free else self._part(size)
        return part

    def _part(self, size: int) -> Extent | None:
        fitting = [n for n, free in list(self._by_size.items()) if free and size < n <= MOST_CARVED * size]
        if not fitting:
            return None
        whole = self._by_size[min(fitting)].pop()
        rest = Extent(whole.arena, whole.start + size, whole.size - size)
        rest.home.append(rest)
        return Extent(whole.arena, whole.start, size)

    def _join(self) -> bool:
        """Free neighbours become one extent; whether there were any."""
        runs: dict[Arena, list[Extent]] = {}
        for extent in self.free():
            runs.setdefault(extent.arena, []).append(extent)
        joined = False
        for arena, extents in runs.items():
            extents.sort(key=lambda extent: extent.start)
            first = 0
            for last, extent in enumerate(extents):
                end = extent.start + extent.size
                if last + 1 < len(extents) and extents[last + 1].start == end:
                    continue
                if last > first:
                    for part in extents[first : last + 1]:
                        part.home.remove(part)
                    whole = Extent(arena, extents[first].start, end - extents[first].start)
                    whole.home.append(whole)
                    joined = True
                first = last + 1
        return joined
