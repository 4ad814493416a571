"""Progress bars: one for training, with loss, speed and time left, and one for work of known size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dilated_attention_pytorch.training.loop import Step
from dilated_attention_pytorch.training.settings import TrainingSettings


@contextmanager
def training_progress(console: Console, settings: TrainingSettings, done: int) -> Iterator[Callable[[Step], None]]:
    """A bar over the bytes to read, `done` steps of them read before; gives the function to call after each step.

    Where the output is no terminal, a plain line is printed for every twentieth of the bytes instead.
    """
    total = settings.tokens_until(settings.steps)
    smooth: dict[str, float] = {}

    def smoothed(name: str, value: float) -> float:
        smooth[name] = value if name not in smooth else 0.95 * smooth[name] + 0.05 * value
        return smooth[name]

    if not console.is_terminal:

        def line(step: Step) -> None:
            bits, speed = smoothed("bits", step.bits_per_byte), smoothed("speed", step.tokens_per_second)
            now, before = settings.tokens_until(step.step), settings.tokens_until(step.step - 1)
            if now * 20 // total > before * 20 // total:
                left = (total - now) * step.seconds / now
                words = (
                    f"step {step.step}/{settings.steps}  {bits:.3f} bits/byte  {speed:,.0f} tokens/s  {left:.0f} s left"
                )
                console.print(words, highlight=False, soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("[bold]training"),
        BarColumn(),
        TextColumn("step {task.fields[step]}/{task.fields[steps]}"),
        TextColumn("{task.fields[bits]} bits/byte  {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        before = settings.tokens_until(done)
        task = progress.add_task(
            "training", total=total, completed=before, step=done, steps=settings.steps, bits="-", speed="-"
        )

        def update(step: Step) -> None:
            bits, speed = smoothed("bits", step.bits_per_byte), smoothed("speed", step.tokens_per_second)
            now = settings.tokens_until(step.step)
            progress.update(task, completed=now, step=step.step, bits=f"{bits:.3f}", speed=f"{speed:,.0f}")

        yield update


@contextmanager
def share_progress(console: Console, words: str) -> Iterator[Callable[[float], None]]:
    """A bar for `words`; gives the function to call with the share done. Silent where the output is no terminal."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=1.0)
        yield lambda share: progress.update(task, completed=share)
