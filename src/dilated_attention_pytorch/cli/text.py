"""Between text and the model's tokens, one per byte."""

import re

import torch

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def to_tokens(text: bytes, device: torch.device) -> torch.Tensor:
    """The bytes as (1, N) int64 tokens."""
    return torch.tensor([list(text)], dtype=torch.int64, device=device)


def to_text(data: bytes) -> str:
    """The bytes as text that is safe to show: what is not UTF-8, and control characters, become U+FFFD.

    >>> to_text(b"a\\tb\\x1b[2J\\xff\\n")
    'a\\tb�[2J�\\n'
    """
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", data.decode("utf-8", errors="replace").replace("\r\n", "\n"))
