"""The Triton kernels compile for GPUs that are not here, as the backend launches them, and keep sums in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'dilated-attention-pytorch[triton]'")

SCRIPT = Path(__file__).with_name("compiled.py")

EVERY_DAY = [
    "forward_branch:sm_90:48",
    "forward_blocks:sm_90:64",
    "queries_list:sm_90:128",
    "forward_list:sm_90:64:documents:padded:grouped:dropout",
    "keys_list:sm_90:64:window:grouped:slopes",
    "keys_list:sm_80:64",
    "forward_list:gfx942:64",
]
"""Each kernel of strided plans, each family of devices and both ends of the head dims, in one process."""
NIGHTLY = [
    "forward_branch:sm_90:64:full",
    "forward_branch:sm_90:128",
    "forward_list:sm_90:64",
    "queries_list:sm_90:64",
    "keys_list:sm_90:64",
    "forward_list:sm_80:64",
    "forward_branch:gfx942:64",
]


def compile_kernels(specs: list[str], cache: Path) -> list[dict]:
    """What the compiler made of each; the specs are those of compiled.py."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *specs]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def check(figures: dict) -> None:
    """No spills in the loops over keys; asynchronous copies there and, on Hopper, its warpgroup products."""
    if "mfma" in figures:
        assert figures["spills"] == 0, figures
        assert figures["mfma"] > 0, figures
        return
    assert figures["loops"] >= 2, figures  # blocks with and without a mask
    assert figures["spills_in_loops"] == 0, figures
    assert figures["asynchronous_copies"] > 0, figures
    assert (figures["wgmma"] > 0) == ("sm_90" in figures["spec"]), figures


@pytest.mark.parametrize(
    "specs", [EVERY_DAY, pytest.param(NIGHTLY, marks=pytest.mark.nightly)], ids=["every day", "nightly"]
)
def test_kernels_compile_without_spills_in_their_loops(specs, tmp_path):
    found = compile_kernels(specs, tmp_path)
    assert [figures["spec"] for figures in found] == specs
    for figures in found:
        check(figures)
