"""The flash-attn packages on strided pieces: FlashAttention-2, -3 (Hopper) and -4 (Hopper, Blackwell).

Each is called by its low-level functions, whose backward takes any out and lse (github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.backends.base import Backend, Gradients, Options
from dilated_attention_pytorch.backends.kernel import (
    Kernel,
    Mask,
    cuda_capability,
    is_installed,
    rows_first,
    shared_reasons,
    window_of,
)
from dilated_attention_pytorch.backends.strided import StridedWalk
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.memory import empty
from dilated_attention_pytorch.plans import Plan, StridedPlan
from dilated_attention_pytorch.plans.strided import Band
from dilated_attention_pytorch.problem import Problem

INSTALL = {
    2: "pip install flash-attn --no-build-isolation",
    3: "python setup.py install, in folder hopper of the flash-attention repository",
    4: "pip install flash-attn-4",
}
"""What mends a missing package, by its generation."""


class Call(NamedTuple):
    """What is asked beside the tensors; the window is (left, right), (-1, -1) none."""

    scale: float
    is_causal: bool
    window: tuple[int, int]


class FlashKernel(Kernel):
    """One generation of flash-attn; tensors are handed over as (batch, N, heads, D)."""

    takes_bands = True
    max_head_dim = 256
    version: ClassVar[int]
    module: ClassVar[str]
    functions: ClassVar[tuple[str, str]] = ("_flash_attn_forward", "_flash_attn_backward")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        function = getattr(import_module(self.module), self.functions[0])
        out, lse = self.run_forward(function, rows_first(q, k, v), Call(scale, is_causal, _window(mask, q, k)))
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        is_causal: bool,
        mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        function = getattr(import_module(self.module), self.functions[1])
        given = rows_first(dout, q, k, v, out)
        grads = tuple(empty(x.shape, x.dtype, x.device) for x in given[1:4])
        self.run_backward(function, given, lse.contiguous(), grads, Call(scale, is_causal, _window(mask, q, k)))
        dq, dk, dv = rows_first(*grads)
        return dq, dk, dv

    @abstractmethod
    def run_forward(self, function: Any, qkv: tuple[Tensor, ...], call: Call) -> tuple[Tensor, Tensor]:
        """(out (batch, N, heads, D), lse (batch, heads, N)) by the package's function."""

    @abstractmethod
    def run_backward(
        self, function: Any, given: tuple[Tensor, ...], lse: Tensor, grads: tuple[Tensor, ...], call: Call
    ) -> None:
        """Fill ``grads`` (dq, dk, dv) from ``given`` (dout, q, k, v, out)."""


