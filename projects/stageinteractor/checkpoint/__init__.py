"""Loading, saving and converting weights."""

from .checkpointer import SafeCheckpointer
from .files import class_names_in

__all__ = ["SafeCheckpointer", "class_names_in"]
