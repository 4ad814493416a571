"""A table of measurements decides what auto takes, never what comes out; files that are no good are named."""

import json
import os
import warnings
from dataclasses import dataclass

import pytest
import torch

from dilated_attention_pytorch import Causal, Documents, Full, InvalidInput, Window, attend, backends, longnet
from dilated_attention_pytorch.backends import BACKENDS, DenseBackend, SdpaBackend, select
from dilated_attention_pytorch.backends.base import NoOptions, Options
from dilated_attention_pytorch.backends.tuning import (
    PATTERN_CLASSES,
    Choice,
    Key,
    Measured,
    Ranking,
    Table,
    Timing,
    device_name,
    files,
    key_of,
    load_table,
    pattern_class,
    processor_name,
    ranking,
    read_options,
    table_from_dict,
    tables_in_force,
    user_file,
    using,
)
from dilated_attention_pytorch.plans import DensePlan, StridedPlan, TilePlan, candidate_plans
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.testing import PATTERNS
from dilated_attention_pytorch.testing.contract import cotangents
from dilated_attention_pytorch.testing.truth import truth

CPU = torch.device("cpu")
PATTERN = longnet([16, 64], [1, 4]) & Causal()


@dataclass(frozen=True)
class Sizes(Options):
    rows: int = 8
    share: float = 0.5
    name: str | None = None
    wide: bool = False

    def __post_init__(self):
        if self.rows < 1:
            raise InvalidInput(f"Sizes: expected rows of at least 1. Got {self.rows}.")


class Sized(DenseBackend):
    name = "sized"
    options_type = Sizes

    def candidates(self, problem):
        return (Sizes(), Sizes(rows=32))


def problem_of(n=64, nq=None, d=8, dtype=torch.float32, **options):
    q, k = torch.randn(1, nq or n, 2, d, dtype=dtype), torch.randn(1, n, 2, d, dtype=dtype)
    return make_problem(q, k, k + 1, scale=0.3, query_start=n - (nq or n), **options)


def entry(*choices: Choice) -> Ranking:
    return tuple(Measured(c, Timing(0.1 * (i + 1), 0.1, 0.9, 3)) for i, c in enumerate(choices))


DENSE = Choice("dense", "DensePlan", NoOptions())
STRIDED = Choice("sdpa", "StridedPlan", SdpaBackend().options)
KEY = Key("float32", 8, "dilated-short-causal", 64, False, False)


def test_options_are_those_of_the_backend():
    assert Sized().options == Sizes()
    assert DenseBackend().candidates(problem_of()) == (NoOptions(),)
    with pytest.raises(InvalidInput, match=r"Sized: expected options to be Sizes.*NoOptions"):
        Sized(NoOptions())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Full(), "full"),
        (Causal(), "causal"),
        (Window(3) & Causal(), "window"),
        (Documents([3, 4]).of(Window(2)), "documents"),
        (longnet([256], [1]), "dilated-short"),
        (Documents([3, 4]).of(longnet([2048, 4096], [1, 2])), "dilated-long"),
        (longnet([2048, 1024], [1, 4]) & Causal(), "dilated-short-causal"),
        (longnet([2048, 4096], [1, 4]) & Causal(), "dilated-long-causal"),
        (longnet([4], [2]) & longnet([6], [3]), "other"),
    ],
)
def test_classes_of_patterns(pattern, expected):
    assert pattern_class(pattern) == expected


def test_every_pattern_has_a_class_and_keys_have_buckets():
    assert {pattern_class(p) for p in PATTERNS.values()} <= set(PATTERN_CLASSES)
    for n, bucket in ((1, 1), (2, 2), (3, 4), (64, 64), (65, 128)):
        problem = problem_of(n, nq=1)
        assert key_of(problem, candidate_plans(Full(), problem)) == Key("float32", 8, "full", bucket, True, False)
    problem = problem_of(40, needs_grad=True)
    assert key_of(problem, candidate_plans(Full(), problem)).training


