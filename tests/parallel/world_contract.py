"""What worlds of ranks are held to: every method, layout and backend on every kind of problem equals one process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch import (
    BlockSparse,
    Causal,
    Dilated,
    Documents,
    Full,
    InvalidInput,
    NoBackend,
    Pattern,
    Relative,
    Softcap,
    Window,
    attend,
    longnet,
)
from dilated_attention_pytorch.parallel import context_parallel_attend
from dilated_attention_pytorch.testing import Case
from parallel.transports import strict_transport
from parallel.worlds import run_world

LAYOUTS = ("contiguous", "zigzag", "striped")
METHODS = ("ring", "gather", "all_to_all", "auto")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}  # of law 1's measure
MOST_GROWTH = 1.02  # of half types' errors from one process to many; rounded partial results give more
LENGTH = 53  # tokens; no world divides it


@cache
def cases(num_heads: int = 6) -> Mapping[str, Case]:
    """Every kind of problem by name; ``num_heads`` is what all-to-all divides."""
    paper = longnet([8, 16, 32], [1, 2, 4])
    g = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 3, (num_heads, 11, 11), generator=g)
    blocks[:, 4], blocks[..., 1] = 0, 0
    slopes = torch.linspace(0.5, 0.05, num_heads, dtype=torch.float64)
    table = torch.randn(num_heads, 9, generator=g, dtype=torch.float64)
    few = 2 if num_heads % 4 else 4

    def case(name: str, pattern: Pattern, **change) -> Case:
        return replace(Case(name, pattern, query_length=LENGTH, num_heads=num_heads), **change)

    listed = (
        case("full", Full()),
        case("causal", Causal()),
        case("window", Window(9)),
        case("window_causal", Window(11) & Causal()),
        case("longnet", paper),
        case("longnet_causal", paper & Causal()),
        case("one_long_branch", longnet([16, 64], [1, 4]) & Causal()),
        case("not_nesting", longnet([10, 26, 21], [1, 3, 2])),
        case("not_nesting_causal", longnet([10, 26, 21], [1, 3, 2]) & Causal()),
        case("torchscale_offset", longnet([16, 32], [2, 3], head_offset="torchscale")),
        case("head_groups", longnet([8, 16, 32], [1, 2, 4], head_groups=True) & Causal()),
        case("sum_with_window", Window(3) + Dilated(32, 2) + Full()),
        case("product_of_grids", Dilated(24, 2) & Dilated(40, 3)),
        case("padded", paper, visible=(LENGTH, 20)),
        case("padded_causal", paper & Causal(), visible=(31, 0)),
        case("padded_full", Full(), visible=(0, 30)),
        case("documents", Documents([7, 0, 23, 17]) & Causal()),
        case("documents_of", Documents([7, 0, 23, 17]).of(paper & Causal())),
        case("documents_cut_grid", Documents([20, 33]) & paper),
        case("documents_batched", Documents([[7, 13, 33], [1, 2, 50]]).of(paper)),
        case("blocks", BlockSparse(5, blocks)),
        case("blocks_causal", BlockSparse((5, 7), blocks[:2, :, :8].sum(0).clamp(max=1)) & Causal()),
        case("blocks_batched", BlockSparse(7, blocks[:, :8, :8].unflatten(0, (2, -1))[:, :1]), visible=(LENGTH, 33)),
        case("blocks_in_documents", Documents([20, 0, 33]).of(BlockSparse(5, blocks) & Causal())),
        case("fewer_kv_heads", paper & Causal(), kv_heads=few),
        case("one_kv_head", Causal(), kv_heads=1),
        case("values_narrower", paper, value_dim=5),
        case("cross", Full(), query_length=29, key_length=LENGTH),
        case("cross_last", paper & Causal(), query_length=20, key_length=LENGTH),
        case("cross_between", paper & Causal(), query_length=17, key_length=LENGTH, query_start=13),
        case("cross_beyond", paper, query_length=40, key_length=23, query_start=10, visible=(23, 9)),
        case("one_token", paper, query_length=1),
        case("fewer_tokens_than_chunks", paper & Causal(), query_length=4),
        case("alibi", paper & Causal(), score=Relative(slopes=slopes)),
        case("relative_table", Full(), score=Relative(table=table)),
        case("softcap", paper, score=Softcap(0.7), scale=-0.4),
        case("dropout", paper & Causal(), dropout_p=0.3),
        case("dropout_full", Full(), dropout_p=0.5, visible=(LENGTH, 41)),
    )
    return {c.name: c for c in listed}


@dataclass(frozen=True, eq=False)
class Asked:
    """A problem, the gradients that come back to it, and its truth, all whole."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dout: Tensor
    dlse: Tensor
    truth: dict[str, Tensor]


