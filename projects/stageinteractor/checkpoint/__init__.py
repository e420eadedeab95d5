"""Loading, saving and converting weights."""

from .checkpointer import SafeCheckpointer

__all__ = ["SafeCheckpointer"]
