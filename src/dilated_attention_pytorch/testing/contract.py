"""The laws of DESIGN section 3 as functions of a backend; a backend passes, or gives a reason.

Error is ``max |x - ref| / max(max |ref|, max |dout|, 1e-3)`` for inputs of order one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from dilated_attention_pytorch.backends import Backend, Gradients, reasons
from dilated_attention_pytorch.memory import fill_with_nan
from dilated_attention_pytorch.merging import merge
from dilated_attention_pytorch.patterns import Causal, Documents, Pattern, Window, longnet
from dilated_attention_pytorch.plans import DensePlan, Plan, StridedPlan, TilePlan, candidate_plans
from dilated_attention_pytorch.problem import Problem, Run, positions_tensor
from dilated_attention_pytorch.testing.cases import CASES, Case
from dilated_attention_pytorch.testing.truth import Result, given_out, plain, truth

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest error; half types are compared with plain PyTorch in the same dtype instead."""


class ContractViolation(AssertionError):
    """The backend breaks a law; the message says which, for which case, and by how much."""


@dataclass
class ContractReport:
    """How many checks a backend passed, and for which cases it gave reasons instead.

    ``forward_only`` holds the cases whose gradients it refuses: their out and lse are checked.

    Example:
        >>> print(ContractReport(3, {"full-bias float32": ("no bias",)}))
        3 checks passed, 1 cases refused
          full-bias float32: no bias
    """

    checked: int = 0
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    forward_only: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.checked} checks passed, {len(self.refused)} cases refused"]
        if self.forward_only:
            lines[0] += f", {len(self.forward_only)} without gradients"
        for kind, cases in (("", self.refused), ("gradients of ", self.forward_only)):
            lines += [f"  {kind}{name}: {'; '.join(why)}" for name, why in cases.items()]
        return "\n".join(lines)


def check_contract(
    backend: Backend,
    cases: Iterable[Case] = CASES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | str = "cpu",
) -> ContractReport:
    """Every law has held for every case and dtype that the backend does not refuse.

    Raises ContractViolation at the first law that is broken.

    Example:
        >>> from dilated_attention_pytorch.backends import DenseBackend
        >>> check_contract(DenseBackend(), cases=CASES[:2], dtypes=[torch.float32]).refused
        {}
    """
    report = ContractReport()
    for case in cases:
        for dtype in dtypes:
            check_case(backend, case, dtype, device, report)
    check_packed(backend, device, report)
    check_large_offsets(backend, device, report)
    return report


def check_case(
    backend: Backend, case: Case, dtype: torch.dtype, device: torch.device | str, report: ContractReport
) -> None:
    """All laws for one case in one dtype, added to the report."""
    problem = case.problem(dtype, device)
    name = f"{case.name} {str(dtype).removeprefix('torch.')}"
    check_plans(plans_for(backend, problem, case.pattern), problem, case.pattern, name)
    accepted = accepted_problem(backend, problem, case.pattern, name, report)
    if accepted is None:
        return
    problem = accepted
    expected = check_values(backend, problem, case.pattern, name)
    report.checked += 1
    if dtype == torch.float32:  # what these laws add to law 1 does not depend on the dtype
        for kind in backend.plans:
            check_cuts(backend, problem, case.pattern, kind, name, expected)
            check_causal(backend, problem, case.pattern, kind, name)
            check_padded_alone(backend, problem, case.pattern, kind, name)
            report.checked += 3


def accepted_problem(
    backend: Backend, problem: Problem, pattern: Pattern, name: str, report: ContractReport
) -> Problem | None:
    """The problem as the backend takes it: whole, without gradients, or not at all, with its reasons in the report."""
    plan, against = reasons(backend, problem, plans_for(backend, problem, pattern))
    if plan is not None:
        return problem
    if not against:
        raise ContractViolation(f"{name}: {backend.name} refuses without a reason")
    without = replace(problem, needs_grad=False)
    if reasons(backend, without, plans_for(backend, without, pattern))[0] is None:
        report.refused[name] = tuple(against)
        return None
    report.forward_only[name] = tuple(against)
    return without


def plans_for(backend: Backend, problem: Problem, pattern: Pattern) -> tuple[Plan, ...]:
    """Every plan for the problem, of all kinds that the backend walks."""
    return candidate_plans(pattern, problem, tiles=TilePlan in backend.plans)


