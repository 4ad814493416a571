"""What ranks do not agree in, or cannot do, is an error on every one of them, and never a hang."""

import re

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import (
    BlockSparse,
    Causal,
    Documents,
    Full,
    InvalidInput,
    NoBackend,
    Relative,
    Softcap,
    attend,
    longnet,
)
from dilated_attention_pytorch.parallel import context_parallel_attend
from parallel.world_contract import rows_of
from parallel.worlds import run_world

LENGTH = 20


def shard(rank=None, size=None, length=LENGTH, heads=4, kv_heads=None, dim=8, batch=2, dtype=torch.float64):
    """This rank's q, k, v."""
    rank, size = dist.get_rank() if rank is None else rank, dist.get_world_size() if size is None else size
    rows = len(rows_of("contiguous", length, rank, size))
    return [torch.randn(batch, rows, h, dim, dtype=dtype) for h in (heads, kv_heads or heads, kv_heads or heads)]


def hole(rank):
    """Rank 0's keys are padding, those after them are not."""
    return torch.full((2, len(rows_of("contiguous", LENGTH, rank, 2))), rank == 0)


# Rank 1 asks for something else than rank 0; a pattern of what both must read in the error, besides "rank".
DISAGREEMENTS = {
    "batch": (lambda r: (shard(batch=2 + r), Full(), {}), r"\b2\b.*\b3\b"),
    "heads": (lambda r: (shard(heads=4 + 2 * r), Full(), {}), r"\b4\b.*\b6\b"),
    "kv heads": (lambda r: (shard(kv_heads=4 - 2 * r), Full(), {}), r"\b4\b.*\b2\b"),
    "head dim": (lambda r: (shard(dim=8 * (r + 1)), Full(), {}), r"\b8\b.*\b16\b"),
    "dtype": (lambda r: (shard(dtype=(torch.float32, torch.float64)[r]), Full(), {}), "float32.*float64"),
    "length": (lambda r: (shard(length=LENGTH + 8 * r), Full(), {}), r"\b10\b.*\b14\b"),
    "swapped lengths": (lambda r: (shard(rank=1 - r, length=21), Full(), {}), r"\b10\b.*\b11\b"),
    "pattern": (lambda r: (shard(), (Full(), Causal())[r], {}), "Full.*Causal"),
    "branches": (lambda r: (shard(), longnet([8, 16 + r], [1, 2]), {}), r"\b16\b.*\b17\b"),
    "documents": (lambda r: (shard(), Documents([8 + r, 12 - r]).of(Full()), {}), "Packed"),
    "blocks": (lambda r: (shard(), BlockSparse(5, torch.full((4, 4), 1 + r)), {}), "BlockSparse"),
    "layout": (lambda r: (shard(), Full(), {"layout": ("contiguous", "zigzag")[r]}), "contiguous.*zigzag"),
    "method": (lambda r: (shard(), Full(), {"method": ("ring", "gather")[r]}), "ring.*gather"),
    "scale": (lambda r: (shard(), Full(), {"scale": 0.25 + r}), r"0\.25.*1\.25"),
    "dropout": (lambda r: (shard(), Full(), {"dropout_p": 0.25 * r}), r"0\.0\b.*0\.25"),
    "query_start": (lambda r: (shard(), Full(), {"query_start": 3 * r}), r"\b0\b.*\b3\b"),
    "score": (lambda r: (shard(), Full(), {"score": Softcap(2.0) if r else None}), "Softcap"),
    "slopes": (lambda r: (shard(), Full(), {"score": Relative(slopes=torch.full((4,), 0.5 + r))}), "Relative"),
    "mask on one": (lambda r: (shard(), Full(), {"key_padding_mask": hole(1) if r else None}), "key_padding_mask"),
    "return_lse": (lambda r: (shard(), Full(), {"return_lse": r == 1}), "return_lse.*False.*True"),
    "backend": (lambda r: (shard(), Full(), {"backend": ("dense", "sdpa")[r]}), "dense.*sdpa"),
    # Nothing differs, but the world as a whole is not a problem.
    "padding before keys": (lambda r: (shard(), Full(), {"key_padding_mask": hole(r)}), "right"),
    "heads do not divide": (lambda r: (shard(heads=3), Full(), {"method": "all_to_all"}), r"\b3\b.*\b2\b"),
    "kv heads do not divide": (
        lambda r: (shard(heads=6, kv_heads=3), Full(), {"method": "all_to_all"}),
        r"\b3\b.*\b2\b",
    ),
    "backend of the rank that has rows": (lambda r: (shard(length=1), Full(), {"backend": "triton"}), "triton"),
    "no kernel where rows are": (lambda r: (shard(length=1), Full(), {"backend": "triton"}), "triton"),
    "one rank's own error": (lambda r: (shard() if r else [x[0] for x in shard()], Full(), {}), "rank 0"),
}


