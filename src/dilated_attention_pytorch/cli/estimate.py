"""`dilated-attention estimate`: what a training step on many ranks would take, without any of them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import out
from dilated_attention_pytorch.cli.explain import Lengths, Rates, integers
from dilated_attention_pytorch.cli.overrides import fields, overrides
from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    from dilated_attention_pytorch.parallel.estimate import Estimate
    from dilated_attention_pytorch.parallel.machines import Machine
    from dilated_attention_pytorch.reports.tables import Table

MODEL = "Model"
SHARING = "Sharing"


def estimate(
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of a sequence; 1e9 and 65536 will do.")],
    segments: Lengths,
    rates: Rates,
    world: Annotated[int, typer.Option(help="Ranks, one device each.")] = 8,
    gpu: Annotated[str, typer.Option(help="The device: a100, h100, h200, b200 or mi300x.")] = "h100",
    causal: Annotated[bool, typer.Option(help="Mask the future.")] = False,
    hidden: Annotated[int, typer.Option(help="Width of the model.", rich_help_panel=MODEL)] = 768,
    layers: Annotated[int, typer.Option(help="Layers.", rich_help_panel=MODEL)] = 12,
    heads: Annotated[int, typer.Option(help="Heads.", rich_help_panel=MODEL)] = 12,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads. Without it: as many as heads.", rich_help_panel=MODEL)
    ] = None,
    feedforward: Annotated[
        int | None,
        typer.Option(help="Width inside feed-forward. Without it: four times hidden.", rich_help_panel=MODEL),
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens in the vocabulary.", rich_help_panel=MODEL)] = 256,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.", rich_help_panel=MODEL)] = "bf16",
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Keep each layer's input only, and run it twice.", rich_help_panel=MODEL)
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Ranks that share a sequence. Without it: all.", rich_help_panel=SHARING)
    ] = None,
    inner: Annotated[
        int, typer.Option(help="Ranks in a row of a mesh, which exchange heads for tokens.", rich_help_panel=SHARING)
    ] = 1,
    layout: Annotated[
        str, typer.Option(help="contiguous, zigzag, striped, or auto: the fastest here.", rich_help_panel=SHARING)
    ] = "contiguous",
    method: Annotated[
        str, typer.Option(help="ring, gather, all_to_all, or auto: the fewest bytes.", rich_help_panel=SHARING)
    ] = "auto",
    machine: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any number of the machine, as attained=0.5; an unknown name lists them.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict memory, FLOPs, bytes on the wire and seconds of one training step on many ranks.

    Runs nothing and needs no device. Bytes and FLOPs are counted; seconds follow from rates, every one of which is
    printed and can be replaced by --set. FSDP2 shards parameters over all ranks; --context ranks share a sequence.

    [bold]Examples[/bold]

    dilated-attention estimate --tokens 1e9 --world 1024 --segments 2048,32768,1048576 --rates 1,16,512

    dilated-attention estimate --tokens 1e6 --world 64 --context 8 --segments 2048,32768 --rates 1,12 --gpu h200

    dilated-attention estimate --tokens 1e8 --world 128 --segments 4096,1048576 --rates 1,256 --causal --layout auto
    --checkpoint-activations --set network_bandwidth=25e9 --set attained=0.5
    """
    from dilated_attention_pytorch.parallel.estimate import Job, Stack
    from dilated_attention_pytorch.parallel.estimate import estimate as estimated
    from dilated_attention_pytorch.parallel.machines import machine_named
    from dilated_attention_pytorch.patterns import Causal, longnet

    pattern = longnet(integers("--segments", segments), integers("--rates", rates))
    device = machine_named(gpu)
    (changed,) = overrides(machine or [], {n: x for n, x in fields(device).items() if not isinstance(x, str)})
    job = Job(
        Stack(hidden, layers, heads, kv_heads, feedforward, vocabulary),
        pattern & Causal() if causal else pattern,
        whole_number("--tokens", tokens),
        world,
        context,
        inner,
        layout,
        method,
        dtype,
        checkpoint_activations,
    )
    found = estimated(job, dataclasses.replace(device, **changed))
    if as_json:
        out.print(Text(json.dumps(found.to_dict(), indent=1)), soft_wrap=True)
        return
    out.print(Text(str(found.attention)), soft_wrap=True)
    for table in tables(found, set(changed)):
        out.print(table.to_rich())
    room = "fits" if found.fits else "does not fit"
    out.print(
        Text(
            f"{found.seconds:.4g} s a step, {found.tokens_per_second:,.0f} tokens/s of all ranks; "
            f"{found.memory_bytes / 1e9:,.1f} GB a rank, which {room} {found.machine.memory / 1e9:g} GB"
        )
    )


