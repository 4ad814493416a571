"""What the garbage collector and a fork mean for pools."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from functools import partial
from typing import Protocol


class Pool(Protocol):
    """What a pool offers to these hooks."""

    def trim_after_collection(self) -> None:
        """Cold buffers go, if the pool is not busy."""

    def pause(self) -> None:
        """No other thread changes the pool until `resume`."""

    def resume(self) -> None:
        """Other threads may use the pool again."""


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_paused: list[Pool] = []
_lock = threading.RLock()
_forks_are_watched = False


def watch(pool: Pool) -> None:
    """From now on the pool is trimmed after each full garbage collection, and is whole in a child that is forked."""
    global _forks_are_watched
    hook = partial(_after_collection, weakref.ref(pool))
    gc.callbacks.append(hook)
    weakref.finalize(pool, gc.callbacks.remove, hook).atexit = False
    with _lock:
        _pools.add(pool)
        if not _forks_are_watched and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=_pause, after_in_parent=_resume, after_in_child=_resume)
            _forks_are_watched = True


def _after_collection(pool: weakref.ref[Pool], phase: str, info: dict[str, int]) -> None:
    found = pool()
    if found is not None and phase == "stop" and info["generation"] == 2:
        found.trim_after_collection()


def _pause() -> None:
    """A child has one thread: a lock that another thread held would never open there."""
    _lock.acquire()
    _paused[:] = _pools
    for pool in _paused:
        pool.pause()


def _resume() -> None:
    for pool in _paused:
        pool.resume()
    _paused.clear()
    _lock.release()
