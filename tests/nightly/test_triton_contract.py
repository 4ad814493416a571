"""Every case and dtype of the contract through the interpreted Triton kernels, and every kernel compiled everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.testing import CASES
from dilated_attention_pytorch.testing.contract import DTYPES

pytest.importorskip("triton", reason="triton is not installed: pip install 'dilated-attention-pytorch[triton]'")
pytestmark = pytest.mark.nightly

SCRIPTS = Path(__file__).parents[1] / "backends" / "triton"
LISTS = ("forward_branch", "forward_list", "queries_list", "keys_list")
BLOCKS = ("forward_blocks", "queries_blocks", "keys_blocks")
NOT_HERE = ("bias", "softcap")  # what the kernels cannot do


def lines(script: str, arguments: list[str]) -> list[dict]:
    found = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_laws(case, dtype):
    (passed,) = lines("interpreted.py", [f"case:{case.name}:{str(dtype).removeprefix('torch.')}"])
    refusable = dtype == torch.float64 or any(word in case.name for word in NOT_HERE)
    assert bool(passed["refused"]) == refusable
    assert passed["checked"] or refusable


@pytest.mark.parametrize("head_dim", [24, 40, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", [*LISTS, *BLOCKS])
def test_every_kernel_compiles(kernel, target, head_dim):
    (figures,) = lines("compiled.py", [f"{kernel}:{target}:{head_dim}"])
    if "mfma" in figures:
        assert figures["mfma"] > 0
    else:
        assert figures["spills_in_loops"] == 0 or head_dim > 128, figures
        assert (figures["wgmma"] > 0) == (target == "sm_90") or head_dim > 128, figures
    assert figures["shared"] <= {"sm_80": 163, "sm_89": 99, "sm_90": 227, "gfx942": 64}[target] * 1024, figures


@pytest.mark.parametrize("kernel", LISTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_single_precision_compiles(kernel, target):
    (figures,) = lines("compiled.py", [f"{kernel}:{target}:64:float32"])
    assert figures["shared"] <= 99 * 1024, figures