def ask(case: Case, dtype=torch.float64, seed: int | None = None) -> Asked:
    """The case with its truth: one process's `attend` in float64, of inputs that were rounded to ``dtype``.

    With a ``seed`` the numbers are others, from that seed.
    """
    problem = case.problem(dtype)
    q, k, v = problem.q, problem.k, problem.v
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype) for x in (q, k, v))
    mask = None
    if case.visible is not None:
        mask = torch.arange(k.shape[1]) >= torch.tensor(case.visible)[:, None]
    g = torch.Generator().manual_seed(8)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=g, dtype=torch.float64).to(dtype)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=g, dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    out, lse = attend(*leaves, case.pattern, key_padding_mask=mask, return_lse=True, **options(case))
    grads = torch.autograd.grad([out, lse], leaves, [dout.double(), dlse])
    truth = dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads)))
    return Asked(case, q, k, v, mask, dout, dlse, truth)


def options(case: Case) -> dict:
    """What a case asks for besides its tensors and its mask."""
    return {"scale": case.scale, "score": case.score, "dropout_p": case.dropout_p, "query_start": case.query_start}


def rows_of(layout: str, length: int, rank: int, size: int) -> Tensor:
    """Which rows a rank holds, in its order, said independently of the engine."""
    rows = torch.arange(length)
    if layout == "contiguous":
        return rows.tensor_split(size)[rank]
    if layout == "striped":
        return rows[rank::size]
    chunks = rows.tensor_split(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


@dataclass(frozen=True)
class Trial:
    """One way to compute one of the problems asked."""

    case: str
    layout: str = "contiguous"
    method: str = "ring"
    backend: str = "auto"
    mesh: tuple[int, int] | None = None  # (outer, inner) of a hybrid
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        hybrid = "" if self.mesh is None else f" {self.mesh[0]}x{self.mesh[1]}"
        return f"{self.case} {self.layout} {self.method}{hybrid} {self.backend}"


def shards(asked: Asked, layout: str, group=None) -> tuple[list[Tensor], Tensor | None]:
    """This rank's leaves q, k, v and its part of the mask."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = [rows_of(layout, x.shape[1], rank, size) for x in (asked.q, asked.k, asked.v)]
    leaves = [x[:, r].clone().requires_grad_() for x, r in zip((asked.q, asked.k, asked.v), rows)]
    return leaves, None if asked.mask is None else asked.mask[:, rows[1]]


def attempt(asked: Asked, trial: Trial, mesh=None, group=None) -> dict[str, Tensor] | str:
    """This rank's out, lse and gradients, or the reason why the method refuses the problem."""
    leaves, mask = shards(asked, trial.layout, group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = rows_of(trial.layout, asked.q.shape[1], rank, size)
    before = [x.detach().clone() for x in leaves]
    torch.default_generator.manual_seed(5)
    try:
        out, lse = context_parallel_attend(
            *leaves,
            asked.case.pattern,
            mesh=mesh,
            group=group,
            layout=trial.layout,
            method=trial.method,
            key_padding_mask=mask,
            backend=trial.backend,
            return_lse=True,
            **options(asked.case),
        )
    except (InvalidInput, NoBackend) as error:
        return f"{type(error).__name__}: {error}"
    grads = torch.autograd.grad([out, lse], leaves, [asked.dout[:, mine], asked.dlse[..., mine].to(lse)])
    assert all(torch.equal(x, y) for x, y in zip(leaves, before)), "an input was written to"
    assert (out.dtype, lse.dtype) == (asked.q.dtype, torch.promote_types(asked.q.dtype, torch.float32))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads)))


def beside_the_truth(
    asked: Asked, layout: str, found: dict[str, Tensor], group=None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, this rank's tensor and what it should be, both in float64; rows that rightly are -inf are 0 in both."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for name, x in found.items():
        dim = 2 if name == "lse" else 1
        whole = asked.truth[name]
        expected = whole.index_select(dim, rows_of(layout, whole.shape[dim], rank, size))
        assert x.shape == expected.shape, f"{name} has shape {tuple(x.shape)}, expected {tuple(expected.shape)}"
        both = (expected == -torch.inf) & (x == -torch.inf)
        yield name, torch.where(both, 0.0, x.double()), torch.where(both, 0.0, expected)


def errors(asked: Asked, layout: str, found: dict[str, Tensor], group=None) -> dict[str, float]:
    """Law 1's error of each of this rank's tensors; NaN where one holds NaN."""
    top, told = float(asked.dout.abs().max()), {}
    for name, x, expected in beside_the_truth(asked, layout, found, group):
        whole = asked.truth[name]
        scale = max(float(whole.masked_fill(whole == -torch.inf, 0.0).abs().max()), top, 1e-3)
        told[name] = float((x - expected).abs().max()) / scale if x.numel() else 0.0
    return told


@cache
def _ask(name: str, dtype: torch.dtype, num_heads: int) -> Asked:
    return ask(cases(num_heads)[name], dtype)


def ask_for(trials: Sequence[Trial], num_heads: int) -> dict[tuple[str, torch.dtype], Asked]:
    """What the trials are about; asked once for all worlds."""
    return {(t.case, t.dtype): _ask(t.case, t.dtype, num_heads) for t in trials}


def tell(asked: dict[tuple[str, torch.dtype], Asked], trials: list[Trial]) -> list[dict[str, float] | str]:
    """In each rank: what came of every trial in turn, its errors or the reason of a refusal."""
    meshes: dict = {None: None}
    told: list[dict[str, float] | str] = []
    with strict_transport() as transport:
        for trial in trials:
            if trial.mesh not in meshes:
                meshes[trial.mesh] = dist.init_device_mesh("cpu", trial.mesh, mesh_dim_names=("outer", "inner"))
            problem = asked[trial.case, trial.dtype]
            try:
                found = attempt(problem, trial, meshes[trial.mesh])
            except Exception as error:
                raise AssertionError(f"in trial {trial}") from error
            told.append(found if isinstance(found, str) else errors(problem, trial.layout, found))
            transport.check(str(trial))
    assert transport.messages > 0 or dist.get_world_size() == 1, "nothing went through the strict transport"
    return told


Many = Mapping[tuple[str, torch.dtype], Sequence[Asked]]
"""Problems of a case that differ in their numbers."""


@cache
def ask_many(names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], length: int, num_heads: int) -> Many:
    """Each case at this length with the numbers of five seeds."""
    known = {name: replace(cases(num_heads)[name], query_length=length) for name in names}
    return {(name, dtype): [ask(known[name], dtype, seed) for seed in range(5)] for name in names for dtype in dtypes}


