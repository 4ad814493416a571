"""The Triton kernels keep the laws: forward and gradients, run by Triton's interpreter where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'dilated-attention-pytorch[triton]'")

SCRIPT = Path(__file__).with_name("interpreted.py")

# What one process runs, so that each takes about as long; interpreted.py says what the names are.
GROUPS = {
    "patterns": "causal window window_causal paper odd odd_causal rate_above_segment rate_above_int32 product "
    "torchscale head_groups same_branch_twice grouped mixed_bounds documents documents_cut documents_batched "
    "crossing whole_tiles_twice head_dim_40 partial:paper",
    "values": "padded padded_whole placed beyond values_wider last_dim_strided expanded fused half:documents slopes "
    "table one_table dropout dropout_grouped dropout_words negative_scale zero_scale half:odd_causal",
    "laws": "laws wrong_plan large_offsets default_blocks packed",
}


def interpret(names: str) -> dict[str, int]:
    """What passed, from a process in which Triton interprets; AssertionError with its words when a law is broken."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *names.split()]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_keep_the_laws(group):
    names = GROUPS[group]
    passed = interpret(names)
    assert passed["refused"] == 0
    assert passed["runs"] + passed["checked"] >= len(names.split())


def test_a_broken_law_is_noticed(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; raise AssertionError(f'error of {sys.argv[1:]}')")
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", broken)
    with pytest.raises(AssertionError, match=r"error of \['causal', 'window'\]"):
        interpret("causal window")
