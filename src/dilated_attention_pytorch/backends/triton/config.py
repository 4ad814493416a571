"""Which tiles, warps and stages each kernel gets on each kind of GPU: plain data, and options that override it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dilated_attention_pytorch.backends.base import Options
from dilated_attention_pytorch.errors import InvalidInput

SPLITS = ("auto", "together", "apart")
"""How a sum of branches is dealt out to launches: as the planner's cost model says, all in one, or one each."""
GRADIENTS = ("queries", "keys")
"""The kernels of dq, and of dk and dv."""


class Blocks(NamedTuple):
    """A tile's own rows, the rows of the other side visited at a time, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TritonOptions(Options):
    """What may be chosen about the Triton kernels; None takes the table's value.

    ``block_m``, ``block_n`` (tokens, powers of two from 16 to 256), ``num_warps`` and ``num_stages`` hold for the
    forward kernels, those with ``backward_`` for the gradients' kernels. ``split`` is one of `SPLITS`.

    Example:
        >>> TritonOptions(block_m=64).block_m
        64
    """

    block_m: int | None = None
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    backward_block_m: int | None = None
    backward_block_n: int | None = None
    backward_num_warps: int | None = None
    backward_num_stages: int | None = None
    split: str = "auto"

    def __post_init__(self) -> None:
        for prefix in ("", "backward_"):
            for name, allowed in (
                ("block_m", (16, 32, 64, 128, 256)),
                ("block_n", (16, 32, 64, 128, 256)),
                ("num_warps", (1, 2, 4, 8, 16)),
                ("num_stages", tuple(range(1, 9))),
            ):
                value = getattr(self, prefix + name)
                if value is not None and value not in allowed:
                    raise InvalidInput(
                        f"TritonOptions: expected {prefix}{name} to be one of {allowed} or None. Got {value!r}."
                    )
        if self.split not in SPLITS:
            raise InvalidInput(f"TritonOptions: expected split to be one of {SPLITS}. Got {self.split!r}.")

    def blocks(self, family: str, kernel: str, arithmetic: str, head_dim: int) -> Blocks:
        """What a kernel is launched with: the values of `default_blocks` where nothing is chosen."""
        given = default_blocks(family, kernel, arithmetic, head_dim)
        prefix = "backward_" if kernel in GRADIENTS else ""
        chosen = (getattr(self, prefix + name) for name in Blocks._fields)
        return Blocks(*(given[i] if value is None else value for i, value in enumerate(chosen)))


# (family, head dims up to) -> for 16-bit inputs, the blocks of the kernels "branch", "list", "queries", "keys".
# The one for tables of tiles takes those of "list", within the table's blocks.
_HALF: dict[tuple[str, int], tuple[Blocks, Blocks, Blocks, Blocks]] = {
    ("hopper", 64): (Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2)),
    ("hopper", 128): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    ("hopper", 256): (Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2)),
    ("ampere", 64): (Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2)),
    ("ampere", 128): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    ("ampere", 256): (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1)),
    ("cdna", 64): (Blocks(128, 64, 4, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2)),
    ("cdna", 128): (Blocks(128, 32, 4, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 4, 2)),
    ("cdna", 256): (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    ("small", 64): (Blocks(128, 64, 4, 2), Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2)),
    ("small", 128): (Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
    ("small", 256): (Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1)),
}
# (arithmetic, head dims up to) -> for float32 inputs of every family, the blocks of the forward and gradient kernels.
_SINGLE: dict[tuple[str, int], tuple[Blocks, Blocks]] = {
    ("ieee", 64): (Blocks(64, 16, 8, 1), Blocks(32, 32, 4, 1)),
    ("ieee", 128): (Blocks(16, 16, 8, 1), Blocks(32, 16, 8, 1)),
    ("ieee", 256): (Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
    ("tf32", 64): (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
    ("tf32", 128): (Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2)),
    ("tf32", 256): (Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
_KERNELS = ("branch", "list", "queries", "keys")
FAMILIES = tuple(dict.fromkeys(family for family, _ in _HALF))
"""hopper: sm_90 and data-centre Blackwell; ampere: sm_80; cdna: AMD's gfx9; small: less shared memory than those."""


def default_blocks(family: str, kernel: str, arithmetic: str, head_dim: int) -> Blocks:
    """The table's entry for a kernel: "branch", "list", "blocks", "queries" or "keys".

    ``arithmetic`` is that of the matrix products: "half", or for float32 inputs "ieee" or "tf32".

    Example:
        >>> default_blocks("hopper", "branch", "half", 48)
        Blocks(block_m=128, block_n=64, num_warps=4, num_stages=3)
    """
    bucket = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if arithmetic != "half":
        return _SINGLE[arithmetic, bucket][kernel in GRADIENTS]
    return _HALF[family, bucket][_KERNELS.index("list" if kernel == "blocks" else kernel)]


def family_of(device: torch.device) -> str:
    """The row of the table that serves a device; "small" fits everywhere."""
    if device.type != "cuda":
        return "small"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "cdna" if name.startswith(("gfx90a", "gfx94", "gfx95")) else "small"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return "hopper"
    return "ampere" if (major, minor) == (8, 0) else "small"
