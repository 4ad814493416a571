"""The meeting point: two pure functions on problems, the operators that PyTorch sees, and `attend` on top.

`forward` and `backward` pick a plan and a backend and add what torchscale compatibility asks for. The operators take
tensors and texts only, so that they trace, export and differentiate like PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.backends import Gradients, check_backend_name, needs_tiles, select
from dilated_attention_pytorch.compat import NO_COMPAT, TorchscaleCompat, appended_rows, branch_patterns
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.flops import attend_backward_flops, attend_flops, register_formulas
from dilated_attention_pytorch.merging import merge
from dilated_attention_pytorch.patterns import Causal, Pattern, longnet, pattern_from_text
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import (
    Problem,
    accumulate_dtype,
    check_inputs,
    make_problem,
    positions_tensor,
)
from dilated_attention_pytorch.scores import Score, score_from_text


def attend(
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
) -> Any:
    """Attention in which ``pattern`` says how often each query sees each key; exact, with exact gradients.

    ``q (B, Nq, H, D)``, ``k (B, Nk, Hkv, D)``, ``v (B, Nk, Hkv, Dv)``; query head h reads kv head ``h // (H / Hkv)``.
    Returns out (B, Nq, H, Dv), or with ``return_lse`` (out, lse (B, H, Nq)): the natural log of the softmax denominator
    in float32 (float64 for float64), differentiable too. A row that sees no key has out 0, lse -inf, gradients 0.

    Args:
        scale: factor on ``<q, k>``; None means ``1 / sqrt(D)``.
        bias: float tensor that broadcasts to (B, H, Nq, Nk), added to the logits; for short lengths. May hold -inf.
        score: a rule of `dilated_attention_pytorch.scores` (Relative, Softcap), applied before the bias.
        key_padding_mask: bool (B, Nk), True = padding, on the right.
        dropout_p: probability of dropping a pair; the seed comes from torch's generator.
        query_start: position of the first query; None means the queries are the last rows of the keys.
        compat: reproduce torchscale's departures from the definition.
        backend: "auto", or the name of one, which then raises NoBackend with its reasons when it cannot.

    Raises InvalidInput for anything that is not a legal problem, and changes nothing then.

    Example:
        >>> q = torch.randn(1, 100, 4, 8)
        >>> out, lse = attend(q, q, q, longnet([16, 64], [1, 4]) & Causal(), return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 100, 4, 8]), torch.Size([1, 4, 100]))
    """
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"attend: expected a pattern such as Causal(). Got {type(pattern).__name__}.")
    scale, start = check_inputs(
        q,
        k,
        v,
        scale=scale,
        bias=bias,
        score=score,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        query_start=query_start,
    )
    check_backend_name(backend)
    compat = NO_COMPAT if compat is None else compat
    if compat != NO_COMPAT:
        compat.check(pattern, key_padding_mask, score, dropout_p)
    q, k, v = autocast_inputs(q, k, v)
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(q, k, v)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(0, 2**62, (1,), device=q.device)
    wanted = (q, k, v) if bias is None else (q, k, v, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    out, lse = torch.ops.dilated_attention_pytorch.attend(
        q,
        k,
        v,
        bias,
        key_padding_mask,
        seed,
        list(pattern.tables),
        [] if score is None else list(score.tables),
        pattern.text(),
        "" if score is None else score.text,
        scale,
        dropout_p,
        start,
        compat.zero_keys,
        compat.detach_mixing,
        backend,
        needs_grad,
    )
    return (out, lse) if return_lse else out


def longnet_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    head_offset: str = "modulo",
    head_groups: bool = False,
    **options: Any,
) -> Any:
    """LongNet's dilated attention (arXiv 2307.02486): `attend` with `longnet(...)`, causal on request.

    ``head_offset`` is "modulo" (the paper) or "torchscale"; ``head_groups`` deals the heads out among the branches as
    versions 0.1 and 0.2 did. Further keywords and the result are those of `attend`.

    Example:
        >>> x = torch.randn(2, 50, 2, 8)
        >>> longnet_attention(x, x, x, [8, 32], [1, 2], is_causal=True).shape
        torch.Size([2, 50, 2, 8])
    """
    pattern = longnet(segment_lengths, dilation_rates, head_offset=head_offset, head_groups=head_groups)
    return attend(q, k, v, pattern & Causal() if is_causal else pattern, **options)


def forward(
    problem: Problem, pattern: Pattern, *, compat: TorchscaleCompat = NO_COMPAT, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem; pure. Out is in q's dtype, of a partial problem in that of lse."""
    pattern.check(problem)
    if problem.q.numel() == 0 or problem.v.numel() == 0:
        return _nothing_seen(problem)
    chosen, plan = select(problem, candidate_plans(pattern, problem, needs_tiles(backend)), backend)
    with torch.profiler.record_function(f"dilated_attention_pytorch::{chosen.name}::forward"):
        out, lse = chosen.forward(problem, plan)
    if compat.zero_keys:
        out, lse = _append_zero_keys(problem, pattern, out, lse)
    return out, lse


