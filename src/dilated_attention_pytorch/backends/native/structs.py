"""The structs of source/problem.h as ctypes, field by field; `check_layout` compares their sizes with a library's."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

ABI = 3
"""Of source/native.c; a library of another number is refused."""

_int = ctypes.c_int64
_pointer = ctypes.c_void_p


class Array(ctypes.Structure):
    """A tensor (B, N, H, D) or (B, N, H) with strides in elements; its last dim has stride 1."""

    _fields_ = (("data", _pointer), ("batch", _int), ("token", _int), ("head", _int))

    @classmethod
    def of_rows(cls, x: Tensor) -> Array:
        """Of a tensor (B, N, H, D)."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))

    @classmethod
    def of_lse(cls, x: Tensor) -> Array:
        """Of a tensor (B, H, N)."""
        return cls(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


class Lists(ctypes.Structure):
    """Tile lists by query block; strides are 0 where samples or heads share them."""

    _fields_ = (
        ("num", _pointer),
        ("idx", _pointer),
        ("value", _pointer),
        ("batch", _int),
        ("head", _int),
        ("width", _int),
    )

    @classmethod
    def of(cls, num: Tensor, idx: Tensor, value: Tensor) -> Lists:
        """Of contiguous int32 tables (B or 1, H or 1, Q) and (.., Q, W)."""
        b, h, blocks = num.shape
        strides = (h * blocks if b > 1 else 0, blocks if h > 1 else 0)
        return cls(num.data_ptr(), idx.data_ptr(), value.data_ptr(), *strides, idx.shape[-1])


PIECE_FIELDS = 12
CHUNK_FIELDS = 12
REGION_FIELDS = 6


class NativeProblem(ctypes.Structure):
    """What one call computes; the names are those of the C struct."""

    _fields_ = (
        ("team", _pointer),
        *(
            (name, _int)
            for name in ("dtype", "out_dtype", "batch", "queries", "keys", "heads", "group", "dim", "value_dim")
        ),
        *((name, _int) for name in ("pack_keys", "part_rows", "parts", "threads")),
        ("scale", ctypes.c_double),
        *((name, Array) for name in ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "delta")),
        ("slopes", _pointer),
        ("table", _pointer),
        ("table_stride", _int),
        ("reach", _int),
        ("q_at", _pointer),
        ("k_at", _pointer),
        ("chunks", _pointer),
        ("pieces", _pointer),
        ("first_unit", _pointer),
        ("num_chunks", _int),
        ("regions", _pointer),
        ("region_chunks", _pointer),
        ("first_base", _pointer),
        ("num_regions", _int),
        ("is_tiled", _int),
        ("block_q", _int),
        ("block_k", _int),
        ("partial", Lists),
        ("full", Lists),
        ("counts", _pointer),
        ("count_row", _int),
        ("visible", _pointer),
    )


def check_layout(library: ctypes.CDLL) -> str | None:
    """Why the library cannot be called through these structs, or None."""
    found = np.zeros(6, dtype=np.int64)
    library.da_layout(found.ctypes.data_as(_pointer))
    sizes = (ctypes.sizeof(NativeProblem), 8 * CHUNK_FIELDS, 8 * PIECE_FIELDS, 8 * REGION_FIELDS)
    if found[0] != ABI:
        return f"it has ABI {found[0]}, expected {ABI}"
    if tuple(found[2:].tolist()) != sizes:
        return f"its structs have {found[2:].tolist()} bytes, expected {list(sizes)}"
    return None
