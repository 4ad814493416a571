"""A CPU kernel of our own in C: strided rows and block tables read in place; built on first use."""

from dilated_attention_pytorch.backends.native.backend import NativeBackend, NativeOptions

__all__ = ["NativeBackend", "NativeOptions"]
