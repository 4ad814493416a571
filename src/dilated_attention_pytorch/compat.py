"""torchscale's departures from the definition, for its weights and training runs only.

torchscale detaches the weights with which branches are mixed (dq and dk come out about a fifth wrong), and appends
zero keys that non-causal queries attend to: the last segment is filled up to its length, each segment to a multiple of
the rate. Either can be reproduced; neither is a default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.base import And, Branch, Pattern, Sum
from dilated_attention_pytorch.patterns.dilated import Dilated
from dilated_attention_pytorch.patterns.heads import SomeHeads
from dilated_attention_pytorch.patterns.simple import Causal, Full


@dataclass(frozen=True)
class TorchscaleCompat:
    """Which of torchscale's departures `attend` reproduces. It raises for patterns other than LongNet's.

    ``zero_keys``: appended zero keys (logit 0, value 0) count in the softmax denominators of non-causal rows.
    ``detach_mixing``: no gradient flows through the branch weights; a gradient of lse raises.

    Example:
        >>> TorchscaleCompat(zero_keys=True)
        TorchscaleCompat(zero_keys=True, detach_mixing=False)
    """

    zero_keys: bool = False
    detach_mixing: bool = False

    def check(self, pattern: Pattern, key_padding_mask: Tensor | None, score: object, dropout_p: float) -> None:
        """Raise InvalidInput unless this pattern and these options exist in torchscale."""
        branch_patterns(pattern)
        if self.zero_keys and key_padding_mask is not None:
            raise InvalidInput("TorchscaleCompat: zero_keys has no meaning with key_padding_mask; drop one of them.")
        if self.zero_keys and score is not None:
            raise InvalidInput("TorchscaleCompat: zero_keys has no meaning with a score rule; drop one of them.")
        if self.detach_mixing and dropout_p > 0:
            raise InvalidInput("TorchscaleCompat: detach_mixing is not defined with dropout; set dropout_p=0.")


NO_COMPAT = TorchscaleCompat()


def branch_patterns(pattern: Pattern) -> list[Pattern]:
    """The patterns of LongNet's branches one by one, causal where the whole is; InvalidInput for any other pattern.

    Example:
        >>> [p.text() for p in branch_patterns(Dilated(4, 1) & Causal())]
        ["(Dilated(segment_length=4, dilation_rate=1, head_offset='modulo', heads=None) & Causal())"]
    """
    if isinstance(pattern, Sum):
        return branch_patterns(pattern.left) + branch_patterns(pattern.right)
    if isinstance(pattern, And) and isinstance(pattern.right, Causal | Full):
        return [p & pattern.right for p in branch_patterns(pattern.left)]
    if isinstance(pattern, And) and isinstance(pattern.left, Causal | Full):
        return [p & pattern.left for p in branch_patterns(pattern.right)]
    if isinstance(pattern, Dilated):
        return [pattern]
    if isinstance(pattern, SomeHeads):
        return [SomeHeads(p, pattern.first, pattern.total) for p in branch_patterns(pattern.inner)]
    raise InvalidInput(
        "TorchscaleCompat: expected longnet(...), optionally & Causal(), since other patterns do not exist in "
        f"torchscale. Got {pattern.text()}; drop compat=."
    )


def appended_rows(pattern: Pattern, head: Tensor, num_heads: int, q: Tensor, total: int) -> Tensor:
    """How many zero rows torchscale appends on a row's grid in its segment, for one pattern of `branch_patterns`.

    ``q`` are positions, ``total`` the number of keys; the result broadcasts ``head`` and ``q``, int64.
    """
    branches = pattern.branches()
    assert branches is not None
    return sum((_appended(b, head, num_heads, q, total) for b in branches), torch.zeros_like(q + head))


def _appended(branch: Branch, head: Tensor, num_heads: int, q: Tensor, total: int) -> Tensor:
    if branch.is_causal or branch.segment_length is None:
        return torch.zeros_like(q + head)
    w, r = min(branch.segment_length, total), branch.dilation_rate
    place = torch.as_tensor(branch.offset(head, num_heads), device=q.device)
    first, last = branch.head_range(num_heads)
    start = q // w * w
    real = ((total - start).clamp(max=w) - place + r - 1).clamp(min=0) // r
    on_grid = ((q - start) % r == place) & (head >= first) & (head < last)
    return (-(-w // r) - real) * on_grid
