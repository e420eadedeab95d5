"""Loading and saving weights."""

from .checkpointer import SafeCheckpointer

__all__ = ["SafeCheckpointer"]
