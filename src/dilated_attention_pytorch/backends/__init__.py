"""What does the work. `auto` takes the first backend of this list that can; each says every reason why it cannot."""

from __future__ import annotations

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.backends.dense import DenseBackend
from dilated_attention_pytorch.backends.flash_attn import FlashAttnBackend
from dilated_attention_pytorch.backends.flex import FlexBackend
from dilated_attention_pytorch.backends.native import NativeBackend
from dilated_attention_pytorch.backends.sdpa import SdpaBackend
from dilated_attention_pytorch.backends.triton import TritonBackend
from dilated_attention_pytorch.backends.tuning import Choice, ranking
from dilated_attention_pytorch.backends.xformers import XformersBackend
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.plans import DensePlan, Plan, StridedPlan, TilePlan, candidate_plans
from dilated_attention_pytorch.problem import Problem

BACKENDS: tuple[Backend, ...] = (
    TritonBackend(),
    NativeBackend(),
    FlashAttnBackend(),
    SdpaBackend(),
    XformersBackend(),
    DenseBackend(),
    FlexBackend(),  # eager it holds all logits, compiled it starts slowly: behind dense, unless measured to be faster
)

__all__ = [
    "BACKENDS",
    "Backend",
    "DenseBackend",
    "FlashAttnBackend",
    "FlexBackend",
    "Gradients",
    "NativeBackend",
    "SdpaBackend",
    "TritonBackend",
    "XformersBackend",
    "check_backend_name",
    "needs_tiles",
    "reasons",
    "select",
]


def check_backend_name(name: str) -> None:
    """Raise InvalidInput unless the name is "auto" or that of a backend."""
    names = ("auto", *(b.name for b in BACKENDS))
    if name not in names:
        raise InvalidInput(f"attend: expected backend to be one of {', '.join(map(repr, names))}. Got {name!r}.")


def needs_tiles(name: str) -> bool:
    """Whether the backend of this name walks tables of tiles but no strided plan, so that they must be made for it."""
    return any(b.name == name and TilePlan in b.plans and StridedPlan not in b.plans for b in BACKENDS)


def reasons(backend: Backend, problem: Problem, plans: tuple[Plan, ...]) -> tuple[Plan | None, list[str]]:
    """The first of the plans that the backend can compute, or None with every reason against."""
    missing = backend.import_error()
    if missing is not None:
        return None, [missing]
    against: list[str] = []
    for plan in plans:
        if isinstance(plan, backend.plans):
            found = backend.reasons_against(problem, plan)
            if not found:
                return plan, []
            against.extend(reason for reason in found if reason not in against)
    if not any(isinstance(plan, backend.plans) for plan in plans):
        kinds = " or ".join(kind.__name__ for kind in backend.plans)
        against.append(f"this pattern gives no {kinds}: it has no closed form on these positions")
    return None, against


def select(problem: Problem, plans: tuple[Plan, ...], name: str = "auto") -> tuple[Backend, Plan]:
    """The backend of this name, or the fastest that can, with the plan it walks.

    Raises NoBackend with every reason; where a named backend cannot, with the name of the nearest one that can.
    The fastest is what was measured for such problems (`backends.tuning`); where nothing was, the first of BACKENDS.
    """
    check_backend_name(name)
    measured, _ = ranking(problem, plans, BACKENDS)
    for choice in (m.choice for m in measured if name in ("auto", m.choice.backend)):
        chosen = _chosen(choice, problem, plans)
        if chosen is not None:
            return chosen
    tried = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        plan, against = reasons(backend, problem, plans)
        if plan is not None:
            return backend, plan
        tried.append(f"{backend.name}: {'; '.join(against)}")
    if name == "auto":
        raise NoBackend("attend: no backend can compute this. " + " | ".join(tried))
    nearest = select(problem, plans)[0].name
    raise NoBackend(
        f"attend: {tried[0]}. backend={nearest!r} can, or backend='auto', which takes the fastest that can."
    )


def _chosen(choice: Choice, problem: Problem, plans: tuple[Plan, ...]) -> tuple[Backend, Plan] | None:
    """The backend and plan of a measured choice, or None when this problem has no such plan or reasons against it."""
    backend = next(b for b in BACKENDS if b.name == choice.backend)
    if backend.options != choice.options:
        backend = type(backend)(choice.options)
    if choice.plan not in (StridedPlan.__name__, DensePlan.__name__):  # tables are made on request, and of this size
        plans = candidate_plans(plans[0].pattern, problem, tiles=True, largest_tile=choice.options.tile)
    plan, _ = reasons(backend, problem, tuple(p for p in plans if p.kind == choice.plan))
    return None if plan is None else (backend, plan)
