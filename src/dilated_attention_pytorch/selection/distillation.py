"""Training of a gate: its softmax over blocks comes near to the pooled mass of full attention (arXiv 2410.13276)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns import Full, Pattern
from dilated_attention_pytorch.selection.blocks import blocks_problem
from dilated_attention_pytorch.selection.gate import Gate
from dilated_attention_pytorch.selection.mass import block_mass
from dilated_attention_pytorch.selection.reading import query_blocks


def gate_loss(logits: Tensor, mass: Tensor, open_blocks: Tensor) -> Tensor:
    """The mean over blocks of queries of ``KL(mass || softmax(logits))`` over the open blocks, in nats; a scalar.

    ``logits`` and ``mass`` are (B, H, Q, K), as a gate and `block_mass` give them; ``open_blocks`` broadcasts to them.
    The mass is normalised over the open blocks and is a constant; blocks of queries whose open blocks hold none do not
    count, and the loss is 0 where none is left. This is the loss of SeerAttention (arXiv 2410.13276).

    Example:
        >>> mass = torch.tensor([[[[0.75, 0.25]]]])
        >>> every = torch.ones(1, 1, 1, 2, dtype=torch.bool)
        >>> [round(gate_loss(x, mass, every).item(), 4) for x in (torch.zeros(1, 1, 1, 2), mass)]
        [0.1308, 0.0367]
    """
    if logits.shape != mass.shape:
        raise InvalidInput(
            f"gate_loss: expected logits and mass of one shape (B, H, Q, K). Got {tuple(logits.shape)} and "
            f"{tuple(mass.shape)}; take block_mass with the gate's block_size, and the rows of its query blocks."
        )
    target = mass.detach().masked_fill(~open_blocks, 0.0)
    total = target.sum(-1, keepdim=True)
    counted = total > 0
    target = target / total.where(counted, 1.0)
    lowest = torch.finfo(logits.dtype).min  # not -inf, whose gradient is NaN where nothing is open
    found = logits.masked_fill(~open_blocks, lowest).log_softmax(-1)
    divergence = (torch.special.xlogy(target, target) - target * found).sum(-1)
    mean: Tensor = (divergence * counted[..., 0]).sum() / counted.sum().clamp(min=1)
    return mean


def distil(
    gate: Gate,
    batches: Iterable[tuple[Tensor, ...]],
    pattern: Pattern | None = None,
    *,
    block_size: int = 128,
    lookahead: bool = False,
    scale: float | None = None,
    learning_rate: float = 1e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """The gate is trained in place, one step of Adam for each batch; the loss of every step, in nats.

    A batch is ``(q, k)`` or ``(q, k, key_padding_mask)`` of the layer that the gate is for, as `attend` takes them; no
    gradient reaches them. The gate reads what a `Selector` with this ``block_size`` and ``lookahead`` lets it read, and
    learns the pooled mass of attention under ``pattern`` (default: Full), which costs about half a full attention per
    step. ``on_step`` is called with the number of steps done and the last loss.

    Raises InvalidInput for a learning_rate that is not positive, and for batches that `attend` would refuse;
    FloatingPointError when the loss is not finite, before it reaches the gate.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> batch = (torch.randn(1, 64, 2, 4), torch.randn(1, 64, 2, 4))
        >>> losses = distil(Gate(2, 4), [batch] * 20, block_size=8, learning_rate=0.01)
        >>> len(losses), losses[-1] < losses[0]
        (20, True)
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InvalidInput(f"distil: expected a learning_rate above 0. Got {learning_rate!r}.")
    pattern = Full() if pattern is None else pattern
    optimizer = torch.optim.Adam(gate.parameters(), lr=learning_rate)
    losses: list[float] = []
    for batch in batches:
        if len(batch) not in (2, 3):
            raise InvalidInput(f"distil: expected batches (q, k) or (q, k, key_padding_mask). Got {len(batch)} items.")
        loss = _loss(gate, batch, pattern, block_size, lookahead, scale)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"distil: the loss of step {len(losses)} is {losses[-1]}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(len(losses), losses[-1])
    return losses


@torch.enable_grad()
def _loss(
    gate: Gate, batch: tuple[Tensor, ...], pattern: Pattern, block_size: int, lookahead: bool, scale: float | None
) -> Tensor:
    q, k = (x.detach() for x in batch[:2])
    mask = batch[2] if len(batch) == 3 else None
    mass = block_mass(q, k, pattern, block_size, key_padding_mask=mask, scale=scale)
    problem = blocks_problem(q, k, pattern, key_padding_mask=mask, scale=scale)
    blocks = query_blocks(problem, pattern, block_size, lookahead=lookahead)
    return gate_loss(gate(blocks), mass[:, :, blocks.first_block :], blocks.open_blocks)
