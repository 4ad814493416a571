"""What is asked: tensors, shapes, positions and masks of one attention problem, checked.

Legend: B batch, N tokens (Nq queries, Nk keys), H query heads, Hkv key-value heads, D head dim, Dv value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.scores import Score

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Run(NamedTuple):
    """Positions ``start, start + step, ...``, ``length`` of them (tokens)."""

    start: int
    step: int
    length: int


Positions = tuple[Run, ...]


def positions_tensor(positions: Positions, device: torch.device | str | None = None) -> Tensor:
    """All positions of the runs, in row order, as int64.

    Example:
        >>> positions_tensor((Run(4, 2, 3), Run(20, 1, 2)))
        tensor([ 4,  6,  8, 20, 21])
    """
    parts = [torch.arange(r.length, dtype=torch.int64, device=device) * r.step + r.start for r in positions]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def positions_end(positions: Positions) -> int:
    """One past the last position; 0 when there is none.

    Example:
        >>> positions_end((Run(4, 2, 3), Run(0, 1, 2)))
        9
    """
    return max((run.start + run.step * (run.length - 1) + 1 for run in positions if run.length > 0), default=0)


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention problem. Nothing in it changes after construction; `check_inputs` and `make_problem` fill it.

    ``key_lengths`` is the number of visible keys of each sample when there is a padding mask, else None.
    ``seed`` is an int64 tensor of one element when ``dropout_p > 0``. ``partial`` says that the problem is a share of a
    larger one (a ring step): results are to be in the accumulate dtype, as merging rounded shares would add up errors.
    ``of_heads`` is (first, total) where the query heads are a slice of more: dropout draws by a head's number in all.
    """

    q: Tensor  # (B, Nq, H, D)
    k: Tensor  # (B, Nk, Hkv, D)
    v: Tensor  # (B, Nk, Hkv, Dv)
    scale: float
    query_positions: Positions
    key_positions: Positions
    key_lengths: tuple[int, ...] | None = None
    bias: Tensor | None = None  # broadcasts to (B, H, Nq, Nk)
    score: Score | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    needs_grad: bool = False
    partial: bool = False
    of_heads: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        """B, samples."""
        return self.q.shape[0]

    @property
    def query_length(self) -> int:
        """Nq, tokens."""
        return self.q.shape[1]

    @property
    def key_length(self) -> int:
        """Nk, tokens."""
        return self.k.shape[1]

    @property
    def num_heads(self) -> int:
        """H, query heads."""
        return self.q.shape[2]

    def dropout_rows(self, sample: Tensor, head: Tensor) -> Tensor:
        """The numbers by which dropout tells samples and heads apart: ``b * H + h`` of all heads; both broadcast."""
        first, total = (0, self.num_heads) if self.of_heads is None else self.of_heads
        return sample * total + (head + first)

    @property
    def kv_group(self) -> int:
        """Query heads that read the same key-value head, ``H // Hkv``."""
        return self.q.shape[2] // max(self.k.shape[2], 1)

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of lse and of sums: float64 for float64 inputs, else float32."""
        return accumulate_dtype(self.q.dtype)

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of out and of the gradients of q, k and v: q's, or the accumulate dtype of a partial problem."""
        return self.accumulate_dtype if self.partial else self.q.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    score: Score | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: int | None = None,
) -> tuple[float, int]:
    """Raise InvalidInput unless shapes, dtypes and numbers form a legal problem; the scale and query_start that hold.

    Looks at metadata only, so that it can be traced; `visible_key_lengths` looks at the mask's values.
    """
    _check_tensors(q, k, v)
    batch, query_length, num_heads, head_dim = q.shape
    key_length = k.shape[1]
    if query_start is None:
        if query_length > key_length:
            raise InvalidInput(
                f"attend: {query_length} queries are to be the last rows of {key_length} keys, which is not possible; "
                "pass query_start= to place them."
            )
        query_start = key_length - query_length
    elif isinstance(query_start, bool) or query_start < 0:
        raise InvalidInput(f"attend: expected query_start >= 0 or None. Got {query_start}.")
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not math.isfinite(scale):
        raise InvalidInput(f"attend: expected a finite scale or None (1/sqrt(D)). Got {scale}.")
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidInput(f"attend: expected dropout_p in [0, 1). Got {dropout_p}.")
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, k)
    if bias is not None:
        _check_bias(bias, (batch, num_heads, query_length, key_length), q.device)
    if score is not None:
        if not isinstance(score, Score):
            raise InvalidInput(f"attend: expected score to be a rule of scores.py or None. Got {type(score).__name__}.")
        score.check(num_heads)
    return scale, query_start


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InvalidInput(f"attend: expected {name} to be a tensor. Got {type(x).__name__}.")
        if x.dim() != 4:
            raise InvalidInput(f"attend: expected {name} of shape (B, N, H, D). Got {tuple(x.shape)}.")
        if x.dtype not in FLOATS:
            raise InvalidInput(f"attend: expected {name} in float16, bfloat16, float32 or float64. Got {x.dtype}.")
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidInput(
            f"attend: q, k, v must share a dtype. Got {q.dtype}, {k.dtype}, {v.dtype}; cast them with .to()."
        )
    if not q.device == k.device == v.device:
        raise InvalidInput(
            f"attend: q, k, v must share a device. Got {q.device}, {k.device}, {v.device}; move them with .to()."
        )
    if k.shape[1] != v.shape[1]:
        raise InvalidInput(f"attend: k has {k.shape[1]} keys, v has {v.shape[1]}; they must be the same tokens.")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InvalidInput(
            f"attend: batch sizes of q, k, v differ: {q.shape[0]}, {k.shape[0]}, {v.shape[0]}; expand() to match."
        )
    if q.shape[3] != k.shape[3]:
        raise InvalidInput(f"attend: q has head dim {q.shape[3]}, k has {k.shape[3]}; they must be equal.")
    if k.shape[2] != v.shape[2]:
        raise InvalidInput(f"attend: k has {k.shape[2]} heads, v has {v.shape[2]}; they must be equal.")
    if q.shape[3] == 0 or k.shape[2] == 0 or q.shape[2] == 0:
        raise InvalidInput("attend: expected at least one head and a head dim of at least 1.")
    if q.shape[2] % k.shape[2] != 0:
        raise InvalidInput(
            f"attend: the number of query heads ({q.shape[2]}) must be a multiple of key-value heads ({k.shape[2]})."
        )


