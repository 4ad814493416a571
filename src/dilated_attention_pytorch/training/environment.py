"""What a result was made with: versions and device, recorded beside every figure."""

import importlib.metadata
import platform

import torch

from dilated_attention_pytorch.backends.tuning import processor_name

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
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"
