"""Progress bars: one for training, with loss, speed and time left, and one for work of known size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dilated_attention_pytorch.training.loop import Step


@contextmanager
def training_progress(console: Console, steps: int, done: int) -> Iterator[Callable[[Step], None]]:
    """A bar of `steps` steps, `done` of them done before; gives the function to call after each step.

    Where the output is no terminal, a plain line is printed for every twentieth of the steps instead.
    """
    smooth: dict[str, float] = {}

    def smoothed(name: str, value: float) -> float:
        smooth[name] = value if name not in smooth else 0.9 * smooth[name] + 0.1 * value
        return smooth[name]

    if not console.is_terminal:
        every = max(1, steps // 20)

        def line(step: Step) -> None:
            bits, speed = smoothed("bits", step.bits_per_byte), smoothed("speed", step.tokens_per_second)
            if step.step % every == 0 or step.step == steps:
                left = (steps - step.step) * step.seconds / step.step
                console.print(
                    f"step {step.step}/{steps}  {bits:.3f} bits/byte  {speed:,.0f} tokens/s  {left:.0f} s left",
                    highlight=False,
                )

        yield line
        return
    columns = (
        TextColumn("[bold]training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]} bits/byte  {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, completed=done, bits="-", speed="-")

        def update(step: Step) -> None:
            bits, speed = smoothed("bits", step.bits_per_byte), smoothed("speed", step.tokens_per_second)
            progress.update(task, completed=step.step, bits=f"{bits:.3f}", speed=f"{speed:,.0f}")

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