def square_errors(asked: Many, trials: Sequence[Trial]) -> list[dict[str, Tensor]]:
    """In each rank, for each trial: the sum of squared errors over all its problems, and of how many, by tensor."""
    told = []
    for trial in trials:
        sums: dict[str, Tensor] = {}
        for problem in asked[trial.case, trial.dtype]:
            found = attempt(problem, trial)
            assert not isinstance(found, str), found
            for name, x, expected in beside_the_truth(problem, trial.layout, found):
                mine = torch.tensor([float((x - expected).square().sum()), x.numel()], dtype=torch.float64)
                sums[name] = sums.get(name, 0) + mine
        told.append(sums)
    return told


def rms_errors(size: int, asked: Many, trials: Sequence[Trial]) -> list[dict[str, float]]:
    """For each trial the root of the mean squared error over all its problems and ranks, by tensor."""
    found = []
    for ends in zip(*run_world(size, square_errors, asked, trials, timeout=300), strict=True):
        totals = {name: sum(end[name] for end in ends) for name in ends[0]}
        found.append({name: float((total[0] / total[1]).sqrt()) for name, total in totals.items()})
    return found


def half_type_errors(size: int, *methods: str) -> list[dict[str, float]]:
    """`rms_errors` of five small causal problems in bfloat16 by each method."""
    asked = ask_many(("longnet_causal",), (torch.bfloat16,), 150, 6)
    return rms_errors(size, asked, [Trial("longnet_causal", "zigzag", m, dtype=torch.bfloat16) for m in methods])


def judge(trials: list[Trial], told: list[list[dict[str, float] | str]], refused: Callable[[Trial], bool]) -> None:
    """All trials are within the limit on every rank; those that ``refused`` names, and no others, gave one reason."""
    wrong = []
    for trial, ends in zip(trials, zip(*told, strict=True), strict=True):
        if refused(trial):
            if not isinstance(ends[0], str) or len(set(ends)) > 1:
                wrong.append(f"{trial}: expected one reason on all ranks. Got {ends}")
        elif any(isinstance(end, str) for end in ends):
            wrong.append(f"{trial}: refused: {ends}")
        else:
            limit = LIMITS[trial.dtype]
            over = {(rank, x): e for rank, end in enumerate(ends) for x, e in end.items() if not e <= limit}
            if over:
                wrong.append(f"{trial}: {over}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(trials)} trials", *wrong])


GATHER_REFUSES = (
    *(
        "product_of_grids",
        "documents_cut_grid",
        "blocks",
        "blocks_causal",
        "blocks_batched",
        "blocks_in_documents",
    ),  # no closed form
    *("alibi", "relative_table", "dropout", "dropout_full"),  # these read positions, and a grid's rows have others
)
SDPA_REFUSES = ("values_narrower", "alibi", "relative_table", "softcap", "dropout", "dropout_full")


def refused_with(num_heads: int, size: int) -> Callable[[Trial], bool]:
    """Which trials a world of this size must refuse: who refuses another, or one fewer, is noticed."""

    def refused(trial: Trial) -> bool:
        kv_heads = cases(num_heads)[trial.case].kv_heads or num_heads
        exchange = size if trial.method == "all_to_all" else 1 if trial.mesh is None else trial.mesh[1]
        return (
            num_heads % exchange != 0
            or (kv_heads % exchange != 0 and exchange % kv_heads != 0)
            or (trial.method == "gather" and trial.case in GATHER_REFUSES and size > 1)
            or (trial.backend == "sdpa" and trial.case in SDPA_REFUSES)
        )

    return refused
