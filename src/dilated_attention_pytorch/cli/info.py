"""`dilated-attention info`: versions, devices, and which backends can run here."""

from __future__ import annotations

from dilated_attention_pytorch.cli.console import out


def info() -> None:
    """Show versions, devices, and which backends can run here, or every reason why not.

    Its text belongs into a bug report.
    """
    import torch

    from dilated_attention_pytorch import explain, longnet
    from dilated_attention_pytorch.reports.tables import Table
    from dilated_attention_pytorch.training.environment import device_name, versions

    out.print(Table("Versions", ("package", "version"), tuple(versions().items())).to_rich())
    devices = [("cpu", device_name("cpu"))]
    devices += [(f"cuda:{n}", torch.cuda.get_device_name(n)) for n in range(torch.cuda.device_count())]
    out.print(Table("Devices", ("device", "what it is"), devices).to_rich())
    rows = []
    for device, _ in devices:
        dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16, torch.float32)
        for dtype in dtypes:
            x = torch.empty(1, 4096, 4, 64, dtype=dtype, device=device)
            answer = explain(x, x, x, longnet([1024, 4096], [1, 4]))
            for name, against in answer.backends.items():
                can = "; ".join(against) if against else "can" + (", chosen by auto" if name == answer.chosen else "")
                rows.append((name, device, str(dtype).removeprefix("torch."), can))
    out.print(Table("Backends for dilated attention", ("backend", "device", "dtype", "answer"), rows).to_rich())
