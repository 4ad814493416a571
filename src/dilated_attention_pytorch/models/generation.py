"""Drawing tokens one after another from a language model, with its key-value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.problem import accumulate_dtype

if TYPE_CHECKING:
    from dilated_attention_pytorch.models.longnet import LongNetLM


@torch.no_grad()
def generate_tokens(
    model: LongNetLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Iterable[int] | None = None,
    seed: int | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """What `LongNetLM.generate` says; the model's training mode is as before when it returns or raises."""
    _check_numbers(max_new_tokens, temperature, top_k, top_p, seed)
    if not isinstance(prompt, Tensor):
        raise InvalidInput(
            f"expected the prompt to be a tensor of tokens. Got {type(prompt).__name__}; torch.tensor it."
        )
    if prompt.dim() not in (1, 2) or prompt.shape[-1] == 0 or prompt.shape[0] == 0:
        raise InvalidInput(
            f"expected a prompt of shape (N,) or (B, N) with at least one token. Got {tuple(prompt.shape)}."
        )
    rows = prompt if prompt.dim() == 2 else prompt[None]
    stop_tokens = torch.tensor(_stop_list(stop, model.config.num_tokens), dtype=rows.dtype, device=rows.device)
    generator = torch.Generator(rows.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        cache, fresh = model.new_cache(), rows
        drawn: list[Tensor] = []
        ended = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
        for _ in range(max_new_tokens):
            logits = model.logits(model.hidden(fresh, cache=cache)[:, -1])  # (B, num_tokens)
            token = choose_token(logits, temperature, top_k, top_p, generator).to(rows.dtype)
            token = torch.where(ended, drawn[-1], token) if drawn else token
            drawn.append(token)
            if stream is not None:
                stream(token)
            ended |= torch.isin(token, stop_tokens)
            if len(stop_tokens) and bool(ended.all()):
                break
            fresh = token[:, None]
    finally:
        model.train(was_training)
    whole = torch.cat((rows, *(token[:, None] for token in drawn)), 1)
    return whole if prompt.dim() == 2 else whole[0]


def choose_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token (B,) from each row of ``logits (B, V)``; see `LongNetLM.generate` for the options.

    Example:
        >>> choose_token(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0.0, top_k=None, top_p=None)
        tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    # The peak first: logits / temperature alone overflow when the temperature is tiny.
    logits = logits.to(accumulate_dtype(logits.dtype))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = _keep(logits, torch.arange(logits.shape[-1], device=logits.device) < top_k)
    if top_p is not None:
        ordered = logits.sort(dim=-1, descending=True, stable=True).values.softmax(-1)
        logits = _keep(logits, ordered.cumsum(-1) - ordered < top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _keep(logits: Tensor, ranks: Tensor) -> Tensor:
    """``logits`` with -inf wherever a token's rank, by falling logit, is not one of ``ranks`` (V,) or (B, V)."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ranks.expand_as(logits))
    return logits.masked_fill(~keep, -torch.inf)


def _check_numbers(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise InvalidInput(f"expected max_new_tokens to be an int of at least 0. Got {max_new_tokens!r}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidInput(f"expected a temperature from 0 (the likeliest token) up. Got {temperature}.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InvalidInput(f"expected top_k to be an int of at least 1, or None. Got {top_k!r}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InvalidInput(f"expected top_p in (0, 1], or None. Got {top_p}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
        raise InvalidInput(f"expected seed to be an int from 0 to 2^63 - 1, or None. Got {seed!r}.")


def _stop_list(stop: int | Iterable[int] | None, num_tokens: int) -> list[int]:
    tokens = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < num_tokens:
            raise InvalidInput(f"expected stop tokens from 0 to {num_tokens - 1}. Got {token!r}.")
    return tokens
