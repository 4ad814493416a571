"""How layers know where tokens stand: rotary tables, xPos, ALiBi slopes. Nothing here is a parameter or a buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Documents

POSITIONS = ("none", "rotary", "xpos", "alibi")


class Rotation(NamedTuple):
    """One table for the queries and keys of some rows; made once by ``table`` and shared by all layers of a model.

    Each tensor is (N, 1, D) or (B, N, 1, D), float32, or float64 for float64 models; xPos's factors are folded in.
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x (B, N, H, D)`` with its pairs (i, i + D/2) turned by the table's angles, in the table's dtype, then x's.

    Eq. 34 of RoFormer (arXiv 2104.09864) with halves for its interleaved pairs, as GPT-NeoX stores them.

    Example:
        >>> cos, sin = torch.zeros(1, 1, 2), torch.tensor([[[-1.0, 1.0]]])  # a quarter turn
        >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), cos, sin).flatten().tolist()
        [0.0, 1.0]
    """
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slope of each head, (H,) float32: ``2^(-8 (h + 1) / H)`` (arXiv 2108.12409, section 3).

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    return torch.tensor([2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)], dtype=torch.float32)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (arXiv 2104.09864): logits depend on the distance of tokens only, at any length.

    Raises InvalidInput for an odd head dim.

    Example:
        >>> Rotary(8).table(3).query_cos.shape
        torch.Size([3, 1, 8])
    """

    head_dim: int
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.head_dim % 2 != 0:
            raise InvalidInput(
                f"rotary positions turn pairs of channels: expected an even head dim. Got {self.head_dim}; choose "
                "another number of heads, or position='none' or 'alibi'."
            )

    def table(
        self,
        length: int,
        *,
        start: int = 0,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        at: Tensor | None = None,
    ) -> Rotation:
        """The rotation of rows ``start...start + length``, which stand at ``position_ids`` (N,) or (B, N).

        None is in order, in each of ``documents`` from 0. ``dtype`` is that of the tensors to be turned. With ``at``
        (n,), int64, the table holds only those of the ``length`` rows, counted from 0, and position_ids are theirs.
        Raises InvalidInput for position_ids of another shape or kind.
        """
        places = _places(position_ids, _rows(length, start, documents, torch.device(device or "cpu"), at))
        cos, sin = self._cos_sin(places, _table_dtype(dtype))
        return Rotation(cos, sin, cos, sin)

    def _cos_sin(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Signed so that ``x * cos + roll(x) * sin`` is the rotation: (..., N, 1, D)."""
        half = torch.arange(self.head_dim // 2, device=places.device, dtype=places.dtype)
        angles = places[..., None] * self.base ** (-2.0 * half / self.head_dim)  # (..., N, D/2)
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), -1).unsqueeze(-2).to(dtype),
            torch.cat((-sin, sin), -1).unsqueeze(-2).to(dtype),
        )


@dataclass(frozen=True)
class XPos(Rotary):
    """Rotary positions whose logits also decay with distance (xPos, arXiv 2212.10554, section 3).

    Queries grow and keys shrink by ``zeta^(n / scale_base)``, where n counts from the middle of the row's own largest
    segment when every segment length divides the largest (attention then never leaves it), else from the middle of the
    first. The origin does not depend on the length, so decoding equals prefill. Factors are float32 (float64 for
    float64 models). Meant for causal attention: a key after its query is amplified.

    Raises InvalidInput when a factor leaves the dtype of the tensors.
    """

    segment_lengths: tuple[int, ...] = ()
    scale_base: float = 512.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.segment_lengths:
            raise InvalidInput("xpos counts from the middle of the largest segment; without segments use 'rotary'.")

    def table(
        self,
        length: int,
        *,
        start: int = 0,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        at: Tensor | None = None,
    ) -> Rotation:
        """As `Rotary.table`, with the factors folded into the queries' and the keys' tables."""
        rows = _rows(length, start, documents, torch.device(device or "cpu"), at)
        places = _places(position_ids, rows)
        cos, sin = self._cos_sin(places, _table_dtype(dtype))
        counted = places - self._origins(rows).to(places.dtype)
        in_order = position_ids is None and (documents is None or self._nests)
        if at is not None and position_ids is None and documents is not None:
            in_order, length = True, min(length, int(documents.lengths.max()))  # the same answer on every rank
        self._check_range(self._reach(length, start) if in_order else _largest(counted), dtype)
        pair = torch.arange(0, self.head_dim, 2, device=rows.device, dtype=places.dtype)
        zeta = (pair / self.head_dim + 0.4) / 1.4
        grow = (zeta ** (counted[..., None] / self.scale_base)).to(cos.dtype).unsqueeze(-2)  # (..., N, 1, D/2)
        grow = torch.cat((grow, grow), -1)
        return Rotation(cos * grow, sin * grow, cos / grow, sin / grow)

    def _origins(self, rows: Tensor) -> Tensor:
        largest = max(self.segment_lengths)
        own_segment = rows // largest * largest if self._nests else torch.zeros_like(rows)
        return own_segment + largest // 2

    @property
    def _nests(self) -> bool:
        return all(max(self.segment_lengths) % w == 0 for w in self.segment_lengths)

    def _reach(self, length: int, start: int) -> int:
        """The largest |n| of rows ``start...start + length`` in order, without looking at tensors.

        Where segments nest it is that of a whole segment, whatever the length: compiled code then serves every length.
        """
        middle = max(self.segment_lengths) // 2
        return middle if self._nests else max(abs(start - middle), abs(start + max(length, 1) - 1 - middle))

    def _check_range(self, reach: float, dtype: torch.dtype) -> None:
        info = torch.finfo(dtype)
        exponent = reach / self.scale_base * math.log(1.4 / 0.4)
        if exponent > min(math.log(info.max), -math.log(info.tiny)):
            raise InvalidInput(
                f"xpos: a token {reach:.0f} tokens from the middle of the largest segment has a factor of "
                f"exp({exponent:.1f}), which leaves {dtype}. Use position='rotary', which has no factors."
            )


def make_positions(kind: str, head_dim: int, segment_lengths: Sequence[int] | None) -> Rotary | None:
    """The rotation that ``kind`` stands for; None for "none" and "alibi", which turn nothing.

    Example:
        >>> make_positions("rotary", 16, None)
        Rotary(head_dim=16, base=10000.0)
    """
    if kind not in POSITIONS:
        raise InvalidInput(f"expected position to be one of {POSITIONS}. Got {kind!r}.")
    if kind == "rotary":
        return Rotary(head_dim)
    if kind == "xpos":
        return XPos(head_dim, segment_lengths=tuple(segment_lengths or ()))
    return None


def _rows(
    length: int, start: int, documents: Documents | None, device: torch.device, at: Tensor | None = None
) -> Tensor:
    """Row numbers, (N,) or (B, N), which begin anew in every document; with ``at`` only of those rows."""
    rows = torch.arange(start, start + length, device=device) if at is None else start + at.to(device)
    if documents is None:
        return rows
    inside = documents.locate(rows)[1]
    return inside if inside.dim() == 1 else inside.reshape(-1, rows.shape[0])


def _places(position_ids: Tensor | None, rows: Tensor) -> Tensor:
    """Positions as floats, float64 where the device has it: a float32 angle is 0.06 off at a million tokens."""
    working = torch.float32 if rows.device.type == "mps" else torch.float64
    if position_ids is None:
        return rows.to(working)
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise InvalidInput(f"expected position_ids of an integer dtype. Got {position_ids.dtype}; use .long().")
    if position_ids.dim() not in (1, 2) or position_ids.shape[-1] != rows.shape[-1]:
        raise InvalidInput(
            f"expected position_ids of shape (N,) or (B, N) with N = {rows.shape[-1]}. Got {tuple(position_ids.shape)}."
        )
    return position_ids.to(device=rows.device, dtype=working)


def _table_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _largest(counted: Tensor) -> float:
    return float(counted.abs().max()) if counted.numel() else 0.0
