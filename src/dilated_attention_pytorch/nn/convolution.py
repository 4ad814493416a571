"""A short causal convolution, with which a row knows the rows just before it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Documents


class ShortConvolution(nn.Module):
    """``y_t = sum_k taps_k * x_(t-k)``, channel by channel, over the row itself and the ``width - 1`` rows before it.

    Attention over rows that carry their neighbours can look for what followed the same few rows earlier: one layer then
    does what takes two without (induction heads, arXiv 2209.11895; token shift, arXiv 2305.13048). The row's own taps
    start at 1, the others normal with deviation ``1 / sqrt(width)``, so that each distance has a code of its own.

    Raises InvalidInput for a width below 1.

    Example:
        >>> convolution = ShortConvolution(4, width=3)
        >>> convolution(torch.randn(2, 10, 4)).shape
        torch.Size([2, 10, 4])
    """

    def __init__(
        self, d_model: int, width: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if width < 1:
            raise InvalidInput(f"ShortConvolution: expected a width of at least 1. Got {width}.")
        self.width = width
        self.taps = nn.Parameter(torch.empty(width, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps anew."""
        nn.init.normal_(self.taps, std=1 / math.sqrt(self.width))
        with torch.no_grad():
            self.taps[0] = 1

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """Rows (B, N, d_model); before the first row, and before each document's first, stand zeros."""
        place = None
        if documents is not None:
            place = documents.locate(torch.arange(x.shape[1], device=x.device))[1].view(-1, x.shape[1], 1)
        y = x * self.taps[0]
        for k in range(1, min(self.width, x.shape[1])):
            shifted = F.pad(x[:, :-k], (0, 0, k, 0))
            if place is not None:
                shifted = shifted * (place >= k)
            y = y + shifted * self.taps[k]
        return y

    def over(self, near: Callable[[int], Tensor], place: Tensor) -> Tensor:
        """The same rows (B, n, d_model) where neighbours lie elsewhere: ``near(k)`` gives what stands k rows before.

        ``place`` (n,) or (B, n) is each row's number in its document, or in the sequence; what ``near`` gives before a
        first row is not used.
        """
        y = near(0) * self.taps[0]
        for k in range(1, self.width):
            y = y + near(k) * (place >= k).unsqueeze(-1) * self.taps[k]
        return y

    def extra_repr(self) -> str:
        """The width."""
        return f"width={self.width}"
