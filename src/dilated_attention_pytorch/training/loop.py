"""The training loop: a fixed number of steps over windows of bytes, stopped and continued without a trace."""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from dilated_attention_pytorch.training.data import Bytes, Windows
from dilated_attention_pytorch.training.run import Run
from dilated_attention_pytorch.training.settings import TrainingSettings, learning_rate_at

log = logging.getLogger("dilated_attention_pytorch")


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl: loss in bits per byte, the norm before clipping, seconds of training since step
    1."""

    step: int
    bits_per_byte: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds: float


def check_device(settings: TrainingSettings) -> torch.device:
    """The device of the settings. Raises InvalidInput when this machine does not have it."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device 'cuda' was asked for, but this PyTorch sees no CUDA device; use --device cpu")
    return torch.device(settings.device)


def adamw(model: torch.nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (arXiv 1711.05101), betas (0.9, 0.95)."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, betas=(0.9, 0.95)
    )


def train(
    model: torch.nn.Module,
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:
    """`model` is trained until the last step of the run's settings, or until `stop_requested`; gives the steps done.

    `model(tokens)` maps (B, N) int64 bytes to (B, N, 256) logits. Training continues from the run's checkpoint where
    there is one; a checkpoint is written every `checkpoint_every` steps and at the end. The global random state is
    left as it was. Raises InvalidInput for a damaged checkpoint, FloatingPointError when the loss is no longer
    finite.
    """
    device = check_device(run.settings)
    model.to(device).train()
    optimizer = adamw(model, run.settings)
    with run.locked(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        progress = Progress(0, 0.0)
        if run.checkpoint.exists():
            progress = load_checkpoint(run.checkpoint, model, optimizer)
            if progress.step > run.settings.steps:
                raise InvalidInput(
                    f"{run.checkpoint} is at step {progress.step}, past the {run.settings.steps} of its run"
                )
            log.info("continuing %s after step %d", run.path, progress.step)
        else:
            torch.manual_seed(run.settings.seed)
        run.keep_metrics(progress.step)
        return _steps(model, optimizer, run, progress, on_step, stop_requested)


def batch_at(step: int, run: Run) -> Bytes:
    """The windows of `step` (from 0), (batch_size, window + 1): a pure function of it, so resume is exact."""
    settings = run.settings
    first = step if step < settings.short_steps else step - settings.short_steps
    windows = Windows(run.corpus.train, settings.window_at(step), settings.seed)
    return windows.batch(first * settings.batch_size, settings.batch_size)


def _steps(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    run: Run,
    progress: Progress,
    on_step: Callable[[Step], None],
    stop_requested: Callable[[], bool],
) -> int:
    settings = run.settings
    step, seconds = progress.step, progress.seconds
    saved = step
    with run.metrics.open("a") as metrics:
        while step < settings.steps and not stop_requested():
            began = time.perf_counter()
            batch = torch.from_numpy(batch_at(step, run)).long()
            rate = learning_rate_at(step, settings)
            bits, norm = _update(model, optimizer, batch.to(next(model.parameters()).device), rate, settings)
            if not math.isfinite(bits) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"the loss is not finite at step {step + 1} (loss {bits}, gradient norm {norm}); start a new run "
                    f"with a lower learning rate than {settings.learning_rate:g}"
                )
            step += 1
            spent = time.perf_counter() - began
            seconds += spent
            speed = settings.batch_size * settings.window_at(step - 1) / spent
            line = Step(step, bits, rate, norm, speed, seconds)
            metrics.write(json.dumps(dataclasses.asdict(line)) + "\n")
            metrics.flush()
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                os.fsync(metrics.fileno())
                save_checkpoint(run.checkpoint, model, optimizer, Progress(step, seconds))
                saved = step
            on_step(line)
        if saved < step:
            save_checkpoint(run.checkpoint, model, optimizer, Progress(step, seconds))
    return step


def _update(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    batch: torch.Tensor,
    rate: float,
    settings: TrainingSettings,
) -> tuple[float, float]:
    """One step of the optimizer on `batch` (B, N + 1); gives the loss in bits per byte and the gradient's norm.

    A loss or gradient that is not finite is not applied.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bf16"):
        logits = model(batch[:, :-1])
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    if torch.isfinite(norm):
        optimizer.step()
    return loss.item() / math.log(2), norm.item()
