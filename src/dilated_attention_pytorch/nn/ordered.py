"""A layer whose tokens are in another order inside than outside."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.positions import Rotation
from dilated_attention_pytorch.orderings.order import Order, known_order

TOKENS = ("query", "key", "value", "src", "x", "input")
PASSED = ("need_weights", "average_attn_weights", "selected")
"""What a layer is told that has no tokens in it, or counts them along the curve anyway."""


class Ordered(nn.Module):
    """A layer, or a whole encoder, that reads its tokens in an order and gives its output back as they came.

    Segments, windows and blocks then count along the curve, so that they cover compact patches of a grid. ``order`` is
    that of every call; with None each call brings its own, as batches of slides do (`Order.batch`). Inputs are (B, N,
    ...), and carried along are ``key_padding_mask``, ``attn_mask``, ``attention_mask``, ``position_ids``, ``rotation``
    and attention weights. Tokens keep the positions that ``position_ids`` give them; without these, positions count
    along the curve, as the pattern does. Padding may be anywhere: padded tokens go last in their sample.

    ``is_causal`` has no meaning on a grid: with ``causal_along_curve`` it means that a token sees the tokens before it
    on the curve, and otherwise it is refused. So are caches, documents, ``query_start``, keys of another length, and
    any other argument that is not None.

    Raises InvalidInput for a layer whose ``forward`` does not name its inputs.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch.nn import MultiheadDilatedAttention
        >>> from dilated_attention_pytorch.orderings import hilbert_order
        >>> layer = MultiheadDilatedAttention(64, 4, dilation_rates=[1, 2], segment_lengths=[32, 64])
        >>> Ordered(layer, hilbert_order((10, 12)))(torch.randn(2, 120, 64)).shape
        torch.Size([2, 120, 64])
    """

    permutation: Tensor | None
    inverse: Tensor | None

    def __init__(self, layer: nn.Module, order: Order | None = None, *, causal_along_curve: bool = False) -> None:
        super().__init__()
        kinds = inspect.signature(layer.forward).parameters.values()
        self._names = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not set(self._names) & set(TOKENS):
            raise InvalidInput(
                f"Ordered: expected a layer whose forward takes one of {TOKENS}. Got {type(layer).__name__}, which "
                f"takes {tuple(self._names)}; give it a forward that names its tokens so."
            )
        _check_order(order)
        self.layer, self.causal_along_curve = layer, causal_along_curve
        # Buffers follow the layer to its device; they are no part of a checkpoint.
        self.register_buffer("permutation", None if order is None else order.permutation, persistent=False)
        self.register_buffer("inverse", None if order is None else order.inverse, persistent=False)

    @property
    def order(self) -> Order | None:
        """The order of calls that bring none."""
        if self.permutation is None or self.inverse is None:
            return None
        return known_order(self.permutation, self.inverse)

    def forward(self, *tokens: Tensor, order: Order | None = None, **options: Any) -> Any:
        """What the layer gives for ``tokens`` in ``order``, each token in its old place; weights on both sides too.

        Raises InvalidInput for what cannot be carried along, without having called the layer.
        """
        _check_order(order)
        chosen = self.order if order is None else order
        if chosen is None:
            raise InvalidInput("Ordered: expected an order, of the layer or of this call. Got none; pass order=.")
        if len(tokens) > len(self._names):
            raise InvalidInput(f"Ordered: expected at most {len(self._names)} unnamed arguments. Got {len(tokens)}.")
        given = dict(zip(self._names, tokens))
        if doubled := given.keys() & options.keys():
            raise InvalidInput(f"Ordered: expected each argument once. Got {sorted(doubled)} both unnamed and named.")
        given.update(options)
        padding = given.get("key_padding_mask")
        if padding is not None:
            chosen = chosen.padding_last(padding)
        result = self.layer(**self._carried(given, chosen))
        if isinstance(result, tuple):
            out, weights = result
            return chosen.undo(out, 1), chosen.undo(chosen.undo(weights, -1), -2)
        return chosen.undo(result, 1)

    def extra_repr(self) -> str:
        """The order and what causal means."""
        return f"order={self.order!r}, causal_along_curve={self.causal_along_curve}"

    def _carried(self, given: Mapping[str, Any], order: Order) -> dict[str, Any]:
        """The arguments in order; a tensor given twice stays one tensor, by which layers know self-attention."""
        carried: dict[str, Any] = {}
        moved: dict[int, Tensor] = {}
        for name, value in given.items():
            try:
                if value is None or name in PASSED:
                    carried[name] = value
                elif name in TOKENS:
                    if id(value) not in moved:
                        moved[id(value)] = order.apply(value, 1)
                    carried[name] = moved[id(value)]
                else:
                    carried[name] = self._carry(name, value, order)
            except InvalidInput as error:
                raise InvalidInput(f"Ordered: {name}: {error}") from error
        return carried

    def _carry(self, name: str, value: Any, order: Order) -> Any:
        if name == "key_padding_mask":
            return order.apply(value, 1)
        if name == "position_ids":
            return order.apply(_per_sample(value, order, 2), -1)
        if name == "rotation":
            return Rotation(*(order.apply(_per_sample(table, order, 4), -3) for table in value))
        if name == "attention_mask":
            return _carry_pairs(_per_sample(value, order, 4), order)
        if name == "attn_mask":
            return self._carry_attn_mask(value, order)
        if name == "is_causal" and (not value or self.causal_along_curve):
            return value
        if name == "is_causal":
            raise InvalidInput(
                "expected False: who is earlier on a grid? Ordered(..., causal_along_curve=True) lets tokens see those "
                "before them on the curve."
            )
        raise InvalidInput("cannot be carried to another order; leave it out, or call the layer itself.")

    def _carry_attn_mask(self, mask: Tensor, order: Order) -> Tensor:
        """A mask (N, N) or (B*H, N, N), as nn.MultiheadAttention takes them."""
        if not order.is_batch:
            return _carry_pairs(mask, order)
        samples = order.permutation.shape[0]
        if mask.dim() == 2:
            heads = int(getattr(self.layer, "num_heads", 1))
            return _carry_pairs(mask.expand(samples, *mask.shape), order).repeat_interleave(heads, 0)
        if mask.dim() != 3 or mask.shape[0] % samples != 0:
            raise InvalidInput(f"expected shape (N, N) or (B*H, N, N) with B = {samples}. Got {tuple(mask.shape)}.")
        return _carry_pairs(mask.unflatten(0, (samples, -1)), order).flatten(0, 1)


def _per_sample(x: Tensor, order: Order, dims: int) -> Tensor:
    """``x`` with a dim of samples in front, of ``dims`` dims in all, when each sample has an order of its own."""
    if not order.is_batch:
        return x
    x = x[(None,) * (dims - x.dim())] if x.dim() < dims else x
    return x.expand(order.permutation.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x


def _carry_pairs(mask: Tensor, order: Order) -> Tensor:
    """A mask over pairs of tokens, (..., N, N), in order on both sides; sides of 1 broadcast and stay."""
    for dim in (-1, -2):
        if mask.dim() >= -dim and mask.shape[dim] != 1:
            mask = order.apply(mask, dim)
    return mask


def _check_order(order: object) -> None:
    if order is not None and not isinstance(order, Order):
        raise InvalidInput(
            f"Ordered: expected an Order, such as hilbert_order(shape), or None. Got {type(order).__name__}."
        )
