"""The two errors that users meet. Each says what was expected, what came, and how to mend it."""


class InvalidInput(ValueError):
    """The input is not a legal problem; nothing was computed and nothing was changed."""


class NoBackend(NotImplementedError):
    """The named backend cannot compute this problem; the message lists every reason."""
