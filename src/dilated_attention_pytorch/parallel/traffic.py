"""What travels: bytes that one rank receives."""

from __future__ import annotations

from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes that one rank receives for one attention call, what is its own not counted.

    Example:
        >>> Traffic(10, 30).total
        40
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward together, bytes."""
        return self.forward + self.backward
