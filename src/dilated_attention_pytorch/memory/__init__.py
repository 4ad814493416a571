"""Where work buffers come from."""

from dilated_attention_pytorch.memory.workspace import Workspace, empty, fill_with_nan

__all__ = ["Workspace", "empty", "fill_with_nan"]
