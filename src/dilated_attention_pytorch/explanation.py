"""What would be done for a problem, and why: plan, work, bytes, and each backend's reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends import BACKENDS, Backend, check_backend_name, needs_tiles, reasons, select
from dilated_attention_pytorch.backends.tuning import Choice, key_of, ranking
from dilated_attention_pytorch.compat import NO_COMPAT, TorchscaleCompat
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.flops import counted_pairs, forward_flops
from dilated_attention_pytorch.patterns import Pattern
from dilated_attention_pytorch.plans import Plan, TilePlan, candidate_plans
from dilated_attention_pytorch.problem import Problem, check_inputs, make_problem
from dilated_attention_pytorch.scores import Score

TILED_PAIRS = 1 << 21
"""Up to so many pairs tables of tiles are made only to ask a backend for its reasons."""


@dataclass(frozen=True)
class Explanation:
    """What `attend` would do. ``str()`` gives the text.

    ``pairs`` are counted pairs over samples and heads, a pair as often as it is seen; ``forward_flops`` is
    ``2 (D + Dv)`` for each, ``backward_flops`` 2.5 times that; ``bytes_moved`` reads q, k, v and writes out, lse once.
    ``backends`` holds each backend's reasons against, empty when it can; ``chosen`` is None when none can; ``because``
    says what the choice goes by.
    """

    problem: str
    plans: tuple[str, ...]
    chosen: str | None
    chosen_plan: str | None
    pairs: int
    pairs_are_exact: bool
    forward_flops: int
    bytes_moved: int
    backends: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    because: str = ""

    @property
    def backward_flops(self) -> int:
        """Floating point operations of the backward pass."""
        return self.forward_flops * 5 // 2

    def __str__(self) -> str:
        bound = "" if self.pairs_are_exact else " at most (the pattern has no closed form)"
        lines = [
            f"problem   {self.problem}",
            f"backend   {self.chosen or 'none'}" + (f", walking {self.chosen_plan}" if self.chosen_plan else ""),
            *([f"because   {self.because}"] if self.because else []),
            *(f"plan      {plan}" for plan in self.plans),
            f"pairs     {self.pairs:,}{bound}",
            f"FLOPs     {self.forward_flops:.3e} forward, {self.backward_flops:.3e} backward",
            f"bytes     {self.bytes_moved / 2**20:,.1f} MiB at least, forward",
        ]
        width = max(9, *(len(name) for name in self.backends))
        for name, against in self.backends.items():
            lines.append(f"{name:<{width}} " + ("ok" if not against else "no: " + "; ".join(against)))
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    score: Score | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: int | None = None,
    compat: TorchscaleCompat | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Explanation:
    """What `attend` would do with the same arguments; computes nothing and takes meta tensors too.

    Raises InvalidInput as `attend` does. On meta a padding mask cannot be read: the plan is then that without one.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import longnet
        >>> x = torch.empty(1, 1_000_000, 12, 64, device="meta")
        >>> explain(x, x, x, longnet([2048, 32768], [1, 12])).forward_flops
        6982182479872
    """
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"explain: expected a pattern such as Causal(). Got {type(pattern).__name__}.")
    given: dict[str, Any] = {"bias": bias, "score": score, "key_padding_mask": key_padding_mask, "dropout_p": dropout_p}
    scale, start = check_inputs(q, k, v, scale=scale, query_start=query_start, **given)
    check_backend_name(backend)
    notes = []
    if compat is not None and compat != NO_COMPAT:
        compat.check(pattern, key_padding_mask, score, dropout_p)
        notes.append(f"reproduces torchscale: {compat}")
    if key_padding_mask is not None and q.device.type == "meta":
        notes.append("the padding mask's values are unknown on meta; the plan is that without a mask")
    wanted = (x for x in (q, k, v, bias) if x is not None)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    problem = make_problem(q, k, v, scale=scale, query_start=start, needs_grad=needs_grad, **given)
    pattern.check(problem)
    plans = candidate_plans(pattern, problem, needs_tiles(backend))
    against = {b.name: _reasons(b, problem, plans) for b in BACKENDS}
    chosen, plan, because = _chosen(problem, plans, backend)
    pairs, exact = counted_pairs(pattern, problem, plans)
    size = sum(x.numel() * x.element_size() for x in (q, k, v))
    out_size = q.numel() // q.shape[3] * (v.shape[3] * q.element_size() + problem.accumulate_dtype.itemsize)
    return Explanation(
        problem=f"B {q.shape[0]}, Nq {q.shape[1]}, Nk {k.shape[1]}, H {q.shape[2]}, Hkv {k.shape[2]}, D {q.shape[3]}, "
        f"Dv {v.shape[3]}, {str(q.dtype).removeprefix('torch.')} on {q.device}, {pattern.text()}",
        plans=tuple(p.describe(problem) for p in plans),
        chosen=chosen,
        chosen_plan=None if plan is None else plan.describe(problem).partition(":")[0],
        pairs=pairs,
        pairs_are_exact=exact,
        forward_flops=forward_flops(pairs, q.shape[3], v.shape[3]),
        bytes_moved=size + out_size,
        backends=against,
        notes=tuple(notes),
        because=because,
    )


def _reasons(backend: Backend, problem: Problem, plans: tuple[Plan, ...]) -> tuple[str, ...]:
    """What stands against a backend, tables of tiles made for it where that costs little."""
    if needs_tiles(backend.name) and backend.import_error() is None and not any(isinstance(p, TilePlan) for p in plans):
        pairs = problem.batch * problem.num_heads * problem.query_length * problem.key_length
        if pairs > TILED_PAIRS or problem.q.device.type == "meta":
            return (f"its tables of tiles are made when it is asked for by name: backend={backend.name!r}",)
        plans = candidate_plans(plans[0].pattern, problem, tiles=True)
    return tuple(reasons(backend, problem, plans)[1])


def _chosen(problem: Problem, plans: tuple[Plan, ...], name: str) -> tuple[str | None, Plan | None, str]:
    """The backend's name and plan, None when none can, and what the choice goes by."""
    try:
        backend, plan = select(problem, plans, name)
    except NoBackend:
        return None, None, ""
    measured, table = ranking(problem, plans, BACKENDS)
    choice = Choice(backend.name, plan.kind, backend.options)
    rank = next((m for m in measured if m.choice == choice), None)
    if rank is None or table is None:
        unmeasured = "nothing like it was measured" if not measured else "what was measured as faster cannot do it"
        return backend.name, plan, f"{unmeasured}; the first in order that can ('dilated-attention tune' measures)"
    return backend.name, plan, f"{choice} is the fastest measured for {key_of(problem, plans)} (table {table.source})"
