"""The commands put together, and what becomes of their errors."""

from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from dilated_attention_pytorch.cli.bench import bench
from dilated_attention_pytorch.cli.console import err, show_log
from dilated_attention_pytorch.cli.estimate import estimate
from dilated_attention_pytorch.cli.evaluate import evaluate
from dilated_attention_pytorch.cli.explain import explain
from dilated_attention_pytorch.cli.generate import generate
from dilated_attention_pytorch.cli.info import info
from dilated_attention_pytorch.cli.memory import memory
from dilated_attention_pytorch.cli.train import train
from dilated_attention_pytorch.cli.tune import tune
from dilated_attention_pytorch.errors import InvalidInput, NoBackend


class Commands(TyperGroup):
    """Errors that speak to the user become one red line and an exit code; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Exit code 2: bad input or no backend; 1: training diverged."""
        try:
            return super().invoke(ctx)
        except (InvalidInput, NoBackend) as error:
            err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)  # paths stay whole
            raise typer.Exit(2) from error
        except FloatingPointError as error:
            err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)  # paths stay whole
            raise typer.Exit(1) from error


app = typer.Typer(
    name="dilated-attention",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]dilated-attention train[/bold]: about five minutes on two cores, nothing to download.",
)


@app.callback()
def options(
    log_level: Annotated[
        str, typer.Option(help="Show log lines from here up: debug, info, warning or error.")
    ] = "info",
) -> None:
    """LongNet's dilated attention: exact, on any device, at any length. Train, evaluate, look inside."""
    show_log(log_level)


for command in (train, evaluate, generate, info, explain, estimate, memory, tune, bench):
    app.command()(command)
