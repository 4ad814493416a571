"""Checks by the names of 0.2, for layers and configs of one's own: each raises InvalidInput, which is a ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.nn.base import check_dropout, check_mask_dtype
from dilated_attention_pytorch.nn.multihead import check_heads


class ValidationMixin:
    """Checks that layers and configs share; all are static, and change nothing.

    Example:
        >>> ValidationMixin.validate_head_dim(768, 12)
        64
        >>> ValidationMixin.validate_segment_dilation_match([2048, 4096, 8192], [1, 2])
        Traceback (most recent call last):
        dilated_attention_pytorch.errors.InvalidInput: segment_lengths and dilation_rates must have the same length: \
got 3 and 2
    """

    @staticmethod
    def validate_segment_dilation_match(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> None:
        """There is one rate for each segment length, and at least one of both."""
        if len(segment_lengths) != len(dilation_rates):
            raise InvalidInput(
                "segment_lengths and dilation_rates must have the same length: "
                f"got {len(segment_lengths)} and {len(dilation_rates)}"
            )
        if len(segment_lengths) == 0:
            raise InvalidInput(
                "segment_lengths cannot be empty: give one segment length and one dilation rate at least"
            )

    @staticmethod
    def validate_positive_values(values: Sequence[int | float], name: str) -> None:
        """Every value is a number above 0."""
        for place, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidInput(f"{name}[{place}] must be positive, got {value!r}")

    @staticmethod
    def validate_tensor_shape(tensor: Tensor, expected_dims: int, name: str) -> None:
        """``tensor`` has so many dims."""
        if tensor.dim() != expected_dims:
            raise InvalidInput(
                f"{name} must have {expected_dims} dims, got {tensor.dim()} dims of shape {tuple(tensor.shape)}"
            )

    @staticmethod
    def validate_tensor_shapes_match(
        tensors: Sequence[Tensor], names: Sequence[str], dims_to_check: Sequence[int] | None = None
    ) -> None:
        """All tensors have the shape of the first, or the same sizes in ``dims_to_check``."""
        for tensor, name in zip(tensors[1:], names[1:]):
            first = tensors[0]
            if tensor.dim() != first.dim() or (dims_to_check is None and tensor.shape != first.shape):
                raise InvalidInput(
                    f"{names[0]} and {name} must have the same shape: got {tuple(first.shape)} and "
                    f"{tuple(tensor.shape)}"
                )
            for dim in dims_to_check or ():
                if tensor.shape[dim] != first.shape[dim]:
                    raise InvalidInput(
                        f"{names[0]} and {name} must have the same size in dim {dim}: got {first.shape[dim]} and "
                        f"{tensor.shape[dim]}"
                    )

    @staticmethod
    def validate_sequence_length(seq_len: int, segment_lengths: Sequence[int]) -> None:
        """``seq_len`` is a number of tokens. 0.2 wanted a multiple of the largest segment; now any length is legal."""
        if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
            raise InvalidInput(f"the sequence length must be an int of at least 1 token, got {seq_len!r}")
        if len(segment_lengths) == 0:
            raise InvalidInput("segment_lengths cannot be empty: give one segment length at least")

    @staticmethod
    def validate_device_dtype_consistency(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        """All tensors are on the device of the first, and of its dtype."""
        for tensor, name in zip(tensors[1:], names[1:]):
            for word in ("device", "dtype"):
                first, other = getattr(tensors[0], word), getattr(tensor, word)
                if first != other:
                    raise InvalidInput(
                        f"{names[0]} and {name} must have the same {word}: got {first} and {other}; move one with .to()"
                    )

    @staticmethod
    def validate_batch_first_format(tensor: Tensor, name: str, expected_dims: int = 4) -> None:
        """``tensor`` has so many dims, the batch first: (B, N, H, D) of heads, or (B, N, E) with 3."""
        if tensor.dim() != expected_dims:
            layout = {3: " (B, N, E)", 4: " (B, N, H, D)"}.get(expected_dims, "")
            raise InvalidInput(
                f"{name} must be batch-first with {expected_dims} dims{layout}, got {tensor.dim()} dims of shape "
                f"{tuple(tensor.shape)}"
            )

    @staticmethod
    def validate_attention_mask(
        mask: Tensor | None, batch_size: int, seq_len: int, name: str = "attention_mask", key_len: int | None = None
    ) -> None:
        """``mask`` is None, (Nq, Nk), or (B or 1, H or 1, Nq, Nk), boolean or float; Nk is Nq unless given.

        A mask over pairs, read as `F.scaled_dot_product_attention` does: True takes part, floats are added.
        """
        if mask is None:
            return
        sides = (seq_len, seq_len if key_len is None else key_len)
        fits = mask.dim() in (2, 4) and tuple(mask.shape[-2:]) == sides
        if not fits or (mask.dim() == 4 and mask.shape[0] not in (1, batch_size)):
            raise InvalidInput(
                f"{name} must have shape {sides} or ({batch_size} or 1, heads or 1, {sides[0]}, {sides[1]}), got "
                f"{tuple(mask.shape)}"
            )
        check_mask_dtype(name, mask)

    @staticmethod
    def validate_dropout_prob(dropout: float, name: str = "dropout") -> None:
        """``dropout`` is a probability below 1: with 1 nothing would be left."""
        check_dropout(name, dropout)

    @staticmethod
    def validate_head_dim(embed_dim: int, num_heads: int) -> int:
        """The dim of a head; ``num_heads`` divides ``embed_dim``."""
        return check_heads(embed_dim, num_heads, num_heads)

    @staticmethod
    def validate_num_heads(num_heads: int, num_groups: int) -> None:
        """There is a head for each group: what ``head_groups=True`` needs, which deals heads out among branches."""
        if num_heads < num_groups:
            raise InvalidInput(
                f"num_heads ({num_heads}) must be at least the number of groups ({num_groups}) that heads are dealt to"
            )
