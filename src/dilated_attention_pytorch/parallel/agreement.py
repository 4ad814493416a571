"""The small all-gather before an attention call: lengths are found, and ranks that ask for different things hear it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.layouts import whole_layout


class Facts(NamedTuple):
    """What a rank says of its call: rows of its shards, and what must be alike everywhere, by name.

    ``device`` is where it speaks from. ``error`` is what is wrong with its own arguments, "" if nothing is. ``seed`` is
    rank 0's to say.
    """

    query_rows: int
    key_rows: int
    alike: Mapping[str, str]
    device: torch.device
    error: str = ""
    seed: int = 0


class Agreed(NamedTuple):
    """What all ranks know then: tokens of all shards together, and the seed."""

    query_length: int
    key_length: int
    seed: int


def agree(group: dist.ProcessGroup, facts: Facts, layout: str) -> Agreed:
    """The lengths of the whole, once every rank has said the same and holds the layout's rows.

    Raises InvalidInput on every rank, naming ranks and values, when one rank's arguments are illegal, when ranks differ
    in anything that must be alike, or when their shards are not those of the layout.
    """
    numbers = [facts.query_rows, facts.key_rows, facts.seed, _number(facts.error), *map(_number, facts.alike.values())]
    own = torch.tensor(numbers, dtype=torch.int64, device=facts.device)
    rows = _everyones(group, own).tolist()
    if any(row[3:] != rows[0][3:] for row in rows) or facts.error:
        raise InvalidInput(_difference(group, facts))
    queries, keys = (
        whole_layout(layout, [row[column] for row in rows], name) for column, name in enumerate(("queries", "keys"))
    )
    return Agreed(queries.length, keys.length, rows[0][2])


def agree_on_padding(group: dist.ProcessGroup, key_padding_mask: Tensor, positions: Tensor) -> tuple[int, ...]:
    """Visible keys of each sample over all ranks, of whose mask each gives its shard (B, n) at ``positions (n,)``.

    Raises InvalidInput on every rank, naming ranks and samples, unless all padding is on the right.
    """
    visible = ~key_padding_mask
    counts = visible.sum(1)
    last = torch.where(visible, positions, -1).amax(1) if visible.shape[1] > 0 else torch.full_like(counts, -1)
    told = _everyones(group, torch.stack((counts, last)))  # (ranks, 2, B)
    lengths = told[:, 0].sum(0)
    wrong = (told[:, 1] >= lengths).nonzero().tolist()
    if wrong:
        where = "; ".join(f"rank {rank} in sample {sample}" for rank, sample in wrong)
        raise InvalidInput(
            "context_parallel_attend: padding must be on the right (segments start at position 0), but there are "
            f"visible keys behind padding: {where}. Shift such samples to the left, or cut them out with Documents."
        )
    return tuple(lengths.tolist())


def _everyones(group: dist.ProcessGroup, own: Tensor) -> Tensor:
    """Every rank's numbers, by rank."""
    told = own.new_empty((dist.get_world_size(group), *own.shape))
    dist.all_gather(list(told), own, group=group)
    return told


def _number(text: str) -> int:
    """63 bits that tell texts apart."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _difference(group: dist.ProcessGroup, facts: Facts) -> str:
    """What differs between ranks, in words; all ranks call it together."""
    told: list[Facts | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, facts, group=group)
    every = [one for one in told if one is not None]
    errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(every) if one.error]
    if errors:
        return "; ".join(errors)
    parts = []
    for name in facts.alike:
        values = [one.alike[name] for one in every]
        if len(set(values)) > 1:
            parts.append(f"{name} " + ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values)))
    return f"context_parallel_attend: expected every rank to ask for the same. Got {'; '.join(parts)}."
