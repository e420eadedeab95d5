"""Loading, saving and converting weights."""

from .checkpointer import SafeCheckpointer, why_missing
from .weight_files import about_checkpoint

__all__ = ["SafeCheckpointer", "about_checkpoint", "why_missing"]
