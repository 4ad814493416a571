"""Runs the Triton kernels in Triton's interpreter, in a process of its own: python interpreted.py GROUP or CASE...

TRITON_INTERPRET must be set before Triton is imported, hence the process. A line of JSON says what passed; a broken law
ends the process with its message.
"""

import dataclasses
import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.runtime.interpreter as interpreter

from dilated_attention_pytorch.backends.triton import TritonBackend, TritonOptions
from dilated_attention_pytorch.patterns import Causal, Dilated, Documents, Full, Window, longnet
from dilated_attention_pytorch.plans import Plan, StridedPlan, candidate_plans
from dilated_attention_pytorch.plans.tiles import tile_plan
from dilated_attention_pytorch.problem import Problem
from dilated_attention_pytorch.scores import Relative
from dilated_attention_pytorch.testing.cases import CASES, Case
from dilated_attention_pytorch.testing.contract import (
    LIMITS,
    ContractReport,
    ContractViolation,
    HalfLimits,
    check_case,
    check_large_offsets,
    check_packed,
    cotangents,
    run,
)
from dilated_attention_pytorch.testing.truth import plain, truth

PAPER = longnet([8, 16, 32], [1, 2, 4])
ODD = longnet([6, 10, 9], [1, 3, 2])  # segments do not nest, rates do not divide them
TWO = longnet([8, 16], [1, 2])  # the fewest branches that are split, where the feature is another


def case(name, pattern, heads=2, length=29, batch=1, **change):
    return Case(name, pattern, batch=batch, num_heads=heads, query_length=length, **change)


SMALL = [
    case("causal", Causal()),
    case("window", Window(5)),
    case("window_causal", Window(6) & Causal()),
    case("paper", PAPER),
    case("odd", ODD),
    case("odd_causal", ODD & Causal()),
    case("rate_above_segment", Dilated(3, 5)),
    case("rate_above_int32", Dilated(16, 1 << 40) + Dilated(32, 1 << 29), heads=3),
    case("same_branch_twice", longnet([8, 8], [2, 2])),
    case("mixed_bounds", Window(3) + Dilated(16, 2) + Full()),
    case("torchscale", longnet([8, 16], [2, 4], head_offset="torchscale") & Causal(), heads=3, length=20),
    case("head_groups", longnet([8, 16, 32], [1, 2, 4], head_groups=True), heads=4, length=20),
    case("documents", Documents([7, 0, 13, 5]).of(PAPER & Causal())),
    case("documents_cut", Documents([11, 1, 10]) & Window(4)),
    case("documents_batched", Documents([[7, 13, 0], [1, 2, 20]]).of(ODD), batch=2, heads=1),
    case("padded", PAPER & Causal(), batch=2, heads=1, visible=(29, 11)),
    case("padded_whole", TWO, batch=2, heads=1, visible=(0, 1)),
    case("placed", PAPER & Causal(), batch=2, kv_heads=1, length=11, key_length=31, query_start=14, visible=(31, 19)),
    case("beyond", PAPER & Causal(), length=4, key_length=11, query_start=70),
    case("grouped", ODD, heads=4, kv_heads=2),
    case("slopes", TWO & Causal(), score=Relative(slopes=torch.tensor([0.5, 0.25]))),
    case("table", TWO, score=Relative(table=torch.linspace(-1, 1, 18).view(2, 9))),
    case("one_table", Full(), score=Relative(table=torch.linspace(-1, 1, 9).view(1, 9))),
    case("dropout", TWO & Causal(), dropout_p=0.3),
    case("dropout_grouped", Full(), batch=2, kv_heads=1, length=9, key_length=21, query_start=12, dropout_p=0.5),
    case("negative_scale", TWO & Causal(), scale=-0.3),
    case("zero_scale", TWO & Causal(), scale=0.0),
    case("values_wider", TWO, value_dim=20),
    case("last_dim_strided", TWO & Causal(), layout="last_dim_strided"),
    case("expanded", TWO, batch=2, heads=1, length=17, layout="expanded"),
    case("fused", TWO, heads=4, kv_heads=2, length=17, layout="fused"),
    case("crossing", longnet([40, 72], [1, 2]), heads=1, length=110),  # tiles cross segments that hold whole blocks
    case("whole_tiles_twice", Full() + Dilated(64, 1), heads=1, length=70),
    case("head_dim_40", PAPER & Causal(), heads=1, length=20, head_dim=40),
    case("product", Dilated(12, 2) & Dilated(20, 3)),  # no closed form: tables of tiles only
]
LAWS = [
    case("laws", ODD & Causal(), batch=2, length=17, visible=(17, 9)),
    case("laws_grouped", Window(4) + Dilated(8, 2), kv_heads=1, length=11, key_length=19, query_start=5),
]
LONG = case("long", longnet([64, 128, 150], [1, 2, 3]) & Causal(), length=200, head_dim=48, kv_heads=1)
TINY = {"block_m": 16, "block_n": 16, "backward_block_m": 16, "backward_block_n": 16}


