"""Where the commands write: results to stdout, log lines and errors to stderr."""

import logging

from rich.console import Console
from rich.logging import RichHandler

from dilated_attention_pytorch.errors import InvalidInput

LOGGER = "dilated_attention_pytorch"
LEVELS = ("debug", "info", "warning", "error")

out = Console()
err = Console(stderr=True)


def show_log(level: str) -> None:
    """Log lines of this library from `level` upwards appear on stderr. Raises InvalidInput for an unknown level."""
    if level.lower() not in LEVELS:
        raise InvalidInput(f"--log-level must be one of {', '.join(LEVELS)}, got {level!r}")
    logger = logging.getLogger(LOGGER)
    logger.setLevel(level.upper())
    logger.propagate = False
    logger.handlers = [RichHandler(console=err, show_path=False, markup=False)]


def name_rank(rank: int) -> None:
    """Log lines of this process begin with the number of its rank."""
    for handler in logging.getLogger(LOGGER).handlers:
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
