"""Loading, saving and converting weights."""

from .checkpointer import SafeCheckpointer
from .model_file import ModelFile

__all__ = ["ModelFile", "SafeCheckpointer"]