def backward(
    problem: Problem,
    pattern: Pattern,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    compat: TorchscaleCompat = NO_COMPAT,
    backend: str = "auto",
) -> Gradients:
    """The gradients of the pattern's pairs, given the global out and lse; pure.

    ``out`` may be in the accumulate dtype: rounded to a half type it costs dq and dk up to a rounding of their own.
    """
    if problem.q.numel() == 0 or problem.v.numel() == 0:
        leaves = (problem.q, problem.k, problem.v)
        dq, dk, dv = (torch.zeros(x.shape, dtype=problem.result_dtype, device=x.device) for x in leaves)
        return Gradients(dq, dk, dv, None if problem.bias is None else torch.zeros_like(problem.bias))
    if not compat.detach_mixing:
        chosen, plan = select(problem, candidate_plans(pattern, problem, needs_tiles(backend)), backend)
        with torch.profiler.record_function(f"dilated_attention_pytorch::{chosen.name}::backward"):
            return chosen.backward(problem, plan, dout, dlse, out, lse)
    if dlse is not None:
        raise InvalidInput("TorchscaleCompat: detach_mixing gives no gradient of lse; do not differentiate lse.")
    total: Gradients | None = None
    for branch in branch_patterns(pattern):  # each branch with its own out, weighted by the global lse
        branch_out, _ = forward(problem, branch, compat=TorchscaleCompat(compat.zero_keys), backend=backend)
        share = backward(problem, branch, dout, None, branch_out, lse, backend=backend)
        total = share if total is None else total.plus(share)
    assert total is not None
    return total


def _nothing_seen(problem: Problem) -> tuple[Tensor, Tensor]:
    p = problem
    out = p.q.new_zeros((p.batch, p.query_length, p.num_heads, p.v.shape[3]), dtype=p.result_dtype)
    lse = p.q.new_full((p.batch, p.num_heads, p.query_length), -torch.inf, dtype=p.accumulate_dtype)
    return out, lse


