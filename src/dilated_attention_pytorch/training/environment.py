"""What a result was made with: versions and device, recorded beside every figure."""

import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = ("dilated-attention-pytorch", "torch", "numpy", "safetensors", "triton")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on; those that are not installed are left out.

    >>> {"python", "torch", "numpy"} <= versions().keys()
    True
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The make of the device in words, with the number of CPU threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
