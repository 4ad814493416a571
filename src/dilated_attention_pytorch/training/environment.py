"""What a result was made with: versions and device, recorded beside every figure."""

import importlib.metadata
import os
import platform

import torch
import torch.distributed as dist

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
    """The make of the device in words, with the number of CPU threads, and of processes where there are several."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    each = f"{processes} processes, each on " if processes > 1 else ""
    if device == "cuda":
        return each + torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{each}{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def launch() -> str | None:
    """What a command has in common with itself when torchrun runs it again after a failure; None outside torchrun.

    The launch's identifier, which --standalone makes unique; where nobody gave one, the process that restarts it.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()}" if name == "none" else name