def test_the_nearest_key_that_was_measured():
    far = KEY._replace(length=1024)
    table = Table("cpu", {KEY: entry(DENSE, STRIDED), far: entry(STRIDED, DENSE)})
    assert table.nearest(KEY) == entry(DENSE, STRIDED)
    assert table.nearest(KEY._replace(length=16, head_dim=32)) == table.entries[KEY]
    assert table.nearest(KEY._replace(length=8)) == ()
    assert table.nearest(KEY._replace(head_dim=64)) == ()
    assert [m.choice for m in table.nearest(KEY._replace(length=128))] == [STRIDED], "dense grows with the square"
    assert table.nearest(KEY._replace(length=256)) == table.entries[far], "as near, and measured with as many keys"
    assert [m.choice for m in table.nearest(KEY._replace(length=1 << 20))] == [STRIDED]
    for other in ({"decode": True}, {"training": True}, {"pattern": "causal"}, {"dtype": "bfloat16"}):
        assert table.nearest(KEY._replace(**other)) == ()
    half = Table("cpu", {KEY._replace(dtype="bfloat16"): entry(DENSE)})
    assert half.nearest(KEY._replace(dtype="float16")) == entry(DENSE)


def test_a_table_survives_its_file(monkeypatch):
    sized = Choice("sized", "DensePlan", Sizes(rows=3, share=1, name="x", wide=True))
    known = (*BACKENDS, Sized())
    table = Table(device_name(CPU), {KEY: entry(STRIDED, sized)}, 2, "0.3.0", "2.13.0")
    again = table_from_dict(json.loads(json.dumps(table.to_dict())), known, "x")
    assert (again.device, again.threads, again.library, again.torch) == (device_name(CPU), 2, "0.3.0", "2.13.0")
    assert again.entries == table.entries
    assert str(sized) == "sized dense rows=3 share=1 name='x' wide=True"
    assert str(STRIDED) == "sdpa strided"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"row": 3}, "unknown option 'row'"),
        ({"rows": "3"}, "expected rows"),
        ({"rows": True}, "expected rows"),
        ({"name": 4}, "expected name"),
        ({"rows": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(values, says):
    with pytest.raises(InvalidInput, match=says):
        read_options(Sizes, values)


def written(change) -> bytes:
    value = Table("cpu", {KEY: entry(DENSE, STRIDED)}, 1, "0.3.0", "2.13.0").to_dict()
    change(value, value["entries"][0], value["entries"][0]["ranking"][0])
    return json.dumps(value).encode()


BAD = {
    "empty": b"",
    "cut off": written(lambda v, e, m: None)[:-20],
    "no object": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "other format": written(lambda v, e, m: v.update(format=99)),
    "other device": written(lambda v, e, m: v.update(device="Deep Thought")),
    "entries missing": written(lambda v, e, m: v.pop("entries")),
    "entry no object": written(lambda v, e, m: v.update(entries=[3])),
    "length zero": written(lambda v, e, m: e.update(length=0)),
    "length no number": written(lambda v, e, m: e.update(length="64")),
    "unknown backend": written(lambda v, e, m: m.update(backend="quantum")),
    "unknown plan": written(lambda v, e, m: m.update(plan="StridedPlan")),
    "unknown option": written(lambda v, e, m: m.update(options={"rows": 3})),
    "options no object": written(lambda v, e, m: m.update(options=None)),
    "seconds missing": written(lambda v, e, m: m.pop("median")),
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The user's file, and files in force as outside of tests."""
    path = tmp_path / "tuning.json"
    monkeypatch.setattr(files, "user_file", lambda device: path)
    monkeypatch.setattr(files._files, "given", None)
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_good_is_named_once_and_ignored(name, file):
    x = torch.randn(1, 20, 2, 8)
    file.write_bytes(BAD[name])
    with pytest.warns(RuntimeWarning, match=r"tuning file .*tuning\.json") as caught:
        out = attend(x, x, x, PATTERN)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attend(x, x, x, PATTERN), out)
        file.unlink()
        assert torch.equal(attend(x, x, x, PATTERN), out)


def test_a_folder_in_its_place_is_ignored_too(file):
    file.mkdir()
    with pytest.warns(RuntimeWarning, match="ignored the tuning file"):
        assert load_table(file, CPU, BACKENDS) is None


def test_a_file_is_read_once_and_again_when_it_changes(file, monkeypatch):
    problem = problem_of()
    plans = candidate_plans(PATTERN, problem)
    file.write_text(json.dumps(Table("cpu", {KEY: entry(DENSE)}, 1, "0", "0").to_dict()))
    assert select(problem, plans)[0].name == "dense"
    reads = []
    monkeypatch.setattr(files, "_read", lambda path, *rest: reads.append(path) or Table("cpu", {KEY: entry(STRIDED)}))
    for _ in range(3):
        assert select(problem, plans)[0].name == "dense"
    assert not reads
    file.write_text("something else")
    os.utime(file, ns=(1, 1))
    assert isinstance(select(problem, plans)[1], StridedPlan)
    assert reads == [file]


def test_the_users_file_comes_before_the_shipped_one(file):
    assert [t.source for t in tables_in_force(CPU, BACKENDS)] == [str(files.SHIPPED["cpu"])]
    file.write_text(json.dumps(Table(device_name(CPU), {}, 1, "0", "0").to_dict()))
    assert [t.source for t in tables_in_force(CPU, BACKENDS)] == [str(file), str(files.SHIPPED["cpu"])]
    assert len(tables_in_force(torch.device("xpu"), BACKENDS)) <= 1
    assert processor_name() in device_name(torch.device("meta"))
    assert user_file(CPU).suffix == ".json"
    assert user_file(CPU).parent.name == "tuning"


def test_the_first_without_reasons_is_taken(monkeypatch):
    problem = problem_of()
    plans = candidate_plans(PATTERN, problem)
    with using(Table("cpu", {KEY: entry(DENSE, STRIDED)})):
        assert ranking(problem, plans, BACKENDS)[0] == entry(DENSE, STRIDED)
        assert select(problem, plans)[0].name == "dense"
        assert isinstance(select(problem, plans, "sdpa")[1], StridedPlan)
    monkeypatch.setattr(SdpaBackend, "reasons_against", lambda self, problem, plan: ["not today"])
    with using(Table("cpu", {KEY: entry(STRIDED, DENSE)})):
        assert select(problem, plans)[0].name == "dense"
    monkeypatch.setattr(DenseBackend, "import_error", lambda self: "gone")
    with using(Table("cpu", {KEY: entry(DENSE)})), pytest.raises(backends.NoBackend, match="gone"):
        select(problem, plans, "dense")


def test_tables_of_tiles_are_made_when_they_were_measured_as_faster(monkeypatch):
    class Tiled(DenseBackend):
        name = "tiled"
        plans = (StridedPlan, TilePlan)

    monkeypatch.setattr(backends, "BACKENDS", (*BACKENDS, Tiled()))
    problem = problem_of()
    plans = candidate_plans(PATTERN, problem)
    with using(Table("cpu", {KEY: entry(Choice("tiled", "TilePlan", NoOptions()))})):
        backend, plan = select(problem, plans)
    assert backend.name == "tiled"
    assert isinstance(plan, TilePlan)


def test_options_of_a_choice_reach_forward_and_backward(monkeypatch):
    seen = []

    class Watched(Sized):
        def forward(self, problem, plan):
            seen.append(self.options)
            return super().forward(problem, plan)

        def backward(self, problem, *rest):
            seen.append(self.options)
            return super().backward(problem, *rest)

    monkeypatch.setattr(backends, "BACKENDS", (*BACKENDS, Watched()))
    forward, training = (Choice("sized", "DensePlan", Sizes(rows=n)) for n in (3, 5))
    x = torch.randn(1, 64, 2, 8)
    with using(Table("cpu", {KEY: entry(forward), KEY._replace(training=True): entry(training)})):
        attend(x, x, x, PATTERN)
        attend(x.clone().requires_grad_(), x, x, PATTERN).sum().backward()
    assert seen == [Sizes(rows=3), Sizes(rows=5), Sizes(rows=5)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_choice_gives_the_same_result(backend):
    """A table may name any backend, plan and options; results stay within the contract's limit."""
    if backend.import_error() is not None:
        pytest.skip(f"{backend.name}: {backend.import_error()}")
    problem = problem_of(needs_grad=True)
    dout, dlse = cotangents(problem)
    expected = truth(problem, PATTERN, dout, dlse)
    key = KEY._replace(training=True)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    for kind in backend.plans:
        for options in backend.candidates(problem):
            with using(Table("cpu", {key: entry(Choice(backend.name, kind.__name__, options))})):
                out, lse = attend(*leaves, PATTERN, scale=problem.scale, return_lse=True)
                dq, dk, dv = torch.autograd.grad((out, lse), leaves, (dout, dlse))
            grads = expected.grads
            for found, wanted in zip((out, lse, dq, dk, dv), (expected.out, expected.lse, grads.q, grads.k, grads.v)):
                torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-4)


def test_dense_plans_can_be_forced_where_strided_ones_come_first():
    problem = problem_of(256)
    plans = candidate_plans(Causal(), problem)
    assert isinstance(plans[0], StridedPlan)
    choice = Choice("sdpa", "DensePlan", SdpaBackend().options)
    with using(Table("cpu", {KEY._replace(length=256, pattern="causal"): entry(choice)})):
        backend, plan = select(problem, plans)
    assert backend.name == "sdpa"
    assert isinstance(plan, DensePlan)