def speed_up():
    """The interpreter patches Triton's language anew in every call of a function, copies memory back that it shares,

    and checks each integer sum for overflow; once, never and never do here.
    """
    patch, patched = interpreter._patch_lang, set()

    class Nothing:
        def restore(self):
            pass

    def patch_once(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch(fn)
        return Nothing()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def plans_of(problem: Problem, pattern) -> list[Plan]:
    """The strided plan if there is one, and tables of tiles in small blocks."""
    found = [p for p in candidate_plans(pattern, problem) if isinstance(p, StridedPlan)]
    return [*found, tile_plan(pattern, problem, (32, 16))]


def check_value(small: Case, dtype: torch.dtype, splits: tuple[str, ...], blocks: dict[str, int] = TINY) -> int:
    """Law 1 and 2 for both kinds of plan, with chosen blocks; the number of runs.

    Forward differs with the split, gradients do not: they are taken once.
    """
    problem = small.problem(dtype)
    dout, dlse = cotangents(problem)
    expected = truth(problem, small.pattern, dout, dlse)
    limits = None
    if dtype not in LIMITS:
        yardstick = plain(problem, small.pattern, dout, dlse).errors(expected, dout)
        limits = HalfLimits(problem, small.pattern, yardstick)
    runs = 0
    for plan in plans_of(problem, small.pattern):
        for split in splits if isinstance(plan, StridedPlan) else splits[:1]:
            backend = TritonBackend(TritonOptions(split=split, **blocks))
            assert not backend.reasons_against(problem, plan), backend.reasons_against(problem, plan)
            given = dataclasses.replace(problem, needs_grad=split == splits[0])
            found = run(backend, given, plan, dout, dlse)
            name = f"{small.name} {dtype} {type(plan).__name__} {split}"
            if not torch.equal(found.lse == -torch.inf, expected.lse == -torch.inf):
                raise ContractViolation(f"{name}: lse is not -inf exactly in the rows that see no key")
            for part, error in found.errors(expected, dout).items():
                limit = LIMITS[dtype] if limits is None else limits.of(part, found, expected, dout, error)
                if not error <= limit:
                    raise ContractViolation(f"{name}: error of {part} is {error:.2e}, limit {limit:.2e}")
            runs += 1
    return runs


def main(names: list[str]) -> dict[str, int]:
    """What passed: runs of small cases, and checks of the contract's laws."""
    backend, report, done = TritonBackend(TritonOptions(**TINY)), ContractReport(), {"runs": 0}
    small = {c.name: c for c in SMALL}
    for name in names:
        if name == "laws":
            for law_case in LAWS:
                check_case(backend, law_case, torch.float32, "cpu", report)
        elif name == "packed":
            check_packed(backend, "cpu", report)
        elif name == "large_offsets":
            check_large_offsets(backend, "cpu", report)
        elif name == "default_blocks":
            done["runs"] += check_value(LONG, torch.float16, ("apart", "auto"), {})
        elif name == "dropout_words":
            done["runs"] += check_dropout_words()
        elif name == "wrong_plan":
            done["runs"] += check_wrong_plans(backend)
        elif name in small:
            done["runs"] += check_value(small[name], torch.float32, ("together", "apart"))
        elif name.startswith("half:"):
            for dtype in (torch.float16, torch.bfloat16):
                done["runs"] += check_value(small[name[5:]], dtype, ("apart",))
        elif name.startswith("partial:"):
            done["runs"] += check_partial(backend, small[name[8:]])
        else:  # "case:NAME:dtype" of the contract
            _, case_name, dtype = name.split(":")
            (chosen,) = [c for c in CASES if c.name == case_name]
            check_case(backend, chosen, getattr(torch, dtype), "cpu", report)
    assert not report.refused or all(name.startswith("case:") for name in names), report.refused
    return {**done, "checked": report.checked, "refused": len(report.refused)}


def check_partial(backend: TritonBackend, small: Case) -> int:
    """Shares of half-type problems, out handed on in float32, are as exact as float32 in the interpreter's products."""
    runs = 0
    for dtype in (torch.float16, torch.bfloat16):
        problem = dataclasses.replace(small.problem(dtype), partial=True)
        dout, dlse = cotangents(problem)
        expected = truth(problem, small.pattern, dout, dlse)
        for plan in plans_of(problem, small.pattern):
            found = run(backend, problem, plan, dout, dlse)
            assert {x.dtype for x in found.named().values()} == {torch.float32}
            for part, error in found.errors(expected, dout).items():
                if not error <= LIMITS[torch.float32]:
                    raise ContractViolation(f"partial {small.name} {dtype}: error of {part} is {error:.2e}")
            runs += 1
    return runs


def check_dropout_words() -> int:
    """Triton's Philox draws what dropout.py draws, with both words of the seed and every bit of the positions."""
    import triton
    import triton.language as tl

    from dilated_attention_pytorch.backends.triton.walk import kept_pairs
    from dilated_attention_pytorch.dropout import dropout_factors

    q = torch.tensor([0, 1, 77, 12345, (1 << 29) - 1, 5, 6, 7], dtype=torch.int64)
    k = torch.tensor([0, 3, 12, 1 << 28], dtype=torch.int64)
    kept = torch.zeros(8, 4, dtype=torch.int32)
    seed, row, p = torch.tensor([(987654321 << 33) + 5]), 13, 0.37
    expected = dropout_factors(seed, p, torch.tensor(row), q.view(-1, 1), k) > 0
    draw = triton.jit(_draw)
    draw.fn.__globals__.update(tl=tl, kept_pairs=kept_pairs)
    draw[(1,)](seed, q.int(), k.int(), kept, row, int(p * 2.0**32))
    assert torch.equal(kept.bool(), expected), (kept, expected)
    assert 0 < int(expected.sum()) < expected.numel()
    return 1


def _draw(SEED, Q, K, KEPT, row, threshold):
    i, j = tl.arange(0, 8), tl.arange(0, 4)  # noqa: F821
    kept = kept_pairs(tl.load(SEED), threshold, row, tl.load(Q + i)[:, None], tl.load(K + j)[None, :])  # noqa: F821
    tl.store(KEPT + i[:, None] * 4 + j[None, :], kept.to(tl.int32))  # noqa: F821


def check_wrong_plans(backend: TritonBackend) -> int:
    """Tiles of rows that share nothing, in any order, some twice, with lists of branches that lie: the same results.

    A kernel that trusted the plan would be wrong. Leaving a tile out is what no kernel can mend, and is noticed.
    """
    from dilated_attention_pytorch.backends.triton import calls

    problem = case("wrong", ODD & Causal(), kv_heads=1, length=45).problem(torch.float32)
    pattern = ODD & Causal()
    dout, dlse = cotangents(problem)
    expected = truth(problem, pattern, dout, dlse)
    good = calls._launches

    def bad(*arguments):
        for launch, blocks in good(*arguments):
            yield mixed_up(launch), blocks

    def missing(*arguments):
        for launch, blocks in good(*arguments):
            yield dataclasses.replace(launch, tile=launch.tile[1:]), blocks

    errors = []
    for launches in (bad, missing):
        calls._launches = launches
        (plan,) = [p for p in candidate_plans(pattern, problem) if isinstance(p, StridedPlan)]
        plan = dataclasses.replace(plan)  # a plan of its own, so that nothing is kept from another
        errors.append(run(backend, problem, plan, dout, dlse).errors(expected, dout))
    calls._launches = good
    assert all(error <= LIMITS[torch.float32] for error in errors[0].values()), errors[0]
    assert not all(error <= LIMITS[torch.float32] for error in errors[1].values()), "a missing tile went unnoticed"
    return 1


def mixed_up(launch):
    """The launch with every head's rows dealt out at random to two groups, tiles shuffled, the first three twice."""
    import numpy as np

    draw = np.random.default_rng(7)
    rows = np.arange(45)
    group, residue, tile = [], [], []
    for head in sorted(set(launch.tile[:, 0].tolist())):
        first = draw.random(45) < 0.4
        for part in (rows[first], rows[~first]):
            tile += [(head, len(group), start, 0) for start in range(0, len(part), 16)]
            # base, first residue, residues, rows, period, first of list, branches in the list, document
            group.append((0, len(residue), len(part), len(part), 1 << 20, 0, 99, 0))
            residue += part.tolist()
    tables = [np.array(x, dtype=np.int32) for x in (draw.permutation(tile), group, residue)]
    tables[0] = np.concatenate([tables[0], tables[0][:3]])
    return dataclasses.replace(
        launch, tile=tables[0], group=tables[1], residue=tables[2], branch_list=np.array([7, 7, 7], dtype=np.int32)
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's remarks on -inf and on division by zero
    torch.set_num_threads(1)
    speed_up()
    sys.stdout.write(json.dumps(main(sys.argv[1:])) + "\n")