def _check_mask(mask: Tensor, k: Tensor) -> None:
    expected = (k.shape[0], k.shape[1])
    if mask.dtype != torch.bool:
        raise InvalidInput(
            f"attend: expected a bool key_padding_mask, True = padding. Got {mask.dtype}; compare it, as in mask == 0."
        )
    if tuple(mask.shape) != expected:
        raise InvalidInput(f"attend: expected key_padding_mask of shape (B, Nk) = {expected}. Got {tuple(mask.shape)}.")
    if mask.device != k.device:
        raise InvalidInput(
            f"attend: key_padding_mask is on {mask.device}, k on {k.device}; move it with .to(k.device)."
        )


def _check_bias(bias: Tensor, full: tuple[int, int, int, int], device: torch.device) -> None:
    if not bias.is_floating_point():
        raise InvalidInput(
            f"attend: expected a floating point bias. Got {bias.dtype}; for a boolean mask use 0 and -inf."
        )
    shape = tuple(bias.shape)
    fits = len(shape) <= 4 and all(b in (1, f) for b, f in zip(reversed(shape), reversed(full)))
    if not fits:
        raise InvalidInput(f"attend: expected a bias that broadcasts to (B, H, Nq, Nk) = {full}. Got {shape}.")
    if bias.device != device:
        raise InvalidInput(f"attend: bias is on {bias.device}, q on {device}; move it with .to(q.device).")


def visible_key_lengths(key_padding_mask: Tensor) -> tuple[int, ...]:
    """The number of visible keys of each sample; InvalidInput unless all padding is on the right.

    Example:
        >>> visible_key_lengths(torch.tensor([[False, False, True], [False, False, False]]))
        (2, 3)
    """
    visible = ~key_padding_mask
    lengths = visible.sum(1)
    places = torch.arange(visible.shape[1], device=visible.device)
    if not torch.equal(visible, places < lengths[:, None]):
        raise InvalidInput(
            "attend: padding must be on the right (segments start at position 0), but key_padding_mask is True before "
            "a visible key. Shift left-padded samples to the left, or cut them out with Documents."
        )
    return tuple(lengths.tolist())


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    query_start: int,
    bias: Tensor | None = None,
    score: Score | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs_grad: bool = False,
) -> Problem:
    """A Problem whose queries stand at ``query_start...`` and whose keys stand at ``0...``, from checked inputs."""
    on_meta = q.device.type == "meta"
    lengths = None if key_padding_mask is None or on_meta else visible_key_lengths(key_padding_mask)
    if lengths is not None and all(n == k.shape[1] for n in lengths):
        lengths = None
    return Problem(
        q,
        k,
        v,
        scale=scale,
        query_positions=(Run(query_start, 1, q.shape[1]),),
        key_positions=(Run(0, 1, k.shape[1]),),
        key_lengths=lengths,
        bias=bias,
        score=score,
        dropout_p=dropout_p,
        seed=seed,
        needs_grad=needs_grad,
    )