def _append_zero_keys(problem: Problem, pattern: Pattern, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge with a part that has value 0 and the log of the number of appended rows as its lse."""
    device = out.device
    head = torch.arange(problem.num_heads, device=device).view(-1, 1, 1)
    q = positions_tensor(problem.query_positions, device).view(-1, 1)
    rows = torch.zeros((), dtype=torch.int64, device=device)
    for branch in branch_patterns(pattern):
        rows = rows + appended_rows(branch, head, problem.num_heads, q, problem.key_length)
    appended = rows[..., 0].to(lse.dtype).log().expand(lse.shape)
    return merge((out, lse), (torch.zeros_like(out), appended))


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts scaled_dot_product_attention's inputs: everything but float64 to the autocast dtype."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _refuse_forward_mode(*tensors: Tensor) -> None:
    for x in tensors:
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "attend has no forward-mode derivative (jvp); use torch.autograd.grad, or reference_attention."
            )


_SIGNATURE = (
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_padding_mask, Tensor? seed, Tensor[] tables, "
    "Tensor[] score_tables, str pattern, str score, float scale, float dropout_p, SymInt query_start, bool zero_keys, "
    "bool detach_mixing, str backend, bool needs_grad) -> (Tensor, Tensor)"  # autograd hides grad mode from operators
)
_BACKWARD_SIGNATURE = _SIGNATURE.replace(
    "(Tensor q,", "(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q,"
).replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor, Tensor)")
_Arguments = tuple[Any, ...]


def _read(arguments: _Arguments) -> tuple[Problem, Pattern, TorchscaleCompat, str]:
    (
        q,
        k,
        v,
        bias,
        mask,
        seed,
        tables,
        score_tables,
        pattern,
        score,
        scale,
        dropout_p,
        start,
        zero,
        detach,
        backend,
        needs_grad,
    ) = arguments
    problem = make_problem(
        q,
        k,
        v,
        scale=scale,
        query_start=start,
        bias=bias,
        score=score_from_text(score, score_tables),
        key_padding_mask=mask,
        dropout_p=dropout_p,
        seed=seed,
        needs_grad=needs_grad,
    )
    return problem, pattern_from_text(pattern, tables), TorchscaleCompat(zero, detach), backend


@torch.library.custom_op("dilated_attention_pytorch::attend", mutates_args=(), schema=_SIGNATURE)
def _attend_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, pattern, compat, backend = _read(arguments)
    return forward(problem, pattern, compat=compat, backend=backend)


@torch.library.custom_op("dilated_attention_pytorch::attend_backward", mutates_args=(), schema=_BACKWARD_SIGNATURE)
def _backward_op(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, pattern, compat, backend = _read((*arguments[:-1], True))
    grads = backward(problem, pattern, dout, dlse, out, lse, compat=compat, backend=backend)
    dbias = grads.bias if grads.bias is not None and problem.bias is not None else out.new_empty(0)
    return grads.q, grads.k, grads.v, dbias if problem.bias is None else dbias.to(problem.bias.dtype)


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, n, h, _d = q.shape
    return q.new_empty((b, n, h, v.shape[3])), q.new_empty((b, h, n), dtype=accumulate_dtype(q.dtype))


@_backward_op.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias: Tensor | None = rest[0]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        out.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup(ctx: Any, inputs: _Arguments, output: tuple[Tensor, Tensor]) -> None:
    tensors, tables, score_tables, rest = inputs[:6], inputs[6], inputs[7], inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, *tables, *score_tables)
    ctx.num_tables, ctx.rest = len(tables), rest


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, mask, seed, out, lse, *tables = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    tables, score_tables = tables[: ctx.num_tables], tables[ctx.num_tables :]
    grads = torch.ops.dilated_attention_pytorch.attend_backward(
        dout, dlse, out, lse, q, k, v, bias, mask, seed, tables, score_tables, *ctx.rest
    )
    dbias = grads[3] if bias is not None and ctx.needs_input_grad[3] else None
    return (*grads[:3], dbias, None, None, [None] * len(tables), [None] * len(score_tables), *[None] * len(ctx.rest))


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "attend has no second derivative; use reference_attention, which autograd can differentiate twice."
    )


def _no_vmap(info: Any, in_dims: Any, *_: Any, **__: Any) -> None:
    raise NotImplementedError("attend has no vmap rule; fold the mapped dim into the batch dim of q, k and v.")


_attend_op.register_autograd(_differentiate, setup_context=_setup)
_backward_op.register_autograd(_no_second_derivative)
_attend_op.register_vmap(_no_vmap)
_backward_op.register_vmap(_no_vmap)
register_formulas(
    {
        torch.ops.dilated_attention_pytorch.attend: attend_flops,
        torch.ops.dilated_attention_pytorch.attend_backward: attend_backward_flops,
    }
)