def plan_of(backend: Backend, problem: Problem, pattern: Pattern, kind: type[Plan] = Plan) -> Plan | None:
    """The first plan of this kind that the backend does not refuse, or None."""
    plans = tuple(plan for plan in plans_for(backend, problem, pattern) if isinstance(plan, kind))
    return reasons(backend, problem, plans)[0]


def check_plans(plans: Iterable[Plan], problem: Problem, pattern: Pattern, name: str) -> None:
    """Law 7: every plan, expanded without a kernel, gives exactly the pattern's counts."""
    expected = counts(problem, pattern)
    for plan in plans:
        found = plan.expand(problem)
        if found.shape != expected.shape or not torch.equal(found, expected):
            raise ContractViolation(f"law 7, {name}: {type(plan).__name__} does not expand to the pattern's counts")
        if isinstance(plan, DensePlan) and plan.log_counts is not None:
            held = plan.log_counts.exp().round().long().expand_as(found)
            if not torch.equal(held, expected):
                raise ContractViolation(f"law 7, {name}: the log-counts that DensePlan holds are not the pattern's")
        if isinstance(plan, StridedPlan) and plan.issued_pairs(problem) != int(expected.sum()):
            raise ContractViolation(f"law 7, {name}: issued_pairs is not the sum of the counts")


def counts(problem: Problem, pattern: Pattern) -> Tensor:
    """The pattern's counts at the problem's positions, padded keys 0: (B, H, Nq, Nk), int64."""
    q, k = positions_tensor(problem.query_positions), positions_tensor(problem.key_positions)
    rows, columns = (int(x.max()) + 1 if x.numel() else 0 for x in (q, k))
    mask = pattern.to_mask(problem.num_heads, rows, columns, query_start=0)[..., q, :][..., k]
    shape = (problem.batch, problem.num_heads, len(q), len(k))
    mask = mask.expand(shape)
    if problem.key_lengths is not None:
        mask = mask * (k < torch.tensor(problem.key_lengths).view(-1, 1, 1, 1))
    return mask.to(problem.q.device)


def check_values(backend: Backend, problem: Problem, pattern: Pattern, name: str) -> Result:
    """Laws 1, 2 and 6: values, rows without a key, untouched inputs, and no read of memory before it is written.

    Backward runs twice: with a gradient of lse, and without one as a share of a larger problem, whose results are to be
    in the accumulate dtype. Gives the truth, with the gradient of lse.
    """
    dout, dlse = cotangents(problem)
    expected, seen = truth(problem, pattern, dout, dlse), counts(problem, pattern)
    share = replace(problem, partial=True)  # float32 and float64 are as they were
    expected_share = truth(share, pattern, dout, None) if problem.needs_grad else None
    limits = None
    if problem.q.dtype not in LIMITS:
        limits = HalfLimits(problem, pattern, plain(problem, pattern, dout, dlse).errors(expected, dout))
    for plan in plans_for(backend, problem, pattern):
        if reasons(backend, problem, (plan,))[0] is None:
            continue
        inputs = [x for x in (problem.q, problem.k, problem.v, problem.bias, dout, dlse) if x is not None]
        before = [x.clone() for x in inputs]
        found = run(backend, problem, plan, dout, dlse)
        if not all(torch.equal(x, y) for x, y in zip(inputs, before)):
            raise ContractViolation(f"law 6, {name}: an input was written to")
        _check_layout(name, found)
        _compare("law 1", name, problem, found, expected, dout, limits)
        _check_unseen(name, problem, found, expected, seen)
        if expected_share is None:
            continue
        without = run(backend, share, plan, dout, None)
        _compare("law 1 of a share, without dlse", name, share, without, expected_share, dout, limits)
    return expected


@dataclass(frozen=True, eq=False)
class HalfLimits:
    """Largest errors of a half type: twice those of plain PyTorch in that type, and one rounding.

    Gradients may besides be off by what the out that backward is given makes of them: it was rounded, and a backward
    that sums over pieces cannot know what was lost.
    """

    problem: Problem
    pattern: Pattern
    plain_errors: dict[str, float]

    def of(self, part: str, found: Result, expected: Result, dout: Tensor, error: float) -> float:
        """The largest error of a part; what out makes of it is looked at where ``error`` is above the rest."""
        limit = 2 * self.plain_errors[part] + torch.finfo(self.problem.q.dtype).eps / 2
        if part in ("dq", "dk", "dbias") and not error <= limit:
            given = given_out(self.problem, self.pattern, expected, found.out, dout)
            limit += given.errors(expected, dout)[part]
        return limit