def tables(found: Estimate, changed: set[str]) -> list[Table]:
    """What `estimate` prints: memory, work, the wire, time, and what was assumed; ``changed`` fields of the machine."""
    from dilated_attention_pytorch.reports.tables import Table

    memory = [(x.name, f"{x.amount / 1e6:,.1f}", x.note) for x in found.memory]
    memory.append(("together", f"{found.memory_bytes / 1e6:,.1f}", f"of {found.machine.memory / 1e6:,.0f}"))
    wire = [
        (x.name, f"{x.ranks}", f"{x.calls}", f"{x.received / 1e6:,.1f}", f"{1e3 * x.seconds:,.2f}") for x in found.wire
    ]
    times = [(x.name, f"{1e3 * x.amount:,.2f}", x.note) for x in found.times]
    times.append(("the step", f"{1e3 * found.seconds:,.2f}", ""))
    total = sum(x.amount for x in found.flops)
    return [
        Table(
            "Memory of a rank",
            ("what", "MB", "made of"),
            memory,
            note="The device's context, the allocator's reserve and short-lived rows are not counted.",
            strong=frozenset({len(memory) - 1}),
        ),
        Table(
            "Work of the heaviest rank in a step",
            ("what", "TFLOP", "made of"),
            [
                *((x.name, f"{x.amount / 1e12:,.2f}", x.note) for x in found.flops),
                ("together", f"{total / 1e12:,.2f}", ""),
            ],
            strong=frozenset({len(found.flops)}),
        ),
        Table(
            "What comes to the busiest rank in a step",
            ("collective", "ranks", "calls", "MB", "ms"),
            wire,
            note="" if wire else "One rank: nothing is sent.",
        ),
        Table(
            "Time of a step",
            ("what", "ms", "made of"),
            times,
            note="A prediction. Norms, rotations, the loss and the optimizer are not counted apart.",
            strong=frozenset({len(times) - 1}),
        ),
        Table(
            "What the times go by",
            ("what", "value", "from", "--set"),
            assumptions(found.machine, changed),
            note=f"Data sheet: {found.machine.source}.",
        ),
    ]


def assumptions(machine: Machine, changed: set[str]) -> list[tuple[str, str, str, str]]:
    """Rows (what, value, where it is from, its name for ``--set``)."""
    sheet, assumed = "data sheet", "assumed"
    rows = (
        ("half_rate", "FLOP/s in 16 bits", f"{machine.half_rate:.4g}", sheet),
        ("single_rate", "FLOP/s in float32", f"{machine.single_rate:.4g}", sheet),
        ("attained", "share of the rate that is attained", f"{machine.attained:g}", assumed),
        ("memory", "memory, bytes", f"{machine.memory:.4g}", sheet),
        ("ranks_per_node", "devices of a node", f"{machine.ranks_per_node}", assumed),
        ("node_bandwidth", "bytes/s inside a node, one way", f"{machine.node_bandwidth:.4g}", sheet),
        ("network_bandwidth", "bytes/s between nodes, one way", f"{machine.network_bandwidth:.4g}", sheet),
        ("attained_bandwidth", "share of the bandwidth attained", f"{machine.attained_bandwidth:g}", assumed),
        ("node_latency", "s for a message inside a node", f"{machine.node_latency:g}", assumed),
        ("network_latency", "s for a message between nodes", f"{machine.network_latency:g}", assumed),
        ("overlap", "share of computing that hides transfers", f"{machine.overlap:g}", assumed),
    )
    return [(what, value, "--set" if name in changed else source, name) for name, what, value, source in rows]


def whole_number(name: str, text: str) -> int:
    """The integer that the text of an option is, also as 1e9. Raises InvalidInput, naming the option, for others.

    >>> whole_number("--tokens", "1e9"), whole_number("--tokens", "65_536")
    (1000000000, 65536)
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise InvalidInput(f"{name} must be a whole number, as 65536 or 1e9; got {text!r}")
