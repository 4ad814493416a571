"""Memory that is handed out again: buffers that return by themselves when their storage dies.

A buffer is a tensor over a small owner object (an array view). PyTorch keeps that object exactly as long as the
buffer's storage: views, aliases, NumPy arrays and what autograd saved hold the storage, and so the owner. A weak
reference to the owner, of which the callback is a deque's append, notes its end: no Python code runs in finalizers,
so none can deadlock, in whatever thread the storage dies. The next request takes the notes in.
"""

from __future__ import annotations

import gc
import math
import operator
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory.config import MemoryPoolConfig, device_of
from dilated_attention_pytorch.memory.hooks import watch
from dilated_attention_pytorch.memory.placement import Topology, machine_topology, node_finder
from dilated_attention_pytorch.memory.poison import is_poisoned, poisoned
from dilated_attention_pytorch.memory.pressure import Room, memory_room
from dilated_attention_pytorch.memory.snapshot import MIB, Allocation, PoolSnapshot, PoolStatistics, Span
from dilated_attention_pytorch.memory.strategies import Arena, Bytes, Extent, SizeClasses, Slices, Strategy

POOL_TYPES = ("default", "ring", "sparse", "distributed")
COLD_SECONDS = 30.0  # a cold buffer is dropped so long after the pool learned of its return
TRIM_SECONDS = 1.0  # between two looks at ages and at the system's free memory
COLLECT_SECONDS = 60.0  # between two garbage collections that a full pool asks for
LEAST_FREE = 0.1  # of a memory limit; with less, free buffers are dropped
MOST_REQUESTS = 1024  # remembered forms of requests


class _Request:
    """A request understood, on one NUMA node: what it needs, and how often it came."""

    __slots__ = ("array_dtype", "dtype", "free", "nbytes", "place", "shape", "shelf", "size", "sizes", "uses")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, place: tuple[str, int], shelf: Strategy) -> None:
        self.shape, self.dtype, self.place, self.shelf, self.uses = shape, dtype, place, shelf, 0
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.size = shelf.size_of(self.nbytes)
        self.free = shelf.of_size(self.size)
        self.sizes: tuple[Any, ...] = shape or ((),)  # arguments of resize_, which is faster without a tuple
        try:
            self.array_dtype: Any = torch.empty(0, dtype=dtype).numpy().dtype
        except TypeError:  # NumPy has no such type, as bfloat16
            self.array_dtype = None

    def form(self, extent: Extent) -> Bytes:
        """The extent's bytes as an array of this shape and dtype; flat bytes for a dtype that NumPy lacks."""
        data = extent.arena.data[extent.start : extent.start + self.nbytes]
        return data if self.array_dtype is None else data.view(self.array_dtype).reshape(self.shape)


class _Lease(weakref.ref[Bytes]):
    """A weak reference to a buffer's owner, which knows the extent that comes back with it."""

    __slots__ = ("extent",)
    extent: Extent


