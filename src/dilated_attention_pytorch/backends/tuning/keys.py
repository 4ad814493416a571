"""Under which key a measurement is filed: what decides which way of computing is the fastest."""

from __future__ import annotations

import platform
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from dilated_attention_pytorch.patterns import BlockSparse, Pattern
from dilated_attention_pytorch.plans import Plan
from dilated_attention_pytorch.problem import Problem

SHORT_ROWS = 512
"""A dilated pattern is "short" when some branch has segments of fewer rows than this, w / r (tokens)."""
PATTERN_CLASSES = (
    "full",
    "causal",
    "window",
    "documents",
    "dilated-short",
    "dilated-long",
    "dilated-short-causal",
    "dilated-long-causal",
    "blocks",
    "other",
)


class Key(NamedTuple):
    """What measurements are filed under, on one device. ``length`` is the power of two from Nk upward (tokens)."""

    dtype: str
    head_dim: int
    pattern: str
    length: int
    decode: bool
    training: bool

    def __str__(self) -> str:
        rows = "one query" if self.decode else "queries"
        work = "training" if self.training else "forward"
        return f"{self.dtype}, D {self.head_dim}, {self.pattern}, {rows} on {self.length} keys, {work}"


def pattern_class(pattern: Pattern) -> str:
    """One of PATTERN_CLASSES: what decides which way is the fastest, besides lengths and dtype.

    Segments come first: packed documents with dilated attention inside are "dilated". Then documents, then windows.

    Example:
        >>> from dilated_attention_pytorch import Causal, longnet
        >>> pattern_class(Causal()), pattern_class(longnet([256, 1024], [1, 4]) & Causal())
        ('causal', 'dilated-short-causal')
    """
    branches = pattern.branches()
    if branches is None:
        return "blocks" if any(isinstance(part, BlockSparse) for part in pattern.parts()) else "other"
    rows = [b.segment_length // b.dilation_rate for b in branches if b.segment_length is not None]
    causal = any(b.is_causal for b in branches)
    if rows:
        return f"dilated-{'short' if min(rows) < SHORT_ROWS else 'long'}{'-causal' if causal else ''}"
    if any(b.documents is not None for b in branches):
        return "documents"
    if any(b.window is not None for b in branches):
        return "window"
    return "causal" if causal else "full"


_classes: WeakKeyDictionary[Plan, str] = WeakKeyDictionary()
_lock = threading.Lock()


def key_of(problem: Problem, plans: Sequence[Plan]) -> Key:
    """The key of a problem; its pattern is that of the plans."""
    with _lock:
        kind = _classes.get(plans[0])
        if kind is None:
            kind = _classes[plans[0]] = pattern_class(plans[0].pattern)
    length = 1 << max(problem.key_length - 1, 0).bit_length()
    dtype = str(problem.q.dtype).removeprefix("torch.")
    return Key(dtype, problem.q.shape[3], kind, length, problem.query_length == 1, problem.needs_grad)


@lru_cache(maxsize=1)
def processor_name() -> str:
    """The make of the CPU, as the system tells it."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The name that tables are filed under: the make of a GPU, or of the CPU and its vector instructions.

    Meta tensors stand for a CPU's, as everywhere in the backends.
    """
    if device_type(device) == "cpu":
        return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
    module: Any = getattr(torch, device.type, None)
    here = hasattr(module, "get_device_name") and module.is_available()  # tensors may stand for a device elsewhere
    return str(module.get_device_name(device)) if here else device.type


def device_type(device: torch.device) -> str:
    """The type of the device, "cpu" for meta."""
    return "cpu" if device.type == "meta" else device.type
