"""Ctrl-C and SIGTERM as a request: the step under way is finished and a checkpoint written."""

import signal
from types import FrameType


class StopRequest:
    """Inside `with`, the first SIGINT or SIGTERM is kept in `signal` (0: none yet); a second one interrupts at once."""

    signal: int = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
