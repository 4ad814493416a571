"""Which backend can do what, asked of the backends themselves: the table of docs/backends.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_attention_pytorch.backends import BACKENDS, Backend
from dilated_attention_pytorch.patterns import BlockSparse, Causal, Dilated, Documents, Pattern, Window, longnet
from dilated_attention_pytorch.plans import candidate_plans
from dilated_attention_pytorch.problem import Problem
from dilated_attention_pytorch.scores import Relative, Softcap
from dilated_attention_pytorch.testing.cases import Case
from dilated_attention_pytorch.testing.contract import part_of

_LONGNET = longnet([1024, 2048], [1, 2])
_LONG: dict[str, object] = {"batch": 1, "query_length": 2048, "num_heads": 4, "head_dim": 64}
GPU_CAPABILITY = (9, 0)
"""The compute capability of the CUDA device that the table speaks of."""


@dataclass(frozen=True, eq=False)
class Feature:
    """A row of the table: a problem that has the feature and nothing else out of the ordinary.

    ``dtype`` None stands for the device's usual one: float32 on a CPU, bfloat16 on a GPU.
    """

    name: str
    case: Case
    dtype: torch.dtype | None = None
    needs_grad: bool = True
    every_other_row: bool = False

    @lru_cache(maxsize=256)  # noqa: B019  (features are few and live as long as the module)
    def problem(self, device: str) -> Problem:
        """The problem on "cpu", or on a "cuda" that need not be there: its tensors hold nothing."""
        usual = torch.float32 if device == "cpu" else torch.bfloat16
        problem = replace(self.case.problem(self.dtype or usual, "cpu"), needs_grad=self.needs_grad)
        if self.every_other_row:
            problem = part_of(problem, slice(0, None, 2), slice(0, None, 2))
        if device == "cpu":
            return problem
        with FakeTensorMode():
            moved = {
                name: torch.empty(x.shape, dtype=x.dtype, device=device)
                for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v), ("bias", problem.bias))
                if x is not None
            }
        return replace(problem, **moved)  # type: ignore[arg-type]


def _feature(
    name: str,
    pattern: Pattern = _LONGNET,
    dtype: torch.dtype | None = None,
    needs_grad: bool = True,
    every_other_row: bool = False,
    **change: object,
) -> Feature:
    case = replace(Case(name, pattern), **(_LONG | change))  # type: ignore[arg-type]
    return Feature(name, case, dtype, needs_grad, every_other_row)


FEATURES = (
    _feature("LongNet, forward", needs_grad=False),
    _feature("LongNet, with gradients"),
    _feature("causal", _LONGNET & Causal()),
    _feature("sliding window", Window(100) & Causal()),
    _feature("packed documents", Documents([1000, 1048]).of(_LONGNET)),
    _feature("right padding", batch=2, visible=(2048, 700)),
    _feature("block-sparse, causal", BlockSparse(128, torch.arange(256).view(16, 16) % 3 == 0) & Causal()),
    _feature("no closed form: a product of grids", Dilated(256, 2) & Dilated(768, 3)),
    _feature("rows that are not consecutive", every_other_row=True),
    _feature("one query (decoding)", _LONGNET & Causal(), query_length=1, key_length=2048, needs_grad=False),
    _feature("float32", dtype=torch.float32),
    _feature("float64", dtype=torch.float64),
    _feature("bfloat16", dtype=torch.bfloat16),
    _feature("float16", dtype=torch.float16),
    _feature("fewer key-value heads", kv_heads=2),
    _feature("head dim 8", head_dim=8),
    _feature("head dim 48", head_dim=48),
    _feature("head dim 256", head_dim=256),
    _feature("value dim unlike head dim", value_dim=32),
    _feature("scale below 0", scale=-0.5),
    _feature("ALiBi slopes", score=Relative(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))),
    _feature("relative position table", score=Relative(table=torch.zeros(4, 9))),
    _feature("softcap", score=Softcap(30.0)),
    _feature("bias", bias_shape=(1, 1, 1, 2048)),
    _feature("dropout", dropout_p=0.1),
)
"""The rows of the table."""


def support(backend: Backend, feature: Feature, device: str) -> list[str]:
    """Why the backend cannot compute the feature on "cpu" or "cuda"; empty when it can. Asks no installation.

    Of several plans that it could walk, the reasons against the nearest are given.
    """
    problem = feature.problem(device)
    plans = candidate_plans(feature.case.pattern, feature.problem("cpu"), tiles=True)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=GPU_CAPABILITY):
        found = [backend.reasons_against(problem, plan) for plan in plans if isinstance(plan, backend.plans)]
    kinds = " or ".join(kind.__name__ for kind in backend.plans)
    nearest = min(found, key=len) if found else [f"this pattern gives no {kinds}"]
    return [reason for reason in nearest if "does not import" not in reason]


def support_columns() -> list[tuple[Backend, str]]:
    """(backend, device) for every column: devices on which the backend can do LongNet's forward at all."""
    return [(b, device) for b in BACKENDS for device in ("cpu", "cuda") if not support(b, FEATURES[0], device)]


def support_table(features: Sequence[Feature] = FEATURES) -> str:
    """The table in Markdown: a row for each feature, a column for each backend and device, reasons as footnotes.

    "forward" means without gradients only.

    Example:
        >>> support_table(FEATURES[:1]).splitlines()[2].startswith("| LongNet, forward | yes |")
        True
    """
    columns, forwards = support_columns(), {f.name: replace(f, needs_grad=False) for f in features}
    notes: list[str] = []
    lines = ["| feature | " + " | ".join(f"{b.name}, {device}" for b, device in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for feature in features:
        cells = []
        for backend, device in columns:
            against = support(backend, feature, device)
            without = support(backend, forwards[feature.name], device) if against else []
            notes.extend(reason for reason in (without or against) if reason not in notes)
            numbers = ", ".join(str(1 + notes.index(reason)) for reason in without or against)
            cells.append("yes" if not against else f"{'no' if without else 'forward'} ({numbers})")
        lines.append(f"| {feature.name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]) + "\n"
