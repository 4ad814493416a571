"""`dilated-attention info`: versions, devices, which backends can run here, and what auto goes by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from dilated_attention_pytorch.cli.console import out

if TYPE_CHECKING:
    import torch


def info(
    support: Annotated[bool, typer.Option(help="Print the table of docs/backends.md instead, in Markdown.")] = False,
) -> None:
    """Show versions, devices, which backends can run here or every reason why not, and the tuning files in force.

    Its text belongs into a bug report. What is not installed is named with the line that installs it.
    """
    import torch

    from dilated_attention_pytorch.reports.tables import Table
    from dilated_attention_pytorch.training.environment import device_name, versions

    if support:
        from dilated_attention_pytorch.testing.support import support_table

        out.print(Text(support_table()), soft_wrap=True, end="")
        return
    out.print(Table("Versions", ("package", "version"), tuple(versions().items())).to_rich())
    devices = [("cpu", device_name("cpu"))]
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        devices += [(f"{kind}:{n}", module.get_device_name(n)) for n in range(module.device_count())]
    out.print(Table("Devices", ("device", "what it is"), devices).to_rich())
    names = [device for device, _ in devices]
    columns = ("backend", "device", "dtype", "answer")
    out.print(Table("Backends for dilated attention", columns, backend_rows(names)).to_rich())
    out.print(Text("What auto goes by", style="bold"))
    for path, state in dict.fromkeys(row for name in names for row in tuning_rows(torch.device(name))):
        out.print(Text(f"{path}\n  {state}"), soft_wrap=True)  # paths stay whole


def backend_rows(devices: list[str]) -> list[tuple[str, ...]]:
    """Rows (backend, device, dtype, answer): what an absent backend needs, or what it says on each device and dtype."""
    import torch

    from dilated_attention_pytorch.backends import BACKENDS

    rows: list[tuple[str, ...]] = []
    for backend in BACKENDS:
        missing = backend.import_error()
        if missing is not None:
            rows.append((backend.name, "any", "any", missing))
            continue
        for device in devices:
            dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16, torch.float32)
            rows += [(backend.name, device, _word(dtype), answer(backend.name, device, dtype)) for dtype in dtypes]
    return rows


def answer(name: str, device: str, dtype: torch.dtype) -> str:
    """What a backend says to LongNet's branches: "can", for what only, whether auto takes it; or every reason."""
    import torch

    from dilated_attention_pytorch import explain, longnet
    from dilated_attention_pytorch.backends import needs_tiles

    n = 512 if needs_tiles(name) else 4096  # tables of tiles are made to ask; long ones take seconds
    x = torch.empty(1, n, 4, 64, dtype=dtype, device=device)
    pattern = longnet([n // 4, n], [1, 4])
    forward, auto = (explain(x, x, x, pattern, backend=which) for which in (name, "auto"))
    against = forward.backends[name]
    if against:
        return "; ".join(against)
    x.requires_grad_()
    training = explain(x, x, x, pattern, backend=name).backends[name]
    only = f", forward only: {'; '.join(training)}" if training else ""
    return "can" + (", chosen by auto" if auto.chosen == name else "") + only


def tuning_rows(device: torch.device) -> list[tuple[str, str]]:
    """Rows (file, state) of the tables that auto asks for a device, in their order."""
    from dilated_attention_pytorch.backends import BACKENDS
    from dilated_attention_pytorch.backends.tuning import tables_in_force, user_file

    tables = tables_in_force(device, BACKENDS)
    rows = [
        (t.source, f"in force: {len(t.entries)} keys of {t.device}" + (f", torch {t.torch}" if t.torch else ""))
        for t in tables
    ]
    own = user_file(device)
    if str(own) not in {t.source for t in tables}:
        option = "" if device.type == "cpu" else f" --device {device}"
        state = f"damaged or foreign, ignored: 'dilated-attention tune --force{option}' makes it anew"
        absent = f"absent: 'dilated-attention tune{option}' makes it"
        rows.insert(0, (str(own), state if own.exists() else absent))
    return rows


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
