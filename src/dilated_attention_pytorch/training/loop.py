"""The training loop: a fixed number of steps over windows of bytes, stopped and continued without a trace.

Several processes go through the same steps: each computes its share of the batch, and all see the same loss.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.problem import accumulate_dtype
from dilated_attention_pytorch.training.checkpoint import Progress
from dilated_attention_pytorch.training.data import Bytes, Windows
from dilated_attention_pytorch.training.faults import MicroBatch, Watch, ran_out_of_memory
from dilated_attention_pytorch.training.ranks import ALONE, Ranks
from dilated_attention_pytorch.training.resume import Checkpoints
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


@dataclass(frozen=True)
class Learner:
    """What learns: `model` holds the parameters (or this rank's share), `called` computes with them."""

    model: torch.nn.Module
    called: torch.nn.Module
    optimizer: torch.optim.AdamW


def train(
    model: torch.nn.Module,
    run: Run,
    on_step: Callable[[Step], None] = lambda step: None,
    stop_requested: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> int:
    """`model` is trained until the last step of the run's settings, or until `stop_requested`; gives the steps done.

    `model(tokens)` maps (B, N) int64 bytes to (B, N, 256) logits. Training continues from the run's checkpoint where
    there is one; a checkpoint is written every `checkpoint_every` steps and at the end. The global random state is
    left as it was. When memory runs out, once, a batch is computed in parts. Raises InvalidInput for a damaged
    checkpoint, FloatingPointError when the loss is no longer finite, and torch.OutOfMemoryError.

    Several `ranks` all call it with equal models, which are changed to hold their shares. The first writes files; all
    see the same steps, and stop when one is asked to. Each draws dropout of hidden rows from a generator of its own,
    so with it the numbers depend on how many there are. Raises RankLost when another fails, and BeginAgain when memory
    ran out; see `faults.together`.
    """
    device = check_device(run.settings)
    model.to(device).train()
    called = ranks.share(model, run.settings)
    learner = Learner(model, called, adamw(model, run.settings))
    with contextlib.ExitStack() as held:
        held.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        ranks.on_first(lambda: held.enter_context(run.locked()))
        watch, micro_batch = Watch(run, ranks), MicroBatch(run, ranks)
        held.enter_context(watch.over())
        checkpoints = held.enter_context(Checkpoints(run, ranks))
        progress = checkpoints.load(model, learner.optimizer)
        ranks.on_first(lambda: run.keep_metrics(progress.step))

        def update(step: int) -> tuple[float, float]:
            return watch.attempt(step + 1, lambda: _update(learner, run, step, ranks, micro_batch), micro_batch)

        def save(progress: Progress) -> None:
            checkpoints.save(model, learner.optimizer, progress)

        return _steps(run, ranks, progress, update, save, on_step, stop_requested)


def batch_at(step: int, run: Run) -> Bytes:
    """The windows of `step` (from 0), (batch_size, window + 1): a pure function of it, so resume is exact."""
    settings = run.settings
    first = step if step < settings.short_steps else step - settings.short_steps
    windows = Windows(run.corpus.train, settings.window_at(step), settings.seed)
    return windows.batch(first * settings.batch_size, settings.batch_size)


def _steps(
    run: Run,
    ranks: Ranks,
    progress: Progress,
    update: Callable[[int], tuple[float, float]],
    save: Callable[[Progress], None],
    on_step: Callable[[Step], None],
    stop_requested: Callable[[], bool],
) -> int:
    settings = run.settings
    step, seconds = progress.step, progress.seconds
    saved = step
    with run.metrics.open("a") if ranks.is_first else contextlib.nullcontext() as metrics:
        while step < settings.steps and not ranks.any(stop_requested()):
            began = time.perf_counter()
            bits, norm = update(step)
            if not math.isfinite(bits) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"the loss is not finite at step {step + 1} (loss {bits}, gradient norm {norm}); start a new run "
                    f"with a lower learning rate than {settings.learning_rate:g}"
                )
            step += 1
            spent = time.perf_counter() - began
            seconds += spent
            speed = settings.batch_size * settings.window_at(step - 1) / spent
            line = Step(step, bits, learning_rate_at(step - 1, settings), norm, speed, seconds)
            if metrics is not None:
                metrics.write(json.dumps(dataclasses.asdict(line)) + "\n")
                metrics.flush()
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                if metrics is not None:
                    os.fsync(metrics.fileno())
                save(Progress(step, seconds))
                saved = step
            on_step(line)
        if saved < step:
            save(Progress(step, seconds))
    return step


def _update(learner: Learner, run: Run, step: int, ranks: Ranks, micro_batch: MicroBatch) -> tuple[float, float]:
    """The optimizer has made `step` (from 0); gives the loss in bits per byte and the gradient's norm.

    Both are of the whole batch, whatever each rank's share. A loss or gradient that is not finite is not applied.
    """
    batch = torch.from_numpy(batch_at(step, run)).long()
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate_at(step, run.settings)
    while True:
        learner.optimizer.zero_grad(set_to_none=True)
        try:
            loss = _backward(learner.called, batch, run.settings, ranks, micro_batch)
            break
        except (RuntimeError, MemoryError) as error:
            if ranks.size > 1 or not ran_out_of_memory(error):
                raise
            cause = str(error)  # the error itself holds the tensors that fill the memory
        micro_batch.halve(step + 1, cause)
    norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), run.settings.clip_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if torch.isfinite(norm):
        learner.optimizer.step()
    return ranks.total(loss).item() / math.log(2), norm.item()


def _backward(
    called: torch.nn.Module, batch: torch.Tensor, settings: TrainingSettings, ranks: Ranks, micro_batch: MicroBatch
) -> torch.Tensor:
    """This rank's share of the batch's mean loss in nats, whose gradients are added up.

    Shares may differ in length, so each is a sum over its own targets divided by the number of all.
    """
    device = next(called.parameters()).device
    shares = []
    parts = micro_batch.split(*(x.to(device) for x in ranks.deal(batch)))
    for number, (tokens, labels) in enumerate(parts, start=1):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bf16"):
            logits = called(tokens)
        logits = logits.to(accumulate_dtype(logits.dtype)).flatten(0, 1)
        share = functional.cross_entropy(logits, labels.flatten(), reduction="sum") / batch[:, 1:].numel()
        sent_later = isinstance(called, DistributedDataParallel) and number < len(parts)
        with called.no_sync() if sent_later else contextlib.nullcontext():  # type: ignore[operator]
            (share * ranks.size).backward()  # type: ignore[no-untyped-call]  # ranks' gradients are averaged
        shares.append(share.detach())
    return torch.stack(shares).sum()