class FlashAttention2(FlashKernel):
    """``flash_attn`` 2.7 and later: Ampere and later, and AMD."""

    name, version, module = "flash_attn_2", 2, "flash_attn.flash_attn_interface"

    def run_forward(self, function: Any, qkv: tuple[Tensor, ...], call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = function(
            *qkv,
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=call.is_causal,
            window_size_left=call.window[0],
            window_size_right=call.window[1],
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def run_backward(
        self, function: Any, given: tuple[Tensor, ...], lse: Tensor, grads: tuple[Tensor, ...], call: Call
    ) -> None:
        function(
            *given,
            lse,
            *grads,
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=call.is_causal,
            window_size_left=call.window[0],
            window_size_right=call.window[1],
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=None,
        )


class FlashAttention3(FlashKernel):
    """``flash_attn_interface``: Hopper. Its releases name arguments differently but agree on their places."""

    name, version, module = "flash_attn_3", 3, "flash_attn_interface"
    takes_bands = False  # windows have changed between releases

    def run_forward(self, function: Any, qkv: tuple[Tensor, ...], call: Call) -> tuple[Tensor, Tensor]:
        # between v and softmax_scale: caches, packed lengths, pages, rotary tables, float8 scales
        out, lse, *_ = function(*qkv, *[None] * 20, call.scale, call.is_causal)
        return out, lse

    def run_backward(
        self, function: Any, given: tuple[Tensor, ...], lse: Tensor, grads: tuple[Tensor, ...], call: Call
    ) -> None:
        function(*given, lse, *[None] * 6, *grads, call.scale, call.is_causal)  # None: packed, used and longest lengths


class FlashAttention4(FlashKernel):
    """``flash_attn.cute``: Hopper and Blackwell, compiled at first use."""

    name, version, module = "flash_attn_4", 4, "flash_attn.cute.interface"
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    max_head_dim = 128

    def run_forward(self, function: Any, qkv: tuple[Tensor, ...], call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = function(
            *qkv, softmax_scale=call.scale, causal=call.is_causal, return_lse=True, **_sides(call.window)
        )
        return out, lse

    def run_backward(
        self, function: Any, given: tuple[Tensor, ...], lse: Tensor, grads: tuple[Tensor, ...], call: Call
    ) -> None:
        dout, q, k, v, out = given
        dq, dk, dv = grads
        function(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=call.scale,
            causal=call.is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=dq,
            dk=dk,
            dv=dv,
            **_sides(call.window),
        )


KERNELS: dict[int, FlashKernel] = {k.version: k for k in (FlashAttention2(), FlashAttention3(), FlashAttention4())}
PREFERRED = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2,)}
"""Generations by the major capability of the device, the most special first."""


@dataclass(frozen=True)
class FlashAttnOptions(Options):
    """``version`` is the generation (2, 3 or 4); 0 takes the most special one that is installed for the device."""

    version: int = 0

    def __post_init__(self) -> None:
        if self.version not in (0, *KERNELS):
            raise InvalidInput(f"FlashAttnOptions: expected version to be 0, 2, 3 or 4. Got {self.version!r}.")


class FlashAttnBackend(Backend):
    """The flash-attn packages, one call per piece of a StridedPlan.

    Its kernels round the results of a piece, so those of a partial problem are sums of rounded pieces in float32.
    """

    name = "flash_attn"
    plans = (StridedPlan,)
    options_type = FlashAttnOptions
    options: FlashAttnOptions

    def candidates(self, problem: Problem) -> tuple[Options, ...]:
        return tuple(replace(self.options, version=n) for n in dict.fromkeys((self.options.version, 4, 3, 2)))

    def import_error(self) -> str | None:
        if not is_installed("flash_attn") and not is_installed("flash_attn_interface"):
            return f"flash-attn is not installed: {INSTALL[2]} (or {INSTALL[4]} on Hopper and Blackwell)"
        return None

    def reasons_against(self, problem: Problem, plan: Plan) -> list[str]:
        reasons = shared_reasons(problem)
        device, head_dim = problem.q.device, problem.q.shape[3]
        if problem.q.dtype not in (torch.float16, torch.bfloat16):
            kind = str(problem.q.dtype).removeprefix("torch.")
            reasons.append(f"flash-attn computes float16 and bfloat16 only, not {kind}; use backend='sdpa'")
        if head_dim % 8 != 0 or head_dim > 256:
            reasons.append(f"head_dim {head_dim} is not a multiple of 8 up to 256; use backend='sdpa'")
        if cuda_capability(device) is None:
            reasons.append(f"flash-attn runs on CUDA devices only, not on {device.type}; use backend='sdpa'")
        if not reasons:
            kernel = self._kernel(problem, plan)
            reasons += [kernel] if isinstance(kernel, str) else []
        return reasons

    def forward(self, problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
        assert isinstance(plan, StridedPlan)
        return self._walk(problem, plan).forward(problem, plan)

    def backward(
        self, problem: Problem, plan: Plan, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        assert isinstance(plan, StridedPlan)
        return self._walk(problem, plan).backward(problem, plan, dout, dlse, out, lse)

    def _walk(self, problem: Problem, plan: Plan) -> StridedWalk:
        kernel = self._kernel(problem, plan)
        assert isinstance(kernel, Kernel)
        return StridedWalk(kernel, problem.q.dtype)

    def _kernel(self, problem: Problem, plan: Plan) -> FlashKernel | str:
        """The generation that serves this problem, or why none does."""
        capability = cuda_capability(problem.q.device)
        assert capability is not None
        usable = PREFERRED.get(capability[0], ())
        wanted = [n for n in usable if self.options.version in (0, n)]
        if not wanted:
            asked = f"FlashAttention-{self.options.version}" if self.options.version else "flash-attn"
            return f"{asked} has no kernels for capability {capability[0]}.{capability[1]}; use backend='sdpa'"
        against = {n: _against(KERNELS[n], problem, plan) for n in wanted}
        found = next((KERNELS[n] for n in wanted if against[n] is None), None)
        return found or "; ".join(f"FlashAttention-{n}: {why}" for n, why in against.items())


def _against(kernel: FlashKernel, problem: Problem, plan: Plan) -> str | None:
    head_dim = problem.q.shape[3]
    if kernel.max_head_dim is not None and head_dim > kernel.max_head_dim:
        return f"head_dim {head_dim} is above {kernel.max_head_dim}"
    assert isinstance(plan, StridedPlan)
    if not kernel.takes_bands and any(piece.band is not None for chunk in plan.chunks for piece in chunk.pieces):
        return "windows are not passed to it"
    if kernel.version == 3 and problem.needs_grad and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic as it is called here"
    try:
        module = import_module(kernel.module)
    except ImportError as error:  # absent, or built for another torch
        return f"does not import ({error}); {INSTALL[kernel.version]}"
    if not all(hasattr(module, name) for name in kernel.functions):
        return f"{kernel.module} lacks {' or '.join(kernel.functions)}; {INSTALL[kernel.version]}"
    if kernel.version == 2 and _release(module) < (2, 7):
        return f"flash-attn 2.7 or later is needed; {INSTALL[2]} --upgrade"
    return None


def _release(module: Any) -> tuple[int, ...]:
    """(major, minor) of the package that holds the module."""
    version = str(getattr(import_module(module.__name__.partition(".")[0]), "__version__", "0.0"))
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _window(mask: Mask, q: Tensor, k: Tensor) -> tuple[int, int]:
    """(left, right) of a band; (-1, -1) is no window."""
    if mask is None:
        return -1, -1
    assert isinstance(mask, Band)
    return window_of(mask, q.shape[2], k.shape[2])


def _sides(window: tuple[int, int]) -> dict[str, int]:
    return {} if window == (-1, -1) else {"window_size_left": window[0], "window_size_right": window[1]}
