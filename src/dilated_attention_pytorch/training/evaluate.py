"""Does more context help? The same held-out bytes, predicted after contexts of growing length.

A target is a run of bytes in the held-out text. For every context length `c` the model reads `c` bytes that end just
before the target's last byte, so each target byte has between `c - targets + 1` and `c` bytes before it. All contexts
are asked for the same bytes, so their differences are paired. Standard errors are clustered: bytes of one document
are not independent.
"""

import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.data import END_OF_DOCUMENT, Bytes

Floats = npt.NDArray[np.float64]
CLUSTER_BYTES = 65536  # a longer document counts as one cluster per stretch of this size


@dataclass(frozen=True)
class ContextRow:
    """One context length (bytes): bits per byte and standard error; the gain over the shortest context and its own.

    `xz` is what `xz -9` pays for the same bytes after the same context.
    """

    context: int
    bits_per_byte: float
    standard_error: float
    gain: float
    gain_error: float
    xz: float


@dataclass(frozen=True)
class Evaluation:
    """Rows by context, and what they rest on. `xz_targets` and `xz_held_out` are bits per byte of `xz -9` files."""

    rows: tuple[ContextRow, ...]
    targets: int
    target_bytes: int
    clusters: int
    xz_targets: float
    xz_held_out: float

    @property
    def best(self) -> ContextRow:
        """The row with the fewest bits per byte."""
        return min(self.rows, key=lambda row: row.bits_per_byte)


def evaluate(
    model: torch.nn.Module,
    held_out: Bytes,
    contexts: Sequence[int],
    *,
    targets: int = 256,
    bytes_per_target: int = 128,
    batch_tokens: int = 16384,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Evaluation:
    """Bits per byte of `model` on the same held-out bytes after each context, with paired, clustered standard errors.

    `model(tokens)` maps (B, N) int64 bytes to (B, N, 256) logits. `targets` runs of `bytes_per_target` bytes are
    spread evenly over the text (fewer when it is short); `on_progress` is told the share of the work done. Raises
    InvalidInput when the text is shorter than the longest context and two targets.
    """
    contexts = sorted(contexts)
    ends = target_ends(len(held_out), contexts[-1], targets, bytes_per_target)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    bits = np.empty((len(contexts), len(ends)))  # mean bits per byte of each target
    work, done = len(ends) * sum(contexts), 0
    with torch.inference_mode():
        for row, context in enumerate(contexts):
            size = max(1, batch_tokens // context)
            for first in range(0, len(ends), size):
                chosen = ends[first : first + size]
                windows = np.stack([held_out[end - context - 1 : end] for end in chosen])
                losses = _losses(model, torch.from_numpy(windows).long().to(device), bytes_per_target)
                bits[row, first : first + len(chosen)] = losses.double().mean(1).cpu().numpy() / math.log(2)
                done += len(chosen) * context
                on_progress(done / work)
    model.train(was_training)
    if not np.isfinite(bits).all():
        raise FloatingPointError("the model's loss on the held-out text is not finite; its weights are damaged")
    clusters = clusters_of(held_out, ends)
    rows = []
    for row, context in enumerate(contexts):
        mean, error = clustered(bits[row], clusters)
        gain, gain_error = clustered(bits[0] - bits[row], clusters)
        rows.append(
            ContextRow(context, mean, error, gain, gain_error, xz_after(held_out, ends, context, bytes_per_target))
        )
    joined = b"".join(held_out[end - bytes_per_target : end].tobytes() for end in ends)
    return Evaluation(
        rows=tuple(rows),
        targets=len(ends),
        target_bytes=len(joined),
        clusters=len(np.unique(clusters)),
        xz_targets=8 * len(lzma.compress(joined, preset=9)) / len(joined),
        xz_held_out=8 * len(lzma.compress(held_out.tobytes(), preset=9)) / len(held_out),
    )


def _losses(model: torch.nn.Module, windows: torch.Tensor, count: int) -> torch.Tensor:
    """Nats of the last `count` bytes of `windows` (B, context + 1), as (B, count)."""
    logits = model(windows[:, :-1])[:, -count:]
    return functional.cross_entropy(logits.float().transpose(1, 2), windows[:, -count:], reduction="none")


def target_ends(length: int, longest: int, targets: int, bytes_per_target: int) -> npt.NDArray[np.int64]:
    """Where targets end: spread evenly, without overlap, each with `longest` bytes and one more before its end.

    >>> target_ends(length=1000, longest=100, targets=4, bytes_per_target=10)
    array([ 101,  400,  700, 1000])
    """
    room = length - longest - 1
    fitting = min(targets, room // bytes_per_target + 1)
    if room < 0 or fitting < 2:
        raise InvalidInput(
            f"the held-out text has {length:,} bytes; a context of {longest:,} needs at least "
            f"{longest + 1 + bytes_per_target:,}. Give more text, or shorter contexts"
        )
    return np.linspace(longest + 1, length, fitting).astype(np.int64)


def clusters_of(text: Bytes, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A number per target, the same for targets in one document, or in one 64 KiB stretch of a longer one."""
    stops = np.flatnonzero(text == END_OF_DOCUMENT[0])
    starts = np.concatenate(([0], stops + 1))
    document = np.searchsorted(stops, ends - 1)
    stretch = (ends - 1 - starts[document]) // CLUSTER_BYTES
    return np.unique(np.stack((document, stretch)), axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def clustered(values: Floats, clusters: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The mean of `values` and its cluster-robust standard error (Liang and Zeger 1986); infinite with one cluster.

    >>> mean, error = clustered(np.array([1.0, 3.0, 1.0, 3.0]), np.array([0, 0, 1, 1]))
    >>> float(mean), float(error)
    (2.0, 0.0)
    """
    mean = values.mean()
    sums = np.bincount(clusters, weights=values - mean)
    sums = sums[np.bincount(clusters) > 0]
    count = len(sums)
    if count < 2:
        return float(mean), math.inf
    return float(mean), float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))


def xz_after(text: Bytes, ends: npt.NDArray[np.int64], context: int, bytes_per_target: int) -> float:
    """Bits per byte that `xz -9` adds for the targets, compressed behind the same context that the model reads.

    Raw LZMA2 streams, so that the container's padding does not blur a difference of a few bytes. The dictionary is as
    large as the text needs; a larger one gives the same stream.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, 2 * context)}]
    added = 0
    for end in ends:
        window = text[end - context - 1 : end].tobytes()
        before = window[: len(window) - bytes_per_target]
        whole, part = (lzma.compress(data, lzma.FORMAT_RAW, filters=filters) for data in (window, before))
        added += len(whole) - len(part)
    return 8 * added / (len(ends) * bytes_per_target)
