"""PyTorch's own fused kernels: on pieces of strided and tile plans, or one masked call for a short DensePlan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients, Options, check_tile
from dilated_attention_pytorch.backends.kernel import Kernel, shared_reasons
from dilated_attention_pytorch.backends.ordered import backward_in_order, forward_in_order
from dilated_attention_pytorch.backends.sdpa.kernels import CUDNN_ROWS, Need, choose_kernel
from dilated_attention_pytorch.backends.sdpa.masked import masked_backward, masked_forward
from dilated_attention_pytorch.backends.strided import StridedWalk
from dilated_attention_pytorch.backends.tiled import TiledWalk
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.plans import DensePlan, OrderedPlan, Plan, StridedPlan, TilePlan
from dilated_attention_pytorch.plans.planner import LARGEST_TILE
from dilated_attention_pytorch.problem import Problem

CPU_ROWS = 4096
"""Key rows gathered for one call on a CPU: what a core's second cache holds is read back soonest."""
GPU_ROWS = 1 << 18
"""The same on a GPU, where few large calls are better."""
KERNELS = ("auto", "cudnn_attention", "flash_attention", "efficient_attention")


@dataclass(frozen=True)
class SdpaOptions(Options):
    """``packed_rows`` (tokens x heads x samples) are packed at once on a CPU; ``kernel`` names one of CUDA's.

    ``tile`` is rows and keys of a tile at most, where a plan has tiles.

    On a GPU everything that shares pieces is packed at once; so are all rows of a head where a plan has tiles.

    Example:
        >>> SdpaOptions(packed_rows=4096).kernel
        'auto'
    """

    packed_rows: int = 16384
    kernel: str = "auto"
    tile: int = LARGEST_TILE

    def __post_init__(self) -> None:
        check_tile("SdpaOptions", self.tile)
        if isinstance(self.packed_rows, bool) or not isinstance(self.packed_rows, int) or self.packed_rows < 1:
            raise InvalidInput(f"SdpaOptions: expected packed_rows of at least 1. Got {self.packed_rows!r}.")
        if self.kernel not in KERNELS:
            raise InvalidInput(f"SdpaOptions: expected kernel to be one of {KERNELS}. Got {self.kernel!r}.")


class SdpaBackend(Backend):
    """PyTorch's own fused kernels: on pieces of strided and tile plans, or one masked call for a short DensePlan.

    On a CPU half types are computed in float32. CUDA's kernels round the results of a piece, so those of a partial
    problem are sums of rounded pieces in float32 there.
    """

    name = "sdpa"
    plans = (StridedPlan, OrderedPlan, TilePlan, DensePlan)
    options_type = SdpaOptions
    options: SdpaOptions

    def candidates(self, problem: Problem) -> tuple[Options, ...]:
        if problem.q.device.type == "cuda":
            return tuple(replace(self.options, kernel=kernel) for kernel in KERNELS)
        sizes = dict.fromkeys((self.options.packed_rows, 4096, 16384, 65536))
        cuts = tuple(replace(self.options, packed_rows=rows) for rows in sizes)
        return (*cuts, *(replace(self.options, tile=tile) for tile in (64, 256)))

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        reasons = shared_reasons(problem)
        if isinstance(plan, DensePlan) and plan.log_counts is None:
            reasons.append("too long for one masked call; use backend='dense'")
        kernel = self._kernel(problem, plan)
        if isinstance(kernel, str):
            reasons.append(kernel)
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        if isinstance(plan, OrderedPlan):
            return forward_in_order(self, problem, plan)
        kernel = self._kernel(problem, plan)
        assert isinstance(kernel, Kernel)
        if isinstance(plan, DensePlan):
            assert plan.log_counts is not None
            return masked_forward(problem, plan.log_counts, kernel, _work_dtype(problem))
        if isinstance(plan, TilePlan):
            return self._tiled(problem, kernel).forward(problem, plan)
        assert isinstance(plan, StridedPlan)
        return self._strided(problem, kernel).forward(problem, plan)

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        if isinstance(plan, OrderedPlan):
            return backward_in_order(self, problem, plan, dout, dlse, out, lse)
        kernel = self._kernel(problem, plan, widened=dlse is not None)
        assert isinstance(kernel, Kernel)
        if isinstance(plan, DensePlan):
            assert plan.log_counts is not None
            return masked_backward(problem, plan.log_counts, kernel, _work_dtype(problem), dout, dlse, out, lse)
        if isinstance(plan, TilePlan):
            return self._tiled(problem, kernel).backward(problem, plan, dout, dlse, out, lse)
        assert isinstance(plan, StridedPlan)
        return self._strided(problem, kernel).backward(problem, plan, dout, dlse, out, lse)

    def _strided(self, problem: Problem, kernel: Kernel) -> StridedWalk:
        rows = self.options.packed_rows if problem.q.device.type == "cpu" else None
        return StridedWalk(kernel, _work_dtype(problem), rows)

    def _tiled(self, problem: Problem, kernel: Kernel) -> TiledWalk:
        on_cpu = problem.q.device.type == "cpu"
        rows = self.options.packed_rows if on_cpu else None
        return TiledWalk(kernel, _work_dtype(problem), rows, CPU_ROWS if on_cpu else GPU_ROWS)

    def _kernel(self, problem: Problem, plan: Plan, widened: bool = False) -> Kernel | str:
        """The kernel for this problem; ``widened`` by the columns that a gradient of lse brings."""
        p, device = problem, problem.q.device
        need = Need("cpu" if device.type == "meta" else device.type, p.q.dtype, p.q.shape[3])
        if device.type == "cuda":
            chunks = plan.chunks if isinstance(plan, StridedPlan) else ()
            pieces = [piece for chunk in chunks for piece in chunk.pieces]
            need = need._replace(
                head_dim=p.q.shape[3] + (Kernel.columns if widened else 0),
                masks=isinstance(plan, DensePlan | OrderedPlan | TilePlan),
                bands=any(piece.band is not None for piece in pieces),
                shortest=min((n for x in pieces for n in (x.queries.length, x.keys.length)), default=CUDNN_ROWS),
                capability=torch.cuda.get_device_capability(device),
                is_rocm=torch.version.hip is not None,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        wanted = self.options.kernel
        if widened and isinstance(choose_kernel(need, wanted), str):
            wanted = "auto"  # the kernel asked for has no room for the column
        return choose_kernel(need, wanted)


def _work_dtype(problem: Problem) -> torch.dtype:
    """On the CPU half types are cast while packing: the kernel is slower in bfloat16 than in float32 there."""
    return problem.accumulate_dtype if problem.q.device.type == "cpu" else problem.q.dtype
