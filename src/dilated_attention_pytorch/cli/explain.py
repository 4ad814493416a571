"""`dilated-attention explain`: what an attention call would do, without doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import out
from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    import torch

WORLD = "Many ranks"
DTYPES = ("float32", "float64", "bfloat16", "float16")

Lengths = Annotated[str, typer.Option(metavar="W,W,...", help="Segment lengths in tokens, with commas.")]
Rates = Annotated[str, typer.Option(metavar="R,R,...", help="Dilation rates, one per segment length.")]


def explain(
    seq_len: Annotated[int, typer.Option(help="Tokens.")],
    segments: Lengths,
    rates: Rates,
    heads: Annotated[int, typer.Option(help="Heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 64,
    causal: Annotated[bool, typer.Option(help="Mask the future.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="meta asks about the plan alone, and needs no memory.")] = "cpu",
    training: Annotated[bool, typer.Option(help="Gradients will be asked for; other backends may be faster then.")] = (
        False
    ),
    backend: Annotated[str, typer.Option(help="Ask for this backend by its name, or let auto choose.")] = "auto",
    world: Annotated[
        int | None, typer.Option(help="Ranks that share the sequence: show their plan instead.", rich_help_panel=WORLD)
    ] = None,
    inner: Annotated[
        int | None,
        typer.Option(help="Ranks in a row of a mesh, which exchange heads for tokens.", rich_help_panel=WORLD),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="contiguous, zigzag, striped, or auto: the fastest. Without it: contiguous.", rich_help_panel=WORLD
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="ring, gather, all_to_all, or auto: the fewest bytes. Without it: auto.", rich_help_panel=WORLD
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Whose times: a100, h100, h200, b200 or mi300x. Without it: h100.", rich_help_panel=WORLD),
    ] = None,
) -> None:
    """Show the plan, the work in FLOPs and bytes, what auto takes and why, and what each backend says to it.

    Computes nothing. A backend that is not installed is named with the line that installs it. With --world it shows
    how ranks would share the sequence: bytes and FLOPs of each, how even they are, what overlaps, and what each
    method says to it.

    [bold]Examples[/bold]

    dilated-attention explain --seq-len 65536 --segments 2048,8192 --rates 1,4

    dilated-attention explain --seq-len 1000000 --segments 2048,32768 --rates 1,12 --causal --device meta

    dilated-attention explain --seq-len 1048576 --segments 2048,1048576 --rates 1,16 --world 8 --dtype bfloat16
    """
    import torch

    import dilated_attention_pytorch as door

    if dtype not in DTYPES:
        raise InvalidInput(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value, least in (("--seq-len", seq_len, 0), ("--heads", heads, 1), ("--head-dim", head_dim, 1)):
        if value < least:
            raise InvalidInput(f"{name} must be at least {least}, got {value}")
    pattern = door.longnet(integers("--segments", segments), integers("--rates", rates))
    one = torch.empty(1, dtype=getattr(torch, dtype), device=device_of(device), requires_grad=training)
    x = one.expand(1, seq_len, heads, head_dim)  # a view of one number: only shape, dtype and device are looked at
    whole = pattern & door.Causal() if causal else pattern
    named = {"inner": inner, "layout": layout, "method": method, "gpu": gpu}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if world is None:
        if given:
            raise InvalidInput(f"--{next(iter(given))} is about ranks that share the sequence; give --world too")
        out.print(Text(str(door.explain(x, x, x, whole, backend=backend))), soft_wrap=True)
        return
    if backend != "auto" or training:
        raise InvalidInput("--world shows both passes, and no backend's; leave out --backend and --training")
    from dilated_attention_pytorch.parallel.explanation import explain_world

    machine = given.pop("gpu", "h100")
    found = explain_world(x, x, x, whole, world=world, machine=machine, **given)
    out.print(Text(str(found)), soft_wrap=True)


def device_of(name: str) -> torch.device:
    """The device of this name. Raises InvalidInput unless tensors can be made on it."""
    import torch

    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"--device {name} cannot be used here: {reason}") from error


def integers(name: str, text: str) -> list[int]:
    """The integers of `text`, which stand between commas. Raises InvalidInput, naming the option, for anything else.

    >>> integers("--rates", "1, 2,4")
    [1, 2, 4]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInput(f"{name} must be integers with commas between them, as 1,2,4; got {text!r}") from error
