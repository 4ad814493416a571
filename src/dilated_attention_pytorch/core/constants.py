"""Facts about this machine under 0.2's names. Importing looks at nothing: each is found when it is asked for.

`HAS_...` and `..._VERSION` say what is installed, without importing it; nothing here chooses a backend
(`explain` tells which one a problem gets, and every reason against the others).
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dilated_attention_pytorch.backends.kernel import is_installed

if TYPE_CHECKING:
    APEX_VERSION: str | None
    CURRENT_OPTIMAL_SETTINGS: dict[str, Any]
    DEEPSPEED_VERSION: str | None
    FAIRSCALE_VERSION: str | None
    FLASH_ATTN_VERSION: str | None
    HAS_APEX: bool
    HAS_DEEPSPEED: bool
    HAS_FAIRSCALE: bool
    HAS_FLASH_ATTN: bool
    HAS_FLASH_ATTN_3: bool
    HAS_SDPA: bool
    HAS_SDPA_KERNEL: bool
    HAS_TRITON: bool
    HAS_XFORMERS: bool
    TORCH_VERSION: tuple[int, int]
    TRITON_VERSION: str | None
    XFORMERS_VERSION: str | None

logger = logging.getLogger(__name__)

_PACKAGES = {
    "APEX": "apex",
    "DEEPSPEED": "deepspeed",
    "FAIRSCALE": "fairscale",
    "FLASH_ATTN": "flash_attn",
    "FLASH_ATTN_3": "flash_attn_interface",
    "TRITON": "triton",
    "XFORMERS": "xformers",
}
_VERSIONED = tuple(name for name in _PACKAGES if name != "FLASH_ATTN_3")

LAZY = (
    *(f"HAS_{name}" for name in (*_PACKAGES, "SDPA", "SDPA_KERNEL")),
    *(f"{name}_VERSION" for name in (*_VERSIONED, "TORCH")),
    "CURRENT_OPTIMAL_SETTINGS",
)
"""The names that are computed when they are asked for."""

_FAMILIES = {
    "b200": "b200",
    "b100": "b100",
    "h200": "h200",
    "h100": "h100",
    "a100": "a100",
    "v100": "v100",
    "mi300": "amd_instinct",
    "mi250": "amd_instinct",
    "rtx 40": "rtx_40xx",
    "rtx 30": "rtx_30xx",
}

TABLE_BLOCK = 128
"""Tokens of a block that fill the kernels' tiles whole (docs/sparse.md)."""


def gpu_type_of(device_name: str) -> str:
    """The family of a CUDA device, from the name its driver gives; "generic_cuda" for one that 0.2 had no word for.

    Example:
        >>> gpu_type_of("NVIDIA A100-SXM4-80GB"), gpu_type_of("Tesla T4")
        ('a100', 'generic_cuda')
    """
    name = device_name.lower()
    return next((family for word, family in _FAMILIES.items() if word in name), "generic_cuda")


@lru_cache(maxsize=1)
def detect_gpu_type() -> str:
    """The family of CUDA device 0, "cpu" without one; looked up once, on the first call."""
    found = gpu_type_of(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"
    logger.info("GPU type: %s", found)
    return found


class _GpuType:
    """The text of `detect_gpu_type`, found when it is first compared, hashed or printed."""

    def __str__(self) -> str:
        return detect_gpu_type()

    def __repr__(self) -> str:
        return repr(detect_gpu_type())

    def __eq__(self, other: object) -> bool:
        return detect_gpu_type() == (str(other) if isinstance(other, _GpuType) else other)

    def __hash__(self) -> int:
        return hash(detect_gpu_type())


GPU_TYPE = _GpuType()
"""Compares and prints as the text of `detect_gpu_type`; importing it does not look for a GPU."""


def get_current_optimal_settings() -> dict[str, Any]:
    """What suits this machine, by 0.2's keys; nothing in the library reads it.

    ``use_flash_attn``: a flash-attn package is installed and the GPU can run it (0.2's table said so for whole
    families). ``use_tf32``: the GPU has TF32. ``block_size``: tokens of a block in a table of blocks. ``max_seq_len``
    is infinite: there is no length that 0.3 refuses.

    Example:
        >>> sorted(get_current_optimal_settings())
        ['block_size', 'max_seq_len', 'use_flash_attn', 'use_tf32']
    """
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    is_ampere = nvidia and torch.cuda.get_device_capability(0) >= (8, 0)
    has_flash = is_installed("flash_attn") or is_installed("flash_attn_interface")
    return {
        "use_flash_attn": has_flash and is_ampere,
        "use_tf32": is_ampere,
        "block_size": TABLE_BLOCK,
        "max_seq_len": math.inf,
    }


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: Any
    if name == "CURRENT_OPTIMAL_SETTINGS":
        value = get_current_optimal_settings()
    elif name == "TORCH_VERSION":
        value = tuple(int(part) for part in torch.__version__.split(".")[:2])
    elif name == "HAS_SDPA":
        value = hasattr(torch.nn.functional, "scaled_dot_product_attention")
    elif name == "HAS_SDPA_KERNEL":
        value = hasattr(torch.nn.attention, "sdpa_kernel")
    elif name.startswith("HAS_"):
        value = is_installed(_PACKAGES[name.removeprefix("HAS_")])
    else:
        value = _version(_PACKAGES[name.removesuffix("_VERSION")])
    logger.debug("%s: %r", name, value)
    return value


def __dir__() -> list[str]:
    return sorted((*LAZY, "GPU_TYPE", "detect_gpu_type", "get_current_optimal_settings", "gpu_type_of"))


def _version(package: str) -> str | None:
    """The version of a package's distribution; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
