"""Attention whose tokens are dealt over ranks, as one call and as what layers take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention_pytorch.attention import attend, autocast_inputs
from dilated_attention_pytorch.backends import check_backend_name
from dilated_attention_pytorch.compiling import run_eagerly
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.agreement import Agreed, Facts, agree, agree_on_padding
from dilated_attention_pytorch.parallel.call import Call, make_call
from dilated_attention_pytorch.parallel.choice import check_method
from dilated_attention_pytorch.parallel.layouts import Layout, check_layout
from dilated_attention_pytorch.parallel.sharding import resolve_flat_group, shard_sequence, unshard_sequence
from dilated_attention_pytorch.parallel.world import World, rank_and_size
from dilated_attention_pytorch.patterns import Documents, Pattern
from dilated_attention_pytorch.plans.planner import digest
from dilated_attention_pytorch.problem import Positions, Problem, Run, check_inputs, positions_tensor
from dilated_attention_pytorch.scores import Score


@run_eagerly("what ranks send each other is decided call by call: compile without fullgraph")
def context_parallel_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
    method: str = "auto",
    scale: float | None = None,
    score: Score | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: int | None = None,
    total_length: int | None = None,
    total_key_length: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """`attend` of the whole sequence, of which each rank holds a shard and gets its shard of the output; exact.

    ``q (B, n, H, D)``, ``k (B, m, Hkv, D)``, ``v (B, m, Hkv, Dv)``: this rank's rows, as `shard_sequence` gives them;
    ranks may hold different numbers of rows, or none. Pattern, ``query_start`` and the tables of documents or blocks
    speak of the whole sequence and are the same on every rank. Every rank of the group must call it, and its backward.

    Args:
        group: the ranks; the default group unless given. ``mesh``, a DeviceMesh, may name them instead; one of two dims
            exchanges heads for tokens inside its rows (last dim) and uses ``method`` between them.
        layout: which rows a rank holds: "contiguous", "zigzag" or "striped", see `Layout`.
        method: "ring", "gather", "all_to_all", or "auto": the fewest bytes on the wire, see `choose_method`.
        key_padding_mask: this rank's shard (B, m), True = padding, on the right of the whole; on all ranks or on none.
        total_length: queries of all ranks together, and keys unless ``total_key_length`` is given. None finds both by
            one small all-gather, in which ranks also check that they ask for the same. With a number nothing is
            checked between ranks: ranks that differ then hang, until the group's time-out, or compute nonsense.

    Other arguments and the result are those of `attend`, of this rank's rows. Without `torch.distributed`, and in a
    group of one, it is `attend`.

    Raises InvalidInput for what is illegal and NoBackend for a method that cannot, on every rank.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> x = torch.randn(1, 100, 4, 8)  # in a world of one
        >>> context_parallel_attend(x, x, x, Causal(), layout="zigzag").shape
        torch.Size([1, 100, 4, 8])
    """
    flat = resolve_flat_group(group, mesh)
    rank, size = rank_and_size(flat)
    options: dict[str, Any] = {"scale": scale, "score": score, "dropout_p": dropout_p}
    error, found = "", 0.0
    try:
        _check_names(layout, method, backend, pattern)
        found, _ = check_inputs(q, k, v, **options, key_padding_mask=key_padding_mask, query_start=query_start or 0)
        if total_length is not None:
            key_length = total_length if total_key_length is None else total_key_length
            _check_rows(q, k, Layout(layout, total_length, size), Layout(layout, key_length, size), rank)
        q, k, v = autocast_inputs(q, k, v)
    except InvalidInput as own:
        if flat is None or total_length is not None:
            raise
        error = str(own)
    if flat is None:
        options |= {"key_padding_mask": key_padding_mask, "query_start": query_start, "backend": backend}
        return attend(q, k, v, pattern, **options, return_lse=return_lse)
    if total_length is None:
        told = {"layout": layout, "method": method, "backend": backend, "query_start": str(query_start)}
        told["return_lse"] = str(return_lse)
        told["key_padding_mask"] = "none" if key_padding_mask is None else "given"
        told |= {} if error else _alike(q, k, v, pattern, options | {"scale": found})
        agreed = agree(flat, _facts(q, k, told, error, dropout_p), layout)
    elif dropout_p > 0:
        raise InvalidInput("context_parallel_attend: dropout needs one seed: leave total_length out, it is found.")
    else:
        agreed = Agreed(total_length, key_length, 0)
    rows, keys, start = _dealt(agreed, query_start, layout, size)
    problem = Problem(
        q,
        k,
        v,
        scale=found,
        query_positions=rows[rank],
        key_positions=keys[rank],
        key_lengths=_key_lengths(flat, key_padding_mask, keys[rank], agreed.key_length),
        score=score,
        dropout_p=dropout_p,
        seed=torch.tensor([agreed.seed], device=q.device) if dropout_p > 0 else None,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )
    whole = (Run(start, 1, agreed.query_length),), (Run(0, 1, agreed.key_length),)
    pattern.check(replace(problem, query_positions=whole[0], key_positions=whole[1]))
    call = make_call(problem, pattern, World(rank, rows, keys, flat), mesh, method, backend)
    if total_length is None:
        call.agree_on_backend(flat)
    out, lse = _ContextAttention.apply(q, k, v, call, return_lse)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class ContextParallel:
    """How a model's tokens are dealt over ranks: what layers take as ``context_parallel``, and its tools.

    Arguments are those of `context_parallel_attend`.

    Example:
        >>> from dilated_attention_pytorch import Causal
        >>> context = ContextParallel(layout="zigzag")  # in a world of one
        >>> x = context.shard(torch.randn(1, 10, 2, 8))
        >>> context.unshard(context.attend(x, x, x, Causal())).shape
        torch.Size([1, 10, 2, 8])
    """

    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    layout: str = "contiguous"
    method: str = "auto"

    def __post_init__(self) -> None:
        check_layout(self.layout)
        check_method(self.method)
        if self.mesh is not None and self.group is not None:
            raise InvalidInput("expected group= or mesh=. Got both; leave one out.")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Any:
        """`context_parallel_attend` over these ranks."""
        return context_parallel_attend(q, k, v, pattern, **self._ranks, method=self.method, **options)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's rows of ``x``, which every rank holds whole; see `shard_sequence`."""
        return shard_sequence(x, dim=dim, **self._ranks)

    def unshard(self, x: Tensor, dim: int = 1, length: int | None = None) -> Tensor:
        """The whole of which each rank holds its rows; see `unshard_sequence`."""
        return unshard_sequence(x, dim=dim, length=length, **self._ranks)

    def positions(self, length: int, documents: Documents | None = None) -> Tensor:
        """Where this rank's rows of ``length`` tokens stand, (n,) int64: what position encodings want.

        With ``documents`` places inside the document of each row, (n,), or (B, n) for a batch of tables.
        """
        group = resolve_flat_group(self.group, self.mesh)
        rank, size = rank_and_size(group)
        places = positions_tensor(Layout(self.layout, length, size).positions(rank))
        if documents is None:
            return places
        places = documents.locate(places.to(documents.lengths.device))[1]
        return places.view(-1, places.shape[-1]) if places.dim() > 1 else places

    @property
    def _ranks(self) -> dict[str, Any]:
        return {"group": self.group, "mesh": self.mesh, "layout": self.layout}


