"""How fast devices compute and send: data-sheet numbers, and what is assumed to be attainable of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dilated_attention_pytorch.errors import InvalidInput

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number of each dtype that a step may compute in."""


@dataclass(frozen=True)
class Machine:
    """One rank's device, its node and its network. Rates are per device and per direction, from ``source``.

    ``half_rate`` and ``single_rate`` are dense matrix FLOP/s in 16 bits and FLOP/s in float32 without TF32; ``memory``
    is bytes; ``node_bandwidth`` and ``network_bandwidth`` are bytes/s to ranks of the same node and of others.
    The rest are assumptions: the shares of these rates that a step attains, the seconds that a message costs beside
    its bytes, and the share of the computation beside a transfer that really hides it.

    Raises InvalidInput for numbers that cannot be.

    Example:
        >>> MACHINES["h100"].rate("bf16") / MACHINES["a100"].rate("bf16") > 3
        True
    """

    name: str
    half_rate: float
    single_rate: float
    memory: float
    node_bandwidth: float
    network_bandwidth: float
    ranks_per_node: int
    source: str
    attained: float = 0.4
    attained_bandwidth: float = 0.8
    node_latency: float = 10e-6
    network_latency: float = 20e-6
    overlap: float = 0.8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            share = field.name in ("attained", "attained_bandwidth", "overlap")
            least = 0.0 if share or field.name.endswith("latency") else math.ulp(0.0)
            if not math.isfinite(value) or value < least or (share and value > 1):
                raise InvalidInput(
                    f"Machine: expected {field.name} {'from 0 to 1' if share else 'above 0'}. Got {value!r}."
                )
        if self.attained == 0 or self.attained_bandwidth == 0:
            raise InvalidInput("Machine: expected attained and attained_bandwidth above 0; nothing would ever end.")

    def rate(self, dtype: str) -> float:
        """FLOP/s of the data sheet for a dtype of `DTYPES`."""
        return self.single_rate if dtype == "fp32" else self.half_rate

    def compute_seconds(self, flops: float, dtype: str) -> float:
        """Seconds for so many FLOPs at the attained share of the rate."""
        return flops / (self.rate(dtype) * self.attained)

    def spans_nodes(self, ranks: int) -> bool:
        """Whether so many ranks do not fit one node."""
        return ranks > self.ranks_per_node

    def transfer_seconds(self, messages: float, received: float, ranks: int) -> float:
        """The alpha-beta model: ``messages * latency + received bytes / attained bandwidth``.

        Among more ranks than one node holds all bytes are counted at the network's bandwidth, which is an upper bound.
        """
        far = self.spans_nodes(ranks)
        latency = self.network_latency if far else self.node_latency
        bandwidth = self.network_bandwidth if far else self.node_bandwidth
        return messages * latency + received / (bandwidth * self.attained_bandwidth)


def _machine(
    name: str, half: float, single: float, memory: float, node: float, network: float, source: str
) -> tuple[str, Machine]:
    """A machine from TFLOP/s, GB and GB/s."""
    return name, Machine(name, half * 1e12, single * 1e12, memory * 1e9, node * 1e9, network * 1e9, 8, source)


MACHINES: dict[str, Machine] = dict(
    (
        _machine(
            "a100", 312, 19.5, 80, 300, 25, "NVIDIA A100 80GB SXM and DGX A100 data sheets: NVLink 600 GB/s both ways, "
            "one 200 Gb/s adapter per GPU",
        ),
        _machine(
            "h100", 989, 67, 80, 450, 50, "NVIDIA H100 SXM and DGX H100 data sheets: NVLink 900 GB/s both ways, one "
            "400 Gb/s adapter per GPU",
        ),
        _machine(
            "h200", 989, 67, 141, 450, 50, "NVIDIA H200 SXM and DGX H200 data sheets: NVLink 900 GB/s both ways, one "
            "400 Gb/s adapter per GPU",
        ),
        _machine(
            "b200", 2250, 75, 180, 900, 50, "NVIDIA HGX B200 data sheet, an eighth of the board: NVLink 1.8 TB/s both "
            "ways, network 0.8 TB/s of the board both ways",
        ),
        _machine(
            "mi300x", 1307.4, 163.4, 192, 448, 50, "AMD Instinct MI300X data sheets: seven Infinity Fabric links of "
            "128 GB/s both ways (a ring uses one of them), and an assumed 400 Gb/s adapter per GPU",
        ),
    )
)  # fmt: skip
"""Known machines by name: eight devices a node."""


def machine_named(name: str) -> Machine:
    """The machine of `MACHINES` with this name; InvalidInput, which lists them, for another.

    Example:
        >>> machine_named("h200").ranks_per_node
        8
    """
    if name not in MACHINES:
        raise InvalidInput(f"expected a machine of {', '.join(MACHINES)}. Got {name!r}.")
    return MACHINES[name]
