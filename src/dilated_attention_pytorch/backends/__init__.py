"""What does the work. `auto` takes the first backend of this list that can; each says every reason why it cannot."""

from __future__ import annotations

from dilated_attention_pytorch.backends.base import Backend, Gradients
from dilated_attention_pytorch.backends.dense import DenseBackend
from dilated_attention_pytorch.backends.sdpa import SdpaBackend
from dilated_attention_pytorch.errors import InvalidInput, NoBackend
from dilated_attention_pytorch.plans import Plan
from dilated_attention_pytorch.problem import Problem

BACKENDS: tuple[Backend, ...] = (SdpaBackend(), DenseBackend())

__all__ = ["BACKENDS", "Backend", "DenseBackend", "Gradients", "SdpaBackend", "check_backend_name", "reasons", "select"]


def check_backend_name(name: str) -> None:
    """Raise InvalidInput unless the name is "auto" or that of a backend."""
    names = ("auto", *(b.name for b in BACKENDS))
    if name not in names:
        raise InvalidInput(f"attend: expected backend to be one of {', '.join(map(repr, names))}. Got {name!r}.")


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
    """The backend of this name, or the first that can, with the plan it walks; NoBackend with all reasons otherwise."""
    check_backend_name(name)
    tried = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        plan, against = reasons(backend, problem, plans)
        if plan is not None:
            return backend, plan
        tried.append(f"{backend.name}: {'; '.join(against)}")
    raise NoBackend("attend: no backend can compute this. " + " | ".join(tried))