class UnifiedMemoryPool:
    """Hands out buffers of host memory and takes them back by itself; safe in threads, across forks, and bounded.

    ``strategy`` makes the shelf of a pool type and NUMA node: by default `Slices`, or `SizeClasses` when the config
    allows no slicing. ``topology`` and ``current_cpu`` say where threads run (None: this machine's), and ``room``
    how much memory is left. Two live buffers never share memory, and `max_pool_size_mb` is never passed.

    Pinned memory and memory of accelerators come from PyTorch's own caching allocators, which wait for streams and
    for copies under way, as a pool above them could not; this pool counts those requests and keeps none of them.

    Example:
        >>> pool = UnifiedMemoryPool()
        >>> x = pool.get_buffer((1000, 8))
        >>> address, view = x.data_ptr(), x[5:]
        >>> del x  # the view keeps the storage
        >>> pool.get_buffer((1000, 8)).data_ptr() == address
        False
        >>> del view
        >>> pool.clear(); pool.get_info()["live_buffers"]
        0
    """

    def __init__(
        self,
        config: MemoryPoolConfig | None = None,
        *,
        strategy: Callable[[], Strategy] | None = None,
        topology: Topology | None = None,
        current_cpu: Callable[[], int] | None = None,
        room: Callable[[], Room | None] = memory_room,
    ) -> None:
        self.config = MemoryPoolConfig() if config is None else config
        self._strategy = strategy or (Slices if self.config.allow_buffer_slicing else SizeClasses)
        topology = machine_topology() if topology is None else topology
        self._node, self._first_node = node_finder(topology, current_cpu), topology.nodes[0]
        self._room, self._device = room, device_of(self.config.device or "cpu")
        self._cleanup = int(self.config.cleanup_threshold_mb * MIB)
        self._most = int(self.config.max_pool_size_mb * MIB)
        self._lock, self._inside = threading.RLock(), False
        self._returned: deque[_Lease] = deque()
        self._note = self._returned.append
        self._live: dict[Extent, _Lease] = {}
        self._requests: dict[object, _Request] = {}
        self._shelves: dict[tuple[str, int], Strategy] = {}
        self._arenas: set[Arena] = set()
        self._held = self._hits = self._fresh = self._unpooled = self._delegated = 0
        self._trimmed = self._decayed = time.monotonic()
        self._collected = -math.inf
        watch(self)

    def get_buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        pinned: bool = False,
        pool_type: str = "default",
    ) -> Tensor:
        """A contiguous tensor whose contents mean nothing; its memory comes back when its storage dies.

        The storage lives as long as the tensor, any view or alias of it, or a graph that saved one. It cannot be
        resized. ``pool_type`` ("default", "ring", "sparse", "distributed") keeps kinds of use apart. Raises
        InvalidInput for another pool type, a negative dim, a quantized dtype, or pinned memory that is not of the
        CPU or without an accelerator.
        """
        node = self._first_node if self._node is None else self._node()
        try:
            request = self._requests[shape, dtype, device, pinned, pool_type, node]
        except (KeyError, TypeError):
            shape = _dims(shape)
            where = self._where(dtype, device, pinned, pool_type)
            if pinned or where.type != "cpu":
                with self._lock:
                    self._delegated += 1
                return poisoned(torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned))
            if 0 in shape:
                return torch.empty(shape, dtype=dtype, device=where)
            request = self._remember((shape, dtype, device, pinned, pool_type, node))
        owner = self._lease(request)
        if owner is None:
            owner = self._after_collecting(request)
            if owner is None:
                return poisoned(torch.empty(request.shape, dtype=dtype, device="cpu"))
        if request.array_dtype is None:
            x = torch.frombuffer(owner, dtype=dtype).resize_(*request.sizes)
        else:
            x = torch.from_numpy(owner)
        return poisoned(x) if is_poisoned() else x

    @contextmanager
    def borrow(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        pinned: bool = False,
        pool_type: str = "default",
    ) -> Iterator[Tensor]:
        """Within it, a buffer as of `get_buffer`; after it the tensor is empty, and its memory back.

        Views of it keep the memory until they die. A backward over what autograd saved of it raises, as after any
        change in place.

        Example:
            >>> with UnifiedMemoryPool().borrow((2, 3)) as x:
            ...     total = x.fill_(2).sum()
            >>> float(total), tuple(x.shape)
            (12.0, (0,))
        """
        x = self.get_buffer(shape, dtype, device, pinned, pool_type)
        try:
            yield x
        finally:
            with torch.no_grad():
                x.set_(torch.UntypedStorage(device=x.device))

    def trim(self) -> int:
        """Free buffers that are cold, too many, or in the way of other memory are dropped; gives the bytes."""
        with self._at_work() as may:
            return self._trim(time.monotonic()) if may else 0

    def clear(self) -> None:
        """Every allocation without a live buffer is given back to the system; live buffers stay as they are."""
        with self._at_work() as may:
            if may:
                self._drop(self._idle(), self._held)

    def get_statistics(self) -> PoolStatistics:
        """Hits, misses, and bytes live, free and held, as of now."""
        return self.snapshot().statistics

    def get_info(self) -> dict[str, Any]:
        """The statistics under names that 0.2's users know: total_buffers, total_memory_mb (MiB), hits, misses, ..."""
        found = self.get_statistics()
        return {
            "total_buffers": found.live_buffers + found.free_buffers,
            "total_memory_mb": found.bytes_held / MIB,
            "live_buffers": found.live_buffers,
            "live_memory_mb": found.bytes_live / MIB,
            "free_memory_mb": found.bytes_free / MIB,
            "hits": found.hits,
            "misses": found.misses,
            "hit_rate": found.hit_rate,
            "unpooled": found.unpooled,
            "delegated": found.delegated,
            "fragmentation": found.fragmentation,
        }

    def snapshot(self) -> PoolSnapshot:
        """What the pool holds now: statistics, and each allocation with its live and free spans."""
        with self._at_work():  # a collection meanwhile must not trim
            now, spans = time.monotonic(), {arena: list[Span]() for arena in list(self._arenas)}
            free = [extent for shelf in list(self._shelves.values()) for extent in shelf.free()]
            live = list(self._live)
            for extents, is_live in ((free, False), (live, True)):
                for extent in extents:
                    span = Span(extent.start, extent.size, extent.nbytes if is_live else 0)
                    spans[extent.arena].append(span)
            idle = sum(arena.size for arena in spans if not arena.taken)
            bytes_live = sum(extent.nbytes for extent in live)
            counted = self.config.enable_statistics
            statistics = PoolStatistics(
                self._hits if counted else None,
                self._fresh + self._unpooled if counted else None,
                self._unpooled,
                self._delegated,
                len(live),
                len(free),
                bytes_live,
                sum(extent.size for extent in free),
                self._held,
                1 - (bytes_live + idle) / self._held if self._held else 0.0,
            )
        allocations = [
            Allocation(arena.size, *arena.place, max(0.0, now - arena.used_at), tuple(sorted(s, key=lambda x: x.start)))
            for arena, s in spans.items()
        ]
        return PoolSnapshot(statistics, tuple(sorted(allocations, key=lambda x: -x.size)))

    def pause(self) -> None:
        """No other thread changes the pool until `resume`; for a fork."""
        self._lock.acquire()

    def resume(self) -> None:
        """Other threads may use the pool again."""
        self._lock.release()

    def _where(
        self, dtype: torch.dtype, device: torch.device | str | None, pinned: bool, pool_type: str
    ) -> torch.device:
        """The device of a request. Raises InvalidInput for one that cannot be served."""
        if pool_type not in POOL_TYPES:
            raise InvalidInput(f"pool_type must be one of {', '.join(POOL_TYPES)}. Got {pool_type!r}")
        if not isinstance(dtype, torch.dtype) or str(dtype).startswith(("torch.q", "torch.bits")):
            raise InvalidInput(f"dtype must be a torch dtype that is not quantized. Got {dtype!r}")
        where = self._device if device is None else device_of(device)
        if pinned and where.type != "cpu":
            raise InvalidInput(f"pinned memory is host memory: device must be 'cpu'. Got {where}")
        if pinned and not torch.accelerator.is_available():
            raise InvalidInput("pinned memory needs an accelerator, and there is none here; leave pinned=False")
        return where

    def _remember(self, key: tuple[tuple[int, ...], torch.dtype, Any, bool, str, int]) -> _Request:
        shape, dtype, _, _, pool_type, node = key
        with self._lock:
            if key in self._requests:  # the shape came as a list
                return self._requests[key]
            request = _Request(shape, dtype, (pool_type, node), self._shelf(pool_type, node))
            if len(self._requests) >= MOST_REQUESTS:
                kept = sorted(self._requests.items(), key=lambda item: -item[1].uses)[: MOST_REQUESTS // 2]
                self._requests = dict(kept)
            self._requests[key] = request
        return request

    def _shelf(self, pool_type: str, node: int) -> Strategy:
        place = pool_type, node
        shelf = self._shelves.get(place)
        if shelf is None:
            shelf = self._shelves.setdefault(place, self._strategy())
        return shelf

    def _lease(self, request: _Request) -> Bytes | None:
        """The owner of a new buffer's memory; None when the pool has no room for it."""
        with self._lock:
            if self._inside:  # a finalizer asks, while this thread is at work below
                return None
            self._inside = True
            try:
                if self._returned:
                    self._take_back()
                request.uses += 1
                if request.free:
                    extent = request.free.pop()
                    self._hits += 1
                else:
                    other = self._other(request)
                    if other is None:
                        return None
                    extent = other
                extent.arena.taken += 1
                if extent.request is not request:
                    extent.request, extent.nbytes, extent.template = request, request.nbytes, request.form(extent)
                owner: Bytes = extent.template.view()
                lease = _Lease(owner, self._note)
                lease.extent = extent
                self._live[extent] = lease
                return owner
            finally:
                self._inside = False

    def _after_collecting(self, request: _Request) -> Bytes | None:
        """A second try, once garbage that holds buffers is collected; not more often than COLLECT_SECONDS."""
        now = time.monotonic()
        if request.size <= self._most and now - self._collected > COLLECT_SECONDS and not self._inside:
            self._collected = now
            gc.collect()
            owner = self._lease(request)
            if owner is not None:
                return owner
        with self._lock:
            self._unpooled += 1
        return None

    def _take_back(self) -> None:
        now, returned, live = time.monotonic(), self._returned, self._live
        while returned:
            extent = returned.popleft().extent
            del live[extent]
            arena = extent.arena
            arena.taken -= 1
            arena.used_at = now
            extent.home.append(extent)

    def _other(self, request: _Request) -> Extent | None:
        """An extent when none of the right size is free: part of a larger one, or a new allocation, or None."""
        size, now = request.size, time.monotonic()
        extent = request.shelf.take_larger(size)
        if extent is not None:
            self._hits += 1
            return extent
        if now - self._trimmed > TRIM_SECONDS:
            self._trim(now)
        if self._held + size > self._most:
            if size <= self._most:
                self._drop(self._idle(), self._held + size - self._most)
            if self._held + size > self._most:
                return None
        data = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        arena = Arena(data, request.shelf, request.place, now)
        self._arenas.add(arena)
        self._held += size
        self._fresh += 1
        return Extent(arena, 0, size)

    def _idle(self) -> list[Arena]:
        """Allocations without a live buffer in the order in which they go: cold ones first, longest unused first."""
        hot = self._hot()
        idle = [arena for arena in self._arenas if not arena.taken]
        return sorted(idle, key=lambda arena: ((arena.place[0], arena.size) in hot, arena.used_at))

    def _hot(self) -> set[tuple[str, int]]:
        often = [x for x in list(self._requests.values()) if x.uses >= self.config.hot_cache_threshold]
        often.sort(key=lambda request: -request.uses)
        return {(x.place[0], x.size) for x in often[: self.config.hot_cache_size]}

    def _trim(self, now: float) -> int:
        self._trimmed = now
        hot, idle = self._hot(), self._idle()
        cold = [arena for arena in idle if (arena.place[0], arena.size) not in hot]
        dropped = self._drop([arena for arena in cold if now - arena.used_at > COLD_SECONDS], self._held)
        free = sum(arena.size for arena in self._arenas if not arena.taken)
        dropped += self._drop([arena for arena in cold if arena in self._arenas], free - self._cleanup)
        room = self._room()
        if room is not None and room.free < LEAST_FREE * room.limit:
            wanted = int(LEAST_FREE * room.limit) - room.free - dropped
            dropped += self._drop([arena for arena in idle if arena in self._arenas], wanted)
        if now - self._decayed > COLD_SECONDS:  # what was hot long ago becomes cold
            self._decayed = now
            for request in list(self._requests.values()):
                request.uses //= 2
        return dropped

    def _drop(self, arenas: Iterable[Arena], wanted: int) -> int:
        """The first of these allocations are gone until ``wanted`` bytes are free; gives the bytes."""
        going: list[Arena] = []
        dropped = 0
        for arena in arenas:
            if dropped >= wanted:
                break
            going.append(arena)
            dropped += arena.size
        for shelf in {arena.shelf for arena in going}:
            shelf.forget({arena for arena in going if arena.shelf is shelf})
        self._arenas.difference_update(going)
        self._held -= dropped
        return dropped

    def trim_after_collection(self) -> None:
        """As `trim`, unless the pool is busy or has just done so: the garbage collector must not wait."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            with self._at_work() as may:
                now = time.monotonic()
                if may and now - self._trimmed > TRIM_SECONDS:
                    self._trim(now)
        finally:
            self._lock.release()

    @contextmanager
    def _at_work(self) -> Iterator[bool]:
        """Within it the pool is this thread's, with all that returned; False for a finalizer in its own work."""
        with self._lock:
            if self._inside:
                yield False
                return
            self._inside = True
            try:
                self._take_back()
                yield True
            finally:
                self._inside = False


def _dims(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(operator.index(n) for n in shape)
    except TypeError as error:
        raise InvalidInput(f"shape must be whole numbers, as (4, 8). Got {shape!r}") from error
    if any(n < 0 for n in dims):
        raise InvalidInput(f"shape must have no negative dim. Got {dims}")
    return dims
