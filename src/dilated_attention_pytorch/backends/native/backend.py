"""Strided and tile plans computed by the C kernel of source/, which reads q, k and v in place."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients, Options, check_tile
from dilated_attention_pytorch.backends.native import library
from dilated_attention_pytorch.backends.native.structs import Array, Lists, NativeProblem
from dilated_attention_pytorch.backends.native.tables import strided_tables, tiled_tables
from dilated_attention_pytorch.backends.ordered import backward_in_order, forward_in_order
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import empty, zeros
from dilated_attention_pytorch.plans import OrderedPlan, Plan, StridedPlan, TilePlan
from dilated_attention_pytorch.plans.planner import LARGEST_TILE
from dilated_attention_pytorch.problem import Problem, positions_end, positions_tensor
from dilated_attention_pytorch.scores import Relative

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMALL_WORK = 1 << 22
"""Multiplications below which starting a second thread costs more than it saves."""


@dataclass(frozen=True)
class NativeOptions(Options):
    """How the C kernel is built and how it cuts the work.

    ``vector``: "auto" takes what the CPU has; "avx512", "avx2" or "portable" ask for that build. ``part_rows``: query
    rows of one unit of work; ``pack_keys``: keys packed at once, for one piece of one head; ``tile``: rows and
    keys of a tile at most, where a plan has tiles.

    Example:
        >>> NativeOptions(pack_keys=2048)
        NativeOptions(vector='auto', part_rows=4096, pack_keys=2048, tile=128)
    """

    vector: str = "auto"
    part_rows: int = 4096
    pack_keys: int = 4096
    tile: int = LARGEST_TILE

    def __post_init__(self) -> None:
        check_tile("NativeOptions", self.tile)
        if self.vector not in ("auto", *library.VECTORS):
            names = ", ".join(map(repr, ("auto", *library.VECTORS)))
            raise InvalidInput(f"NativeOptions: expected vector to be one of {names}. Got {self.vector!r}.")
        for name in ("part_rows", "pack_keys"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 64 or value % 64:
                raise InvalidInput(f"NativeOptions: expected {name} to be a positive multiple of 64. Got {value!r}.")


class NativeBackend(Backend):
    """Our own CPU kernel in C: forward goes on from the running (out, lse), so nothing is merged; backward is exact."""

    name = "native"
    plans = (StridedPlan, OrderedPlan, TilePlan)
    options_type = NativeOptions
    options: NativeOptions

    def candidates(self, problem: Problem) -> tuple[Options, ...]:
        sizes = ((4096, 4096), (2048, 2048), (8192, 8192))
        cuts = tuple(NativeOptions(self.options.vector, *size) for size in sizes)
        return (*cuts, *(replace(cuts[0], tile=tile) for tile in (64, 256)))

    def import_error(self) -> str | None:
        found = library.load(self.options.vector)
        return found if isinstance(found, str) else None

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        p, reasons = problem, []
        if p.q.device.type not in ("cpu", "meta"):
            reasons.append(
                f"the C kernel runs on the CPU, the tensors are on {p.q.device}; use a backend of that device"
            )
        if p.q.dtype not in DTYPES:
            name = str(p.q.dtype).removeprefix("torch.")
            reasons.append(f"{name} has no kernel here; use backend='sdpa' or 'dense'")
        if p.dropout_p > 0:
            reasons.append(f"the C kernel has no dropout (dropout_p={p.dropout_p}); use backend='dense'")
        if p.bias is not None:
            reasons.append("the C kernel takes no bias and gives no gradient of one; use backend='dense'")
        if p.score is not None and not isinstance(p.score, Relative):
            reasons.append(f"the C kernel has no {type(p.score).__name__} score, only Relative; use backend='dense'")
        if p.score is not None and max(positions_end(p.query_positions), positions_end(p.key_positions)) >= 2**31:
            reasons.append("with a score, positions must be below 2^31; use backend='dense'")
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        if isinstance(plan, OrderedPlan):
            return forward_in_order(self, problem, plan)
        p = problem
        out = empty((p.batch, p.query_length, p.num_heads, p.v.shape[3]), p.result_dtype, "cpu", "results")
        lse = empty((p.batch, p.num_heads, p.query_length), torch.float32, "cpu", "results")
        call = _Call(self.options, p, plan)
        call.native.out, call.native.lse, call.native.out_dtype = (
            Array.of_rows(out),
            Array.of_lse(lse),
            DTYPES[out.dtype],
        )
        call.run("da_forward")
        return out, lse

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        if isinstance(plan, OrderedPlan):
            return backward_in_order(self, problem, plan, dout, dlse, out, lse)
        p = problem
        grads = [zeros(x.shape, torch.float32, "cpu", "results") for x in (p.q, p.k, p.v)]
        dout, out = _rows(dout.to(p.q.dtype)), _rows(out)
        lse = lse.contiguous()
        delta = empty(lse.shape, torch.float32, "cpu")
        call = _Call(self.options, p, plan)
        n = call.native
        n.out_dtype = DTYPES[out.dtype]
        n.out, n.dout, n.lse, n.delta = Array.of_rows(out), Array.of_rows(dout), Array.of_lse(lse), Array.of_lse(delta)
        if dlse is not None:
            dlse = dlse.to(torch.float32)
            n.dlse = Array.of_lse(dlse)
        n.dq, n.dk, n.dv = (Array.of_rows(x) for x in grads)
        call.run("da_backward")
        return Gradients(*(x.to(p.result_dtype) for x in grads))


def _rows(x: Tensor) -> Tensor:
    """The tensor, its last dim with stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(eq=False)
