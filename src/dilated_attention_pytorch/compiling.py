"""What compiled code must not trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def run_eagerly(why: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A decorator: compiled code stops before the function, runs it as it is, and goes on behind it.

    Where a whole graph was asked for, the error of `torch.compile` says ``why``. (`torch.compiler.disable` imports the
    compiler, so it is asked for only while compiling.)

    Example:
        >>> run_eagerly("numbers decide")(max)(1, 2)
        2
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=why)
                eager: Callable[Arguments, Result] = torch.compiler.disable(function, reason=why)
                return eager(*arguments, **options)
            return function(*arguments, **options)

        return call

    return decorate
