"""Loading, saving and converting weights."""

from .checkpointer import SafeCheckpointer
from .files import about_checkpoint

__all__ = ["SafeCheckpointer", "about_checkpoint"]