class _Call:
    """One call of the library: the struct it reads, and what the struct points to."""

    options: NativeOptions
    problem: Problem
    plan: Plan
    native: NativeProblem = field(init=False)
    held: list[object] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        p, n = self.problem, NativeProblem()
        self.native = n
        q, k, v = (_rows(x) for x in (p.q, p.k, p.v))
        self.held.extend((q, k, v))
        n.dtype, n.batch, n.queries, n.keys = DTYPES[q.dtype], p.batch, p.query_length, p.key_length
        n.heads, n.group, n.dim, n.value_dim = p.num_heads, p.kv_group, q.shape[3], v.shape[3]
        n.scale, n.part_rows = p.scale, self.options.part_rows
        n.pack_keys = min(self.options.pack_keys, max(64, -(-p.key_length // 64) * 64))
        n.q, n.k, n.v = (Array.of_rows(x) for x in (q, k, v))
        if isinstance(p.score, Relative):
            self._add_score(p.score)
        if isinstance(self.plan, StridedPlan):
            pairs = self._add_strided(self.plan)
        else:
            assert isinstance(self.plan, TilePlan)
            pairs = self._add_tiled(self.plan)
        small = pairs * (n.dim + n.value_dim) < SMALL_WORK
        n.threads = 1 if small else torch.get_num_threads()
        n.team = library.thread_team()

    def _address(self, x: Tensor | np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
        self.held.append(x)
        return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data

    def _add_score(self, score: Relative) -> None:
        p, n = self.problem, self.native
        table = (score.tables[0].detach().to("cpu", torch.float64) * math.log2(math.e)).float().contiguous()
        if score.slopes is not None:
            n.slopes = self._address(table)
        else:
            n.table, n.reach = self._address(table), table.shape[1] // 2
            n.table_stride = table.shape[1] if table.shape[0] > 1 else 0
        n.q_at = self._address(positions_tensor(p.query_positions).to(torch.int32))
        n.k_at = self._address(positions_tensor(p.key_positions).to(torch.int32))

    def _add_strided(self, plan: StridedPlan) -> int:
        n, tables = self.native, strided_tables(plan, self.problem, self.options.part_rows)
        n.chunks, n.pieces, n.num_chunks = self._address(tables.chunks), self._address(tables.pieces), len(plan.chunks)
        n.first_unit, n.parts = self._address(tables.first_unit), tables.parts
        n.regions, n.num_regions = self._address(tables.regions), len(tables.regions)
        n.region_chunks, n.first_base = self._address(tables.region_chunks), self._address(tables.first_base)
        return tables.pairs

    def _add_tiled(self, plan: TilePlan) -> int:
        n, tables = self.native, tiled_tables(plan, self.problem)
        n.is_tiled, n.parts = 1, tables.parts
        n.block_q, n.block_k = plan.block_size
        n.partial = Lists.of(plan.kv_num, plan.kv_idx, plan.kv_table)
        n.full = Lists.of(plan.full_num, plan.full_idx, plan.full_count)
        n.counts, n.count_row = self._address(tables.counts), tables.counts.shape[2]
        if self.problem.key_lengths is not None:
            n.visible = self._address(np.array(self.problem.key_lengths, dtype=np.int64))
        return tables.pairs

    def run(self, name: str) -> None:
        """Call a function of the library; MemoryError when it finds no work memory, and then nothing is written."""
        loaded = library.load(self.options.vector)
        assert isinstance(loaded, ctypes.CDLL), loaded
        if getattr(loaded, name)(ctypes.byref(self.native)) != 0:
            raise MemoryError(f"native: no memory for the work buffers of {self.native.threads} threads")
