"""What one training step of a `LongNetLM` on many ranks would take: memory, FLOPs, bytes on the wire, seconds.

Counts are exact where they can be: parameters, counted pairs, what attention receives. Seconds are those of an
alpha-beta model: so many FLOPs at the attained share of a rate, so many messages and bytes at a latency and a
bandwidth, of which computing hides a share. Every input is in the result.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.explanation import Leg, WorldExplanation, explain_world
from dilated_attention_pytorch.parallel.machines import DTYPES, Machine
from dilated_attention_pytorch.patterns import Pattern

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = 4
"""Bytes of a parameter, its gradient and each of Adam's two moments: float32, as `train` keeps and sends them."""
STATISTICS = 4 * 2 * 4
"""Bytes a token that the four LayerNorms of a layer keep: a mean and a deviation each, float32."""


@dataclass(frozen=True)
class Stack:
    """The sizes of a `LongNetLM` with tied embeddings and rotary positions; biases and LayerNorms are counted.

    Raises InvalidInput for sizes that do not fit together.

    Example:
        >>> Stack(hidden=768, layers=12, heads=12).parameters
        85344768
    """

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None
    feedforward: int | None = None
    vocabulary: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidInput(f"Stack: expected {field.name} to be at least 1. Got {value!r}.")
        if self.hidden % self.heads != 0:
            raise InvalidInput(f"Stack: hidden ({self.hidden}) must be a multiple of heads ({self.heads}).")
        if self.heads % self.key_heads != 0:
            raise InvalidInput(f"Stack: heads ({self.heads}) must be a multiple of kv_heads ({self.key_heads}).")

    @property
    def head_dim(self) -> int:
        """D, the dim of a head."""
        return self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """Hkv, key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys."""
        return self.key_heads * self.head_dim

    @property
    def width(self) -> int:
        """Numbers of a token inside the feed-forward part; four times hidden unless given."""
        return 4 * self.hidden if self.feedforward is None else self.feedforward

    @property
    def layer_weights(self) -> int:
        """Numbers in a layer's weight matrices."""
        return self.hidden * (2 * self.hidden + 2 * self.key_width) + 2 * self.hidden * self.width

    @property
    def layer_parameters(self) -> int:
        """A layer's parameters: weights, their biases, and four LayerNorms."""
        biases = (self.hidden + 2 * self.key_width) + self.hidden + self.width + self.hidden
        return self.layer_weights + biases + 2 * (3 * self.hidden + self.width)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + 2 * self.hidden + self.vocabulary * self.hidden

    def kept(self, item: int) -> int:
        """Bytes of a token that a layer keeps for its backward pass, in numbers of ``item`` bytes; float32 lse.

        Five rows for LayerNorms and matrix products before and behind attention, q, k, v and the rotated q and k, its
        output as it is and normed; three rows of the feed-forward part's width.
        """
        numbers = 8 * self.hidden + 3 * self.key_width + 3 * self.width
        return numbers * item + 4 * self.heads + STATISTICS


@dataclass(frozen=True)
class Job:
    """One training step: a sequence of ``tokens`` on each ``context`` of the ``world`` ranks, parameters over all.

    ``context`` None is the whole world. ``inner``, ``layout`` and ``method`` are those of `explain_world`. With
    ``checkpoint_activations`` a layer keeps its input alone and runs forward twice, its attention too.

    Raises InvalidInput for numbers that cannot be.
    """

    stack: Stack
    pattern: Pattern
    tokens: int
    world: int
    context: int | None = None
    inner: int = 1
    layout: str = "contiguous"
    method: str = "auto"
    dtype: str = "bf16"
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "world", "sharing", "inner"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(
                    f"Job: expected {name.replace('sharing', 'context')} to be at least 1. Got {value!r}."
                )
        if self.world % self.sharing != 0:
            raise InvalidInput(f"Job: context ({self.sharing}) must divide the world ({self.world} ranks).")
        if self.dtype not in DTYPES:
            raise InvalidInput(f"Job: expected dtype to be one of {', '.join(DTYPES)}. Got {self.dtype!r}.")

    @property
    def sharing(self) -> int:
        """Ranks that share a sequence."""
        return self.world if self.context is None else self.context


class Amount(NamedTuple):
    """Something of a rank in a step: bytes, FLOPs or seconds, and what it is made of."""

    name: str
    amount: float
    note: str


