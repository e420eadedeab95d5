"""Using a trained model: called from Python on any pictures, exported, run without this project."""

from .detector import Detector
from .opening import load_detector, open_model

__all__ = ["Detector", "load_detector", "open_model"]