def run(backend: Backend, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None) -> Result:
    """Forward of one plan, and backward where the problem needs it, with memory from `empty` full of NaN."""
    with fill_with_nan(), torch.no_grad():
        out, lse = backend.forward(problem, plan)
        if not problem.needs_grad:
            return Result(out, lse, None)
        return Result(out, lse, backend.backward(problem, plan, dout, dlse, out, lse))


def cotangents(problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradients of out, in q's dtype, and of lse, in the accumulate dtype, of order one."""
    p, generator = problem, torch.Generator().manual_seed(8)
    shape = (p.batch, p.query_length, p.num_heads, p.v.shape[3])
    dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(p.q)
    dlse = torch.randn((shape[0], shape[2], shape[1]), generator=generator, dtype=torch.float64)
    return dout, dlse.to(p.q.device, p.accumulate_dtype)


def _compare(
    law: str,
    name: str,
    problem: Problem,
    found: Result,
    expected: Result,
    dout: Tensor,
    limits: HalfLimits | None = None,
) -> None:
    results = ("out", "dq", "dk", "dv")
    if found.grads is None:
        expected = expected.forward_only()
    for part, x in found.named().items():
        y = expected.named()[part]
        dtype = problem.result_dtype if part in results else problem.accumulate_dtype
        if x.shape != y.shape or x.dtype != dtype:
            raise ContractViolation(
                f"{law}, {name}: {part} is {tuple(x.shape)} {x.dtype}, expected {tuple(y.shape)} {dtype}"
            )
    if set(found.named()) != set(expected.named()):
        raise ContractViolation(f"{law}, {name}: expected {sorted(expected.named())}, got {sorted(found.named())}")
    for part, error in found.errors(expected, dout).items():
        limit = LIMITS[problem.q.dtype] if limits is None else limits.of(part, found, expected, dout, error)
        if not error <= limit:  # NaN is an error too
            raise ContractViolation(f"{law}, {name}: error of {part} is {error:.2e}, limit {limit:.2e}")


def _check_unseen(name: str, problem: Problem, found: Result, expected: Result, seen: Tensor) -> None:
    """Law 2: rows that see no key, and keys that no row sees, exactly."""
    rows = expected.lse == -torch.inf  # (B, H, Nq)
    if bool(((found.lse == -torch.inf) != rows).any()):
        raise ContractViolation(f"law 2, {name}: lse is not -inf exactly in the rows that see no key")
    named = found.named()
    for part in {"out", "dq"} & set(named):
        if bool((named[part].transpose(1, 2)[rows] != 0).any()):
            raise ContractViolation(f"law 2, {name}: {part} is not 0 in rows that see no key")
    b, _, _, nk = seen.shape
    keys = seen.sum(2).view(b, problem.k.shape[2], -1, nk).sum(2) == 0  # (B, Hkv, Nk)
    for part in {"dk", "dv"} & set(named):
        if bool((named[part].transpose(1, 2)[keys] != 0).any()):
            raise ContractViolation(f"law 2, {name}: {part} is not 0 for keys that no row sees")


def part_of(problem: Problem, rows: slice, columns: slice) -> Problem:
    """The same problem for some of its queries and keys; both must stand in one run."""
    p = problem

    def runs(run: Run, part: slice) -> tuple[Run, ...]:
        places = range(run.length)[part]
        return (Run(run.start + run.step * places.start, run.step * places.step, len(places)),)

    bias = p.bias
    if bias is not None:
        bias = bias[..., columns] if bias.shape[-1] > 1 else bias
        bias = bias[..., rows, :] if bias.dim() > 1 and bias.shape[-2] > 1 else bias
    return replace(
        p,
        q=p.q[:, rows],
        k=p.k[:, columns],
        v=p.v[:, columns],
        bias=bias,
        query_positions=runs(p.query_positions[0], rows),
        key_positions=runs(p.key_positions[0], columns),
    )


def check_cuts(
    backend: Backend, problem: Problem, pattern: Pattern, kind: type[Plan], name: str, expected: Result
) -> None:
    """Law 4: keys and queries cut anywhere, run apart and merged, are the whole; so are gradients, given global lse."""
    nq, nk = problem.query_length, problem.key_length
    number = zlib.crc32(name.encode())  # different cuts for different cases, the same in every run
    places = sorted({0, number % (nk + 1), number // 1000 % (nk + 1), nk})
    layouts = [([slice(0, nq)], [slice(a, b) for a, b in pairwise(places)])]
    row, column = 1 + number % max(nq - 1, 1), 1 + number // 100 % max(nk - 1, 1)
    if nq > 1 and nk > 1 and number % 2:
        layouts.append(([slice(0, row), slice(row, nq)], [slice(0, column), slice(column, nk)]))
    elif nq > 1 and nk > 1:
        layouts.append(([slice(0, nq, 2), slice(1, nq, 2)], [slice(0, nk, 2), slice(1, nk, 2)]))
    dout, dlse = cotangents(problem)
    for rows, columns in layouts:
        found = _run_parts(backend, problem, pattern, kind, rows, columns, dout, dlse)
        if found is not None:
            _compare("law 4", f"{name}, queries {rows}, keys {columns}", problem, found, expected, dout)


def _run_parts(
    backend: Backend,
    problem: Problem,
    pattern: Pattern,
    kind: type[Plan],
    rows: list[slice],
    columns: list[slice],
    dout: Tensor,
    dlse: Tensor,
) -> Result | None:
    """The whole result from the parts, or None when the backend refuses one of them."""
    p = problem
    parts = [[part_of(p, row, column) for column in columns] for row in rows]
    plans = [[plan_of(backend, x, pattern, kind) for x in line] for line in parts]
    out, lse = torch.zeros_like(dout), torch.zeros_like(dlse)
    grads = [torch.zeros_like(x) for x in (p.q, p.k, p.v)]
    dbias = None if p.bias is None else p.bias.new_zeros((p.batch, p.num_heads, p.query_length, p.key_length))
    with fill_with_nan(), torch.no_grad():
        for row, line, line_plans in zip(rows, parts, plans):
            if None in line_plans:
                return None
            results = [backend.forward(x, plan) for x, plan in zip(line, line_plans) if plan is not None]
            out[:, row], lse[:, :, row] = merge(*results)
        if not p.needs_grad:
            return Result(out, lse, None)
        for row, line, line_plans in zip(rows, parts, plans):
            for column, x, plan in zip(columns, line, line_plans):
                assert plan is not None
                share = backend.backward(x, plan, dout[:, row], dlse[:, :, row], out[:, row], lse[:, :, row])
                grads[0][:, row] += share.q
                grads[1][:, column] += share.k
                grads[2][:, column] += share.v
                if dbias is not None and share.bias is not None:
                    _add_bias(dbias, share.bias, row, column)
    if dbias is not None and p.bias is not None:
        dbias = dbias.sum_to_size((1,) * (4 - p.bias.dim()) + tuple(p.bias.shape)).view(p.bias.shape)
        dbias = dbias.to(p.accumulate_dtype)
    return Result(out, lse, Gradients(grads[0], grads[1], grads[2], dbias))


def _add_bias(whole: Tensor, share: Tensor, row: slice, column: slice) -> None:
    """Add a part's bias gradient at its place; a dim that was broadcast is held by its first row or column."""
    share = share.view((1,) * (4 - share.dim()) + tuple(share.shape))
    b, h, n, m = share.shape
    whole[:b, :h, row, column][:, :, :n, :m] += share


def check_causal(backend: Backend, problem: Problem, pattern: Pattern, kind: type[Plan], name: str) -> None:
    """Law 5: where no query sees a later key, changing tokens after a position leaves rows up to it bit-identical."""
    q, k = positions_tensor(problem.query_positions), positions_tensor(problem.key_positions)
    q, k = q.to(problem.q.device), k.to(problem.q.device)
    if bool((counts(problem, pattern) * (k > q.view(-1, 1))).any()):
        return
    plan = plan_of(backend, problem, pattern, kind)
    if plan is None:
        return
    problem = replace(problem, q=problem.q.contiguous(), k=problem.k.contiguous(), v=problem.v.contiguous())
    with torch.no_grad():
        out, lse = backend.forward(problem, plan)
        for place in sorted({problem.query_length // 4, problem.query_length // 2, problem.query_length - 1}):
            later, later_keys = (x > q[place] for x in (q, k))
            changed = replace(
                problem,
                q=torch.where(later[:, None, None], problem.q.flip(1) + 1, problem.q),
                k=torch.where(later_keys[:, None, None], problem.k.flip(1) + 1, problem.k),
                v=torch.where(later_keys[:, None, None], problem.v.flip(1) + 1, problem.v),
            )
            other, other_lse = backend.forward(changed, plan)
            same = torch.equal(other[:, ~later], out[:, ~later]) and torch.equal(
                other_lse[..., ~later], lse[..., ~later]
            )
            if not same:
                raise ContractViolation(f"law 5, {name}: tokens after row {place} change rows up to it")


def check_padded_alone(backend: Backend, problem: Problem, pattern: Pattern, kind: type[Plan], name: str) -> None:
    """Law 5: a right-padded sample in a batch equals the sample alone."""
    if problem.key_lengths is None or problem.bias is not None or pattern.tables or problem.dropout_p > 0:
        return
    dout, dlse = cotangents(problem)
    plan = plan_of(backend, problem, pattern, kind)
    if plan is None:
        return
    found = run(backend, problem, plan, dout, dlse)
    for b, length in enumerate(problem.key_lengths):
        if length == 0:
            continue
        alone = replace(part_of(problem, slice(None), slice(0, length)), key_lengths=None)
        alone = replace(alone, q=alone.q[b : b + 1], k=alone.k[b : b + 1], v=alone.v[b : b + 1])
        expected = truth(alone, pattern, dout[b : b + 1], dlse[b : b + 1])
        mine = _part_of_result(found, slice(b, b + 1), slice(None), slice(0, length))
        _compare("law 5", f"{name}, sample {b} alone", alone, mine, expected, dout)


def check_packed(backend: Backend, device: torch.device | str, report: ContractReport) -> None:
    """Law 5: each document of a packed sequence equals the document alone."""
    lengths = (19, 1, 33, 8)
    for inner in (longnet([8, 16], [1, 2]), longnet([6, 10], [2, 3]) & Causal(), Window(4)):
        pattern = Documents(list(lengths)).of(inner)
        case = Case("packed", pattern, batch=1, query_length=sum(lengths), num_heads=3)  # on every grid of a rate of 3
        name = f"packed {inner.text()}"
        problem = accepted_problem(backend, case.problem(torch.float32, device), case.pattern, name, report)
        if problem is None:
            continue
        dout, dlse = cotangents(problem)
        for kind in backend.plans:
            offered = tuple(p for p in plans_for(backend, problem, case.pattern) if isinstance(p, kind))
            plan, against = reasons(backend, problem, offered)
            if plan is None:
                if offered:
                    report.refused[name] = tuple(against)
                continue
            found = run(backend, problem, plan, dout, dlse)
            _compare_documents(lengths, inner, problem, found, dout, dlse)
            report.checked += 1


def _check_layout(name: str, found: Result) -> None:
    """Results are contiguous, as the operators' fake kernels promise to compilers."""
    for part, x in found.named().items():
        if not x.is_contiguous():
            raise ContractViolation(f"law 1, {name}: {part} {tuple(x.shape)} is not contiguous: {x.stride()}")


def _compare_documents(
    lengths: Sequence[int], inner: Pattern, problem: Problem, found: Result, dout: Tensor, dlse: Tensor
) -> None:
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        part = part_of(problem, rows, rows)
        alone = replace(part, query_positions=(Run(0, 1, length),), key_positions=(Run(0, 1, length),))
        expected = truth(alone, inner, dout[:, rows], dlse[..., rows])
        mine = _part_of_result(found, slice(None), rows, rows)
        _compare("law 5", f"document at {start} of {inner.text()}", alone, mine, expected, dout)
        start += length


def _part_of_result(found: Result, samples: slice, rows: slice, keys: slice) -> Result:
    grads = found.grads
    if grads is not None:
        grads = Gradients(grads.q[samples, rows], grads.k[samples, keys], grads.v[samples, keys])
    return Result(found.out[samples, rows], found.lse[samples, :, rows], grads)


def check_large_offsets(backend: Backend, device: torch.device | str, report: ContractReport) -> None:
    """Law 6: rows past element 2^31 are right. The memory between the rows is never touched, on a CPU never real."""
    apart, d = 1 << 30, 8  # rows at elements 0, 2^30, 2^31
    case = Case("large_offsets", Causal(), batch=1, query_length=3, num_heads=2)
    whole = accepted_problem(backend, case.problem(torch.bfloat16, device), Causal(), case.name, report)
    if whole is None:
        return
    storage = torch.empty(2 * apart + 6 * d, dtype=torch.bfloat16, device=device)
    far = []
    for i, x in enumerate((whole.q, whole.k, whole.v)):
        rows = storage.as_strided(x.shape, (0, apart, d, 1), i * 2 * d)
        rows.copy_(x)
        far.append(rows)
    problem = replace(whole, q=far[0], k=far[1], v=far[2])
    check_values(backend, problem, Causal(), "rows past element 2^31")
    report.checked += 1