def _errors(names):
    """Each rank's message for every disagreement, and whether the world still works after all of them."""
    told = []
    for name in names:
        tensors, pattern, options = DISAGREEMENTS[name][0](dist.get_rank())
        try:
            context_parallel_attend(*tensors, pattern, **{"method": "ring", **options})
            told.append("no error")
        except (InvalidInput, NoBackend) as error:
            told.append(f"{type(error).__name__}: {error}")
    x = torch.ones(1)
    dist.all_reduce(x)
    return told, int(x), context_parallel_attend(*shard(), Full(), method="ring").shape


def test_every_rank_hears_of_a_disagreement():
    (first, two, shape), (second, again, _) = run_world(2, _errors, list(DISAGREEMENTS))
    assert (two, again, shape) == (2, 2, (2, 10, 4, 8))
    for name, here, there in zip(DISAGREEMENTS, first, second, strict=True):
        assert here == there, name
    for name, message in zip(DISAGREEMENTS, first, strict=True):
        assert "rank" in message, f"{name}: {message}"

        assert re.search(DISAGREEMENTS[name][1], message, re.DOTALL), f"{name}: {message}"


def _without_tokens():
    rank = dist.get_rank()
    q, k, v = (x[:, : int(rank == 0)].requires_grad_() for x in shard(rank=0, size=1, length=1))
    out = context_parallel_attend(q, k, v, Causal(), method="auto")
    out.sum().backward()
    return out.detach(), v.detach(), v.grad


def test_a_rank_without_tokens_is_legal():
    (out, v, dv), (nothing, _, dnothing) = run_world(2, _without_tokens)
    torch.testing.assert_close(out, v)
    assert bool((dv == 1).all())
    assert nothing.shape == dnothing.shape == (2, 0, 4, 8)


@pytest.mark.parametrize("method", ["auto", "ring", "gather", "all_to_all"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_world_of_one_is_attend(method, layout):
    q, k, v = (x.requires_grad_() for x in shard(0, 1))
    mask = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [7]])
    pattern = longnet([4, 16], [1, 2]) & Causal()
    expected = attend(q, k, v, pattern, key_padding_mask=mask, return_lse=True)
    found = context_parallel_attend(
        q, k, v, pattern, layout=layout, method=method, key_padding_mask=mask, return_lse=True
    )
    weights = torch.randn_like(expected[0])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    grads = [torch.autograd.grad((out * weights).sum() + lse[0].sum(), (q, k, v)) for out, lse in (found, expected)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_names_that_are_none():
    q, k, v = shard(0, 1)
    with pytest.raises(InvalidInput, match=r"'contiguous', 'zigzag', 'striped'.*'spiral'"):
        context_parallel_attend(q, k, v, Full(), layout="spiral")
    with pytest.raises(InvalidInput, match=r"'gather', 'ring', 'all_to_all'.*'rong'"):
        context_parallel_attend(q, k, v, Full(), method="rong")
    with pytest.raises(InvalidInput, match="backend"):
        context_parallel_attend(q, k, v, Full(), backend="dance")
    with pytest.raises(TypeError, match="bias"):  # it would be as large as all logits, on every rank
        context_parallel_attend(q, k, v, Full(), bias=torch.zeros(LENGTH, LENGTH))


def _both_group_and_mesh():
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(InvalidInput, match="group= or mesh="):
        context_parallel_attend(*shard(), Full(), group=dist.group.WORLD, mesh=mesh)


def test_a_group_and_a_mesh_are_one_too_many():
    run_world(2, _both_group_and_mesh)