_ALIKE = ("batch size", "heads (H, Hkv)", "head dims (D, Dv)", "dtype", "pattern", "scale", "score", "dropout_p")


def _check_names(layout: str, method: str, backend: str, pattern: Pattern) -> None:
    check_layout(layout)
    check_method(method)
    check_backend_name(backend)
    if not isinstance(pattern, Pattern):
        raise InvalidInput(f"attend: expected a pattern such as Causal(). Got {type(pattern).__name__}.")


def _facts(q: Any, k: Any, told: Mapping[str, str], error: str, dropout_p: float) -> Facts:
    """What this rank says; one whose arguments are illegal says so, with as many words as the others."""
    told = {**dict.fromkeys(_ALIKE, ""), **told}
    if error:
        device = q.device if isinstance(q, Tensor) else torch.device("cpu")
        return Facts(0, 0, told, device, error)
    seed = int(torch.randint(0, 2**62, (1,), device=q.device)) if dropout_p > 0 else 0
    return Facts(q.shape[1], k.shape[1], told, q.device, seed=seed)


def _alike(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on every rank, in words."""
    score = options["score"]
    return {
        "batch size": str(q.shape[0]),
        "heads (H, Hkv)": str((q.shape[2], k.shape[2])),
        "head dims (D, Dv)": str((q.shape[3], v.shape[3])),
        "dtype": str(q.dtype),
        "pattern": _described(pattern.text(), pattern.tables),
        "scale": repr(options["scale"]),
        "score": "none" if score is None else _described(score.text, score.tables),
        "dropout_p": repr(float(options["dropout_p"])),
    }


def _described(text: str, tables: Any) -> str:
    """A pattern or score with what tells its tables apart."""
    return " ".join([text, *(f"t{i} {tuple(x.shape)} #{_hash(x)}" for i, x in enumerate(tables))])


def _hash(table: Tensor) -> str:
    numbers = digest(table)[-1]
    assert isinstance(numbers, bytes)
    return numbers.hex()[:8]


def _check_rows(q: Tensor, k: Tensor, queries: Layout, keys: Layout, rank: int) -> None:
    """Raise InvalidInput unless the shards are those of the layouts."""
    for name, x, whole in (("q", q, queries), ("k", k, keys)):
        if x.shape[1] != whole.count(rank):
            raise InvalidInput(
                f"context_parallel_attend: rank {rank} of {whole.world} holds {whole.count(rank)} of {whole.length} "
                f"rows of {name} in layout {whole.name!r}. Got {x.shape[1]}; cut the sequence with shard_sequence, or "
                "leave total_length out."
            )


def _dealt(
    agreed: Agreed, query_start: int | None, layout: str, size: int
) -> tuple[tuple[Positions, ...], tuple[Positions, ...], int]:
    """Where the queries and the keys of each rank stand, and the first query of all."""
    start = agreed.key_length - agreed.query_length if query_start is None else query_start
    if start < 0:
        raise InvalidInput(
            f"attend: {agreed.query_length} queries on ranks 0 to {size - 1} are to be the last rows of "
            f"{agreed.key_length} keys, which is not possible; pass query_start= to place them."
        )
    rows = Layout(layout, agreed.query_length, size, start), Layout(layout, agreed.key_length, size)
    queries, keys = (tuple(whole.positions(rank) for rank in range(size)) for whole in rows)
    return queries, keys, start


def _key_lengths(
    group: dist.ProcessGroup, mask: Tensor | None, positions: Positions, length: int
) -> tuple[int, ...] | None:
    """Visible keys of each sample over all ranks; None where all are."""
    if mask is None:
        return None
    lengths = agree_on_padding(group, mask, positions_tensor(positions, mask.device))
    return None if all(n == length for n in lengths) else lengths


class _ContextAttention(torch.autograd.Function):
    """The one node of a call: what travels back is known only to the call as a whole."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, returns_lse: bool) -> tuple[Tensor, Tensor]:
        """(out in q's dtype, lse) of this rank's rows."""
        out, lse, kept = call.forward(replace(call.problem, q=q, k=k, v=v))
        out = out.to(q.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(() if call.keeps_all else (q, k, v, out, lse)), *kept)
        ctx.call, ctx.sends_dlse = call, returns_lse and call.keeps_all
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's rows, which all ranks compute together."""
        call: Call = ctx.call
        kept = ctx.saved_tensors  # to be read once where activations are checkpointed
        own, kept = (call.without_numbers, kept) if call.keeps_all else (kept[:5], kept[5:])
        q, k, v, out, lse = own
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is None and ctx.sends_dlse:  # another rank's loss may read lse, and all send alike
            dlse = torch.zeros_like(lse)
        problem = replace(call.problem, q=q, k=k, v=v)
        grads = call.backward(problem, dout, dlse, out, lse, kept)
        return grads.q.to(q.dtype), grads.k.to(k.dtype), grads.v.to(v.dtype), None, None