class Collective(NamedTuple):
    """What comes to the busiest rank in a step by one kind of collective: among whom, how often, bytes, seconds."""

    name: str
    ranks: int
    calls: int
    received: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """One step on one rank, the heaviest or busiest: ``memory`` in bytes, ``flops``, ``wire`` and ``times``.

    ``attention`` is one layer's, of one pass each way.
    """

    job: Job
    machine: Machine
    attention: WorldExplanation
    memory: tuple[Amount, ...]
    flops: tuple[Amount, ...]
    wire: tuple[Collective, ...]
    times: tuple[Amount, ...]

    @property
    def memory_bytes(self) -> float:
        """All of a rank's memory that is counted."""
        return sum(x.amount for x in self.memory)

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.memory_bytes <= self.machine.memory

    @property
    def seconds(self) -> float:
        """The step."""
        return sum(x.amount for x in self.times)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences over the step's seconds."""
        return self.job.tokens * (self.job.world // self.job.sharing) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, inputs too."""
        job = {f.name: getattr(self.job, f.name) for f in dataclasses.fields(self.job) if f.name != "stack"}
        return {
            "job": {**job, "pattern": self.job.pattern.text(), "context": self.job.sharing},
            "stack": {**dataclasses.asdict(self.job.stack), "parameters": self.job.stack.parameters},
            "machine": dataclasses.asdict(self.machine),
            "layout": self.attention.layout,
            "method": self.attention.choice.name,
            "refused": {name: list(reasons) for name, reasons in self.attention.choice.refused.items()},
            "pairs": self.attention.work.heaviest,
            "pairs_are_exact": self.attention.work.is_exact,
            "imbalance": self.attention.work.imbalance,
            "memory": [x._asdict() for x in self.memory],
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "flops": [x._asdict() for x in self.flops],
            "wire": [x._asdict() for x in self.wire],
            "times": [x._asdict() for x in self.times],
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def estimate(job: Job, machine: Machine) -> Estimate:
    """What one step of a job would take on a machine; nothing is run.

    Raises InvalidInput and NoBackend as `explain_world` does.

    Example:
        >>> from dilated_attention_pytorch import longnet
        >>> from dilated_attention_pytorch.parallel.machines import MACHINES
        >>> job = Job(Stack(), longnet([2048, 1 << 16], [1, 32]), tokens=10**6, world=8)
        >>> found = estimate(job, MACHINES["h100"])
        >>> found.attention.choice.name, found.fits
        ('gather', True)
    """
    stack = job.stack
    one = torch.empty(1, dtype=TORCH_DTYPES[job.dtype], device="meta")
    q, k = (one.expand(1, job.tokens, heads, stack.head_dim) for heads in (stack.heads, stack.key_heads))
    attention = explain_world(
        q, k, k, job.pattern, world=job.sharing, inner=job.inner, layout=job.layout, method=job.method, machine=machine
    )
    flops = _flops(job, attention)
    wire = (*_attention_wire(job, attention, machine), *_parameter_wire(job, machine))
    return Estimate(
        job=job,
        machine=machine,
        attention=attention,
        memory=_memory(job, attention),
        flops=flops,
        wire=wire,
        times=_times(job, machine, attention, flops, wire),
    )


def _memory(job: Job, attention: WorldExplanation) -> tuple[Amount, ...]:
    stack, rows, item = job.stack, attention.rows[1], DTYPES[job.dtype]
    share = math.ceil(stack.parameters / job.world) * STORED
    layer = rows * stack.kept(item) + _kept_by_attention(job, attention)
    kept, note = stack.layers * layer, f"{stack.layers} layers, all that backward reads"
    if job.checkpoint_activations:
        kept = stack.layers * rows * stack.hidden * item + layer
        note = f"the inputs of {stack.layers} layers, and one layer's all"
    gathered = 2 * stack.layer_parameters + stack.vocabulary * stack.hidden + 2 * stack.hidden
    keys = 2 * rows * stack.key_width
    wide = (rows * stack.hidden + keys) * STORED  # shares of dq, dk, dv are summed in float32
    sent = sum(leg.received.backward for leg in attention.legs)
    if any(leg.method == "ring" for leg in attention.legs):
        sent = 3 * keys * item + 3 * keys * STORED  # its own rows packed and two buffers, and their gradients
    return (
        Amount("parameters", share, f"{stack.parameters:,} in float32, sharded by FSDP2 over {job.world} ranks"),
        Amount("gradients", share, "float32, sharded"),
        Amount("optimizer", 2 * share, "Adam's two moments, float32, sharded"),
        Amount("gathered parameters", gathered * STORED, "two layers at a time, and the embedding"),
        Amount("gathered gradients", stack.layer_parameters * STORED, "one layer's before it is scattered"),
        Amount("activations", kept, note),
        Amount("positions", 2 * rows * stack.head_dim * item, "cosines and sines of this rank's rows"),
        Amount(
            "logits",
            rows * stack.vocabulary * (item + 2 * STORED),
            f"{rows:,} rows of {stack.vocabulary}, in float32 for the loss too",
        ),
        Amount("attention buffers", wide + sent, "gradients in float32, and rows on the wire"),
    )


def _kept_by_attention(job: Job, attention: WorldExplanation) -> float:
    """Bytes that attention of a layer keeps beyond `Stack.kept`: rows that came, or heads in place of rows."""
    stack, rows, item = job.stack, attention.rows[1], DTYPES[job.dtype]
    kept, heads = 0, stack.key_heads
    for number, leg in enumerate(attention.legs):
        if leg.method == "gather":
            kept += leg.received.forward
        elif leg.method == "all_to_all":
            shared = max(1, leg.ranks // heads)  # ranks that hold the same key-value head
            kept += rows * (2 * stack.hidden + 2 * shared * stack.key_width) * item + 4 * rows * stack.heads
            if number == 0:  # q, k, v as they were projected and rotated are not read again, nor is this rank's lse
                kept -= rows * (2 * stack.hidden + 3 * stack.key_width) * item + 4 * rows * stack.heads
            heads = max(1, heads // leg.ranks)
    return kept


def _flops(job: Job, attention: WorldExplanation) -> tuple[Amount, ...]:
    stack, rows, again = job.stack, attention.rows[1], job.checkpoint_activations
    layers = 2 * rows * stack.layers * stack.layer_weights
    logits = 2 * rows * stack.vocabulary * stack.hidden
    seen = stack.layers * attention.forward_flops
    found = (
        Amount("matrix products, forward", layers + logits, f"2 for each of {rows:,} rows and each weight"),
        Amount("matrix products, backward", 2 * (layers + logits), "twice that"),
        Amount("attention, forward", seen, f"{stack.layers} layers, {attention.work.heaviest:,} pairs each"),
        Amount("attention, backward", stack.layers * attention.backward_flops, "2.5 times that"),
    )
    return (*found, Amount("forward again", layers + seen, "activations are computed twice")) if again else found


def _attention_wire(job: Job, attention: WorldExplanation, machine: Machine) -> tuple[Collective, ...]:
    found = []
    for leg in attention.legs:
        name = _COLLECTIVES[leg.method]
        for way, size, calls in _ways(job, leg):
            seconds = machine.transfer_seconds(leg.messages, size, leg.span)
            found.append(Collective(f"{name}, {way}", leg.ranks, calls, calls * size, calls * seconds))
    return tuple(found)


_COLLECTIVES = {
    "ring": "attention ring (batch_isend_irecv)",
    "gather": "attention gather (all_to_all_single)",
    "all_to_all": "heads for tokens (all_to_all_single)",
}


def _ways(job: Job, leg: Leg) -> tuple[tuple[str, int, int], ...]:
    """(name, bytes of a layer, layers) of the passes."""
    layers, forward = job.stack.layers, 2 if job.checkpoint_activations else 1
    return ("forward", leg.received.forward, layers * forward), ("backward", leg.received.backward, layers)


def _parameter_wire(job: Job, machine: Machine) -> tuple[Collective, ...]:
    """FSDP2's: layers are gathered in both passes, what is outside of them once; gradients are scattered."""
    stack, world = job.stack, job.world
    if world == 1:
        return ()
    messages = math.ceil(math.log2(world))

    def collective(name: str, calls: int, parameters: int) -> Collective:
        received = parameters * STORED * (world - 1) // world
        seconds = machine.transfer_seconds(calls * messages, received, world)
        return Collective(name, world, calls, received, seconds)

    return (
        collective("parameters, forward (all_gather)", stack.layers + 1, stack.parameters),
        collective("parameters, backward (all_gather)", stack.layers, stack.layers * stack.layer_parameters),
        collective("gradients (reduce_scatter)", stack.layers + 1, stack.parameters),
    )


def _times(
    job: Job,
    machine: Machine,
    attention: WorldExplanation,
    flops: tuple[Amount, ...],
    wire: tuple[Collective, ...],
) -> tuple[Amount, ...]:
    rate = f"at {machine.attained:.0%} of {machine.rate(job.dtype) / 1e12:g} TFLOP/s"
    times = [Amount(x.name, machine.compute_seconds(x.amount, job.dtype), rate) for x in flops]
    computing = sum(x.amount for x in times)
    passes = 2 if job.checkpoint_activations else 1
    exposed = job.stack.layers * (passes * attention.forward.exposed + attention.backward.exposed)
    travelling = job.stack.layers * (passes * attention.forward.wire + attention.backward.wire)
    times.append(Amount("waiting for attention's rows", exposed, _told(travelling, "of which the rest is hidden")))
    sent = sum(x.seconds for x in wire if not x.name.startswith(("attention", "heads")))
    waited = max(0.0, sent - machine.overlap * computing)
    times.append(Amount("waiting for parameters", waited, _told(sent, "hidden behind computing")))
    return tuple(times)


def _told(seconds: float, what: str) -> str:
    return f"{seconds:.3g} s on the wire, {what}" if seconds else "nothing is sent"
