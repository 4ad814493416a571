"""How much useful work a problem is: counted pairs, FLOPs, and the formulas that FlopCounterMode counts with.

A pair costs ``2 (D + Dv)`` FLOPs forward, as often as it is seen, and 2.5 times that backward.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from dilated_attention_pytorch.patterns import Pattern, pattern_from_text
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan, Plan, TilePlan, candidate_plans
from dilated_attention_pytorch.plans.pairs import closed_form_pairs
from dilated_attention_pytorch.problem import Problem, make_problem

EXACT_PAIRS = 1 << 26
"""Up to so many pairs a pattern without closed form is counted pair by pair.

Above, and where q has no values, one with tables is counted by its tiles; else the number of all pairs is a bound."""

COUNTER = "torch.utils.flop_counter"


def counted_pairs(pattern: Pattern, problem: Problem, plans: Sequence[Plan] = ()) -> tuple[int, bool]:
    """Query-key pairs over samples and heads, each as often as it is seen; and whether that is exact or a bound.

    ``plans`` may hold the problem's plans, which are made otherwise.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> x = torch.empty(2, 1000, 4, 8, device="meta")
        >>> counted_pairs(Causal(), make_problem(x, x, x, scale=1.0, query_start=0))
        (4004000, True)
    """
    p = problem
    every = p.batch * p.num_heads * p.query_length * p.key_length
    if any(_is_shape_only(table) for table in pattern.tables):
        return every, False
    closed = closed_form_pairs(pattern, p)
    if closed is not None:
        return closed[0], True
    if every <= EXACT_PAIRS and not _is_shape_only(p.q):
        return int(DensePlan(pattern).expand(p).sum()), True
    known = (plans or candidate_plans(pattern, p)) if pattern.tables else ()
    for plan in known:
        held = plan.tiles if isinstance(plan, OrderedPlan) else plan
        if isinstance(held, TilePlan) and isinstance(plan, OrderedPlan | TilePlan):
            return plan.counted_pairs(p), True
    return every, False


def forward_flops(pairs: int, head_dim: int, value_dim: int) -> int:
    """``2 (D + Dv)`` for each pair."""
    return 2 * (head_dim + value_dim) * pairs


def backward_flops(pairs: int, head_dim: int, value_dim: int) -> int:
    """2.5 times the forward pass: five matrix products for two."""
    return forward_flops(pairs, head_dim, value_dim) * 5 // 2


def attend_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    tables: Sequence[Tensor],
    score_tables: Sequence[Tensor],
    pattern: str,
    score: str,
    scale: float,
    dropout_p: float,
    query_start: int,
    *_: Any,
    **__: Any,
) -> int:
    """The useful FLOPs of the operator `attend`, from its arguments.

    Fake and meta tensors give the figure of their shapes: that without a padding mask, and every pair where the
    pattern reads tables whose values are unknown.
    """
    return forward_flops(_pairs(q, k, v, key_padding_mask, tables, pattern, query_start), *_dims(q, v))


def attend_backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    tables: Sequence[Tensor],
    score_tables: Sequence[Tensor],
    pattern: str,
    score: str,
    scale: float,
    dropout_p: float,
    query_start: int,
    *_: Any,
    **__: Any,
) -> int:
    """The useful FLOPs of the operator `attend_backward`, from its arguments."""
    return backward_flops(_pairs(q, k, v, key_padding_mask, tables, pattern, query_start), *_dims(q, v))


def _pairs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tables: Sequence[Tensor], text: str, query_start: int
) -> int:
    with unset_fake_temporarily():  # tables of a pattern may be real where the problem is not
        if _is_shape_only(q):
            q, k, v = (torch.empty([_number(n) for n in x.shape], dtype=x.dtype, device="meta") for x in (q, k, v))
            mask = None
        start = _number(query_start)
        problem = make_problem(q, k, v, scale=1.0, query_start=start, key_padding_mask=mask)
        return counted_pairs(pattern_from_text(text, tables), problem)[0]


def _dims(q: Tensor, v: Tensor) -> tuple[int, int]:
    return _number(q.shape[3]), _number(v.shape[3])


def _is_shape_only(x: Tensor) -> bool:
    return x.is_meta or is_fake(x)


def _number(n: int | torch.SymInt) -> int:
    """A length as an int; for a symbolic one the example it stands for, without fixing it. 0 where there is none."""
    if isinstance(n, torch.SymInt):
        return int(n.node.hint) if n.node.has_hint() else 0
    return n


Formula = Callable[..., int]


def register_formulas(formulas: dict[Any, Formula]) -> None:
    """FlopCounterMode counts these operators with these formulas, from when its module is imported on.

    That module brings Triton where there is one, half a second of import that few programs need: so it is awaited.
    """
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER], formulas)
    else:
        sys.meta_path.insert(0, _Awaiting(formulas))


def _register(counter: ModuleType, formulas: dict[Any, Formula]) -> None:
    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator, get_raw=True)(formula)


@dataclass(frozen=True, eq=False)
class _Awaiting(MetaPathFinder):
    """Leaves `sys.meta_path` when the counter's module is looked for, and registers once it has run."""

    formulas: dict[Any, Formula]

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module, self.formulas)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
