"""Every case and dtype of the contract through the interpreted Triton kernels, and every kernel compiled everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_laws(case):
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    (passed,) = lines("interpreted.py", [f"case:{case.name}:{dtype}" for dtype in dtypes])
    refusable = any(word in case.name for word in NOT_HERE)
    assert passed["refused"] == (len(dtypes) if refusable else 1), "float64 alone is refused otherwise"
    assert passed["checked"] >= (0 if refusable else len(dtypes) - 1)


SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program may have, by target."""


@pytest.mark.parametrize("head_dim", [24, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("target", SHARED)
def test_every_kernel_compiles(target, head_dim):
    specs = [f"{kernel}:{target}:{head_dim}" for kernel in (*LISTS, *BLOCKS)]
    for figures in lines("compiled.py", specs):
        assert figures["shared"] <= SHARED[target] * 1024, figures
        if "mfma" in figures:
            assert figures["mfma"] > 0
            assert figures["spills"] <= 32, figures
        else:
            assert figures["spills_in_loops"] == 0, figures
            assert (figures["wgmma"] > 0) == (target == "sm_90") or head_dim == 256, figures


@pytest.mark.parametrize(
    "words", ["window", "documents", "padded", "grouped", "slopes", "table", "dropout", "full:documents:padded:dropout"]
)
def test_every_feature_compiles(words):
    kernels = [k for k in (*LISTS, *BLOCKS) if k != "forward_branch" or "documents" not in words]  # never planned so
    specs = [f"{kernel}:{target}:64:{words}" for kernel in kernels for target in ("sm_90", "gfx942")]
    for figures in lines("compiled.py", specs):
        assert figures["shared"] <= SHARED["sm_90" if "sm_90" in figures["spec"] else "gfx942"] * 1024, figures


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_single_precision_compiles(target):
    for figures in lines("compiled.py", [f"{kernel}:{target}:64:float32" for kernel in LISTS]):
        assert figures["shared"] <= SHARED["sm_89"] * 1024, figures
