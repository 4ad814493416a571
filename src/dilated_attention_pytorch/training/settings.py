"""What a training run is told: frozen, checked at construction, stored with the run."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.parallel.layouts import LAYOUTS

PARALLEL = ("fsdp", "ddp")
COMPRESSIONS = ("none", "fp16", "bf16", "powersgd")
SHARING = frozenset({"context_parallel", "layout", "parallel", "gradient_compression"})
"""The settings that say how several processes share the work."""


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of one run. Windows are in bytes, rates are per step, `final_rate` a share of `learning_rate`.

    The first `short_share` of the steps read windows of `short_window` bytes, which gives more steps per byte;
    the others read `window`, so that every context up to it has been trained. `checkpoint_every` counts steps.
    `threads` is the number of CPU threads that the run was started with: results are equal to the last bit only with
    the same number.

    The last four say how several processes share the work, and change last bits only (compression more): every
    sequence is dealt in `layout` over `context_parallel` of them, the batch over the others; `parallel` is "fsdp"
    (parameters are sharded) or "ddp" (each process has all of them), and `gradient_compression` what "ddp" sends.
    Raises InvalidInput for values that cannot work.

    >>> TrainingSettings(steps=0)
    Traceback (most recent call last):
    dilated_attention_pytorch.errors.InvalidInput: steps must be an integer of at least 1, got 0
    """

    steps: int = 1500
    window: int = 8192
    short_window: int = 2048
    short_share: float = 0.975
    batch_size: int = 1
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    final_rate: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    autocast: str = "none"
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    checkpoint_every: int = 50
    context_parallel: int = 1
    layout: str = "contiguous"
    parallel: str = "fsdp"
    gradient_compression: str = "none"

    def __post_init__(self) -> None:
        """Check every value."""
        for name in (
            "steps",
            "window",
            "short_window",
            "batch_size",
            "threads",
            "checkpoint_every",
            "context_parallel",
        ):
            self._integer(name, 1)
        for name in ("seed", "warmup_steps"):
            self._integer(name, 0)
        if self.seed >= 2**32:
            raise InvalidInput(f"seed must be below 2**32, got {self.seed}")
        for name, least, most in (
            ("learning_rate", 1e-9, 10.0),
            ("final_rate", 0.0, 1.0),
            ("short_share", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0),
            ("clip_norm", 1e-6, 1e6),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not least <= value <= most:
                raise InvalidInput(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
        if self.short_window > self.window:
            raise InvalidInput(
                f"short_window must be at most window ({self.window}), got {self.short_window}; set both, as with "
                f"--set window={self.window} --set short_window={max(1, self.window // 8)}"
            )
        if self.autocast not in ("none", "bf16"):
            raise InvalidInput(f"autocast must be 'none' or 'bf16', got {self.autocast!r}")
        if self.device not in ("cpu", "cuda"):
            raise InvalidInput(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        self._check_sharing()

    @property
    def short_steps(self) -> int:
        """The steps that read short windows."""
        return round(self.short_share * self.steps)

    def window_at(self, step: int) -> int:
        """The window of `step` (from 0), in bytes."""
        return self.short_window if step < self.short_steps else self.window

    def tokens_until(self, step: int) -> int:
        """Bytes that the first `step` steps read.

        >>> TrainingSettings(steps=10, window=100, short_window=10, short_share=0.5, batch_size=2).tokens_until(7)
        500
        """
        short = min(step, self.short_steps)
        return self.batch_size * (short * self.short_window + (step - short) * self.window)

    def _check_sharing(self) -> None:
        """Check how processes share the work."""
        for name, known in (("layout", LAYOUTS), ("parallel", PARALLEL), ("gradient_compression", COMPRESSIONS)):
            if getattr(self, name) not in known:
                words = ", ".join(map(repr, known))
                raise InvalidInput(f"{name} must be one of {words}, got {getattr(self, name)!r}")
        if self.layout != LAYOUTS[0] and self.context_parallel == 1:
            raise InvalidInput(
                f"layout {self.layout!r} says how a sequence is dealt over several processes, but context_parallel is "
                "1; set that too, or leave the layout out"
            )
        if self.gradient_compression != "none" and self.parallel != "ddp":
            raise InvalidInput(
                f"gradient_compression {self.gradient_compression!r} is a communication hook of "
                "DistributedDataParallel, and fully_shard has none; add --parallel ddp, or leave the compression out"
            )
        if self.gradient_compression == "bf16" and self.device == "cpu":
            raise InvalidInput(
                "gradient_compression 'bf16': PyTorch's hook sums in bf16 on NCCL alone, and the device is cpu; use "
                "'fp16', or --device cuda"
            )

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInput(f"{name} must be an integer of at least {least}, got {value!r}")

    @classmethod
    def from_dict(cls, values: Any) -> "TrainingSettings":
        """The settings that `dataclasses.asdict` gave. Raises InvalidInput for names that are missing or unknown.

        Runs from before several processes could train have none of those settings, and get the defaults.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not names - SHARING <= set(values) <= names:
            raise InvalidInput(f"settings must name exactly {sorted(names)}, got {values!r:.200}")
        return cls(**values)


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """The learning rate of `step` (from 0): a linear warm-up, then a half cosine down to `final_rate` of the peak.

    The cosine runs over bytes, not steps, so that long windows behind short ones are still learnt from.

    >>> settings = TrainingSettings(steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    >>> [round(learning_rate_at(step, settings), 3) for step in (0, 9, 10, 99)]
    [0.1, 1.0, 1.0, 0.1]
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    first, last = settings.tokens_until(settings.warmup_steps), settings.tokens_until(settings.steps - 1)
    done = min(1.0, (settings.tokens_until(step) - first) / max(1, last - first))
    share = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * share
