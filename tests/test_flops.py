"""FlopCounterMode counts useful FLOPs: those that explain() shows, forward and backward."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_pytorch import Causal, Documents, Softcap, Window, attend, explain, longnet
from dilated_attention_pytorch.flops import (
    COUNTER,
    attend_flops,
    backward_flops,
    counted_pairs,
    forward_flops,
    register_formulas,
)
from dilated_attention_pytorch.patterns import random_blocks
from dilated_attention_pytorch.problem import make_problem

GRIDS = longnet([12], [2]) & longnet([20], [3])  # no closed form
PATTERNS = (
    Causal(),
    longnet([16, 32], [1, 2]) & Causal(),
    longnet([6, 10, 9], [1, 3, 2], head_groups=True),
    Window(7),
    Documents([9, 20, 21]).of(Causal()),
    GRIDS,
)
OPS = torch.ops.dilated_attention_pytorch


def counts(function):
    """FLOPs of our operators by name; nothing else may count."""
    with FlopCounterMode(display=False) as counter:
        function()
    found = counter.get_flop_counts().get("Global", {})
    assert set(found) <= {OPS.attend, OPS.attend_backward}
    return found.get(OPS.attend, 0), found.get(OPS.attend_backward, 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.text()[:30])
@pytest.mark.parametrize(
    "options", [{}, {"key_padding_mask": True, "dv": 5, "query_start": 3}], ids=["plain", "masked"]
)
def test_equal_to_what_explain_shows(pattern, options):
    options = dict(options)
    q, k, v = torch.randn(2, 40, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, options.pop("dv", 8))
    if options.get("key_padding_mask"):
        options["key_padding_mask"] = torch.arange(50) >= torch.tensor([50, 20])[:, None]
    told = explain(q, k, v, pattern, **options)
    q.requires_grad_()
    forward, backward = counts(lambda: attend(q, k, v, pattern, **options).sum().backward())
    assert told.pairs_are_exact
    assert forward == told.forward_flops == forward_flops(told.pairs, 8, v.shape[3]) > 0
    assert backward == told.backward_flops == backward_flops(told.pairs, 8, v.shape[3])
    counted = pattern.to_mask(4, 40, 50, query_start=options.get("query_start"))
    if "key_padding_mask" in options:
        counted = counted * ~options["key_padding_mask"][:, None, None]
    assert told.pairs == int(counted.expand(2, 4, 40, 50).sum())


def test_backward_is_two_and_a_half_forwards():
    assert (forward_flops(10, 3, 4), backward_flops(10, 3, 4)) == (140, 350)


def test_work_that_kernels_do_beside_is_not_counted():
    x = torch.randn(1, 64, 2, 8)
    with_rule = counts(lambda: attend(x, x, x, Causal(), score=Softcap(2.0)))
    assert with_rule == counts(lambda: attend(x, x, x, Causal()))
    assert with_rule == counts(lambda: attend(x, x, x, Causal(), backend="dense"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.text()[:30])
def test_fake_tensors_give_the_figure_of_their_shapes(pattern):
    x = torch.randn(2, 50, 4, 8)
    exact = explain(x, x, x, pattern).forward_flops
    bound = 4 * 8 * 2 * 4 * 50 * 50
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x).requires_grad_()
        mask = torch.zeros(2, 50, dtype=torch.bool)
        forward, backward = counts(lambda: attend(fake, fake, fake, pattern, key_padding_mask=mask).sum().backward())
    assert forward == (bound if pattern is GRIDS else exact)
    assert backward == forward * 5 // 2
    meta = x.to("meta")
    assert counts(lambda: attend(meta, meta, meta, pattern))[0] == explain(meta, meta, meta, pattern).forward_flops


def test_tables_without_values_leave_a_bound():
    with FakeTensorMode():
        x, lengths = torch.empty(2, 50, 4, 8), torch.tensor([20, 30])
        forward, _ = counts(lambda: attend(x, x, x, Documents(lengths).of(Causal())))
    assert forward == 4 * 8 * 2 * 4 * 50 * 50


def test_long_problems_are_counted_without_their_pairs():
    x = torch.empty(1, 1 << 20, 12, 64, device="meta")
    pattern = longnet([2048, 4096, 8192], [1, 2, 4])
    assert counts(lambda: attend(x, x, x, pattern))[0] == explain(x, x, x, pattern).forward_flops
    pairs, exact = counted_pairs(GRIDS, make_problem(x, x, x, scale=1.0, query_start=0))
    assert (pairs, exact) == (12 << 40, False)


def test_long_block_patterns_are_counted_by_their_tiles():
    pattern = random_blocks(20000, block_size=96, density=0.05, num_heads=2) & Causal()
    x = torch.empty(1, 20000, 2, 8, device="meta")
    told = explain(x, x, x, pattern)
    assert told.pairs_are_exact
    assert counts(lambda: attend(x, x, x, pattern))[0] == told.forward_flops
    size = (20000 - 96 * torch.arange(209)).clamp(max=96)  # tokens of each block, the last ragged
    cells = (pattern.left.layout * size * size.view(-1, 1)).tril(-1).sum() + 2 * (size * (size + 1) // 2).sum()
    assert told.pairs == int(cells)


def test_symbolic_lengths_are_not_fixed():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        fake = mode.from_tensor(torch.randn(2, 50, 4, 8))
        arguments = (fake, fake, fake, None, None, None, [], [], Causal().text(), "", 1.0, 0.0, 0)
        assert attend_flops(*arguments) == 4 * 8 * 2 * 4 * 50 * 51 // 2
    assert not env.guards


def test_registering_twice_changes_nothing():
    counter = sys.modules[COUNTER]
    before = counter.flop_registry[OPS.attend]
    register_formulas({OPS.attend: lambda *_, **__: 0})
    assert counter.flop_registry[OPS.attend] is before


def test_the_counter_is_awaited_not_imported(fresh_interpreters):
    """Importing the package imports no counter; a counter imported later knows the formulas, and imports as ever."""
    script = """
import sys, torch
import dilated_attention_pytorch as dap
assert "torch.utils.flop_counter" not in sys.modules
waiting = len(sys.meta_path)
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert len(sys.meta_path) == waiting - 1
assert torch.ops.dilated_attention_pytorch.attend in flop_registry
assert torch.ops.dilated_attention_pytorch.attend_backward in flop_registry
x = torch.zeros(1, 4, 1, 2)
with FlopCounterMode(display=False) as counter:
    dap.attend(x, x, x, dap.Causal())
assert counter.get_total_flops() == 2 * (2 + 2) * 10
import inspect
assert "class FlopCounterMode" in inspect.getsource(FlopCounterMode)
"""
    fresh_interpreters.run(script)


def test_the_page_on_compiling_runs(monkeypatch):
    """Its three examples, one after another, compiled by the quickest backend."""
    page = (Path(__file__).parent.parent / "docs" / "compile.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (2, 1000, 64)
    q = torch.empty(2, 1000, 4, 16)
    assert names["flops"] == explain(q, q, q, longnet([256, 1024], [1, 4]) & Causal()).forward_flops
