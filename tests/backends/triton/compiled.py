"""Compiles the Triton kernels for GPUs that need not be there, in a process of its own: python compiled.py SPEC...

A SPEC is "kernel:target:D" and any of the words of `launches` behind it, as in "keys_list:sm_90:64:dropout". The
arguments are those that the backend itself would launch with, for causal LongNet in bfloat16 unless a word says
otherwise. Prints a line of JSON for each: registers, spills and instructions.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from dilated_attention_pytorch.backends.triton import TritonBackend, TritonOptions, backend, calls
from dilated_attention_pytorch.patterns import Causal, Documents, Window, longnet
from dilated_attention_pytorch.plans import StridedPlan, candidate_plans
from dilated_attention_pytorch.plans.tiles import tile_plan
from dilated_attention_pytorch.scores import Relative
from dilated_attention_pytorch.testing.cases import Case

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FAMILIES = {"sm_90": "hopper", "sm_100": "hopper", "sm_80": "ampere", "gfx942": "cdna", "gfx90a": "cdna"}


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: str) -> None:
        self.name = target
        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target[3:]), 32)
        else:
            self.target = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)

    def get_current_device(self):
        return self.name  # a name of its own, so that kernels of other targets are not taken for its

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def launches(head_dim: int, words: set[str], family: str) -> dict[str, tuple]:
    """By kernel, the arguments of its launch for a small problem; the forward of one branch is one that carries.

    Words: full (not causal), window, float32, documents, padded, grouped (fewer kv heads), slopes, table, dropout.
    """
    assert words <= {"full", "window", "float32", "documents", "padded", "grouped", "slopes", "table", "dropout"}, words
    pattern = longnet([64, 128], [1, 2])
    pattern = pattern if "full" in words else pattern & (Window(50) if "window" in words else Causal())
    pattern = Documents([100, 80]).of(pattern) if "documents" in words else pattern
    score = Relative(slopes=torch.ones(2)) if "slopes" in words else None
    score = Relative(table=torch.zeros(2, 9)) if "table" in words else score
    small = Case("", pattern, batch=1, query_length=250, num_heads=2, head_dim=head_dim, score=score)
    small = replace(small, kv_heads=1 if "grouped" in words else 2, dropout_p=0.1 if "dropout" in words else 0.0)
    small = replace(small, visible=(200,) if "padded" in words else None)
    problem = small.problem(torch.float32 if "float32" in words else torch.bfloat16)
    # Copies, so that no calls are kept from another target.
    strided = next(replace(p) for p in candidate_plans(pattern, problem) if isinstance(p, StridedPlan))
    found = {}
    backend.run = lambda kernel, _, grid, arguments: found.__setitem__(kernel.fn.__name__, (kernel, grid, arguments))
    calls.family_of = lambda _: family
    with torch.no_grad():
        for plan, split in ((strided, "apart"), (strided, "together"), (tile_plan(pattern, problem), "together")):
            chosen = TritonBackend(TritonOptions(split=split))
            out, lse = chosen.forward(problem, plan)
            chosen.backward(problem, plan, out, lse, out, lse)
    return found


def cuda_figures(kernel) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(TOOLS / tool[0]), *tool[1:], file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    loops = key_loops(sass)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": spills(sass),
        "loops": len(loops),
        "spills_in_loops": sum(spills(body) for body in loops),
        "instructions": [sum(opcodes(body).values()) for body in loops],
        "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]", kernel.asm["ptx"])),
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
    }


def spills(sass: str) -> int:
    return len(re.findall(r"\b(?:STL|LDL)\b", sass))


def key_loops(sass: str) -> list[str]:
    """The innermost loops that hold matrix instructions."""
    lines = sass.splitlines()
    labels = {found.group(1): i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        back = re.search(r"BRA\b.*`\((\.L_x_\d+)\)", line)
        if back and labels.get(back.group(1), i) < i:
            loops.append((labels[back.group(1)], i))
    inner = [(a, z) for a, z in loops if not any((a, z) != (b, y) and a <= b and y <= z for b, y in loops)]
    bodies = ["\n".join(lines[a:z]) for a, z in inner]
    return [body for body in bodies if re.search(r"GMMA|HMMA", body)]


def opcodes(sass: str) -> Counter:
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(\w+)", sass, re.M))


def amd_figures(kernel) -> dict[str, object]:
    text = kernel.asm["amdgcn"]
    count = {key: int(re.search(rf"\.{key}:\s*(\d+)", text).group(1)) for key in ("vgpr_count", "vgpr_spill_count")}
    return {"registers": count["vgpr_count"], "spills": count["vgpr_spill_count"], "mfma": text.count("v_mfma")}


def main(specs: list[str]) -> list[dict[str, object]]:
    found = []
    for spec in specs:
        name, target, head_dim, *words = spec.split(":")
        found_here = launches(int(head_dim), set(words), FAMILIES.get(target, "small"))
        kernel, grid, arguments = found_here[name]
        triton.runtime.driver.set_active(Driver(target))
        made = kernel.warmup(grid=grid, **calls.chosen(kernel, arguments))
        figures = cuda_figures(made) if "cubin" in made.asm else amd_figures(made)
        blocks = [arguments.get(x) for x in ("BM", "BN", "num_warps", "num_stages")]
        found.append({"spec": spec, "blocks": blocks, "shared": made.metadata.shared, **figures})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in main(sys.argv[1:]):
        sys.stdout.write(json.dumps(line) + "\n")
