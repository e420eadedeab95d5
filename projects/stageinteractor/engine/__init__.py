"""Training on Detectron2's engine: what ``tools/train_net.py`` adds to it."""

from .config import load_config
from .device import select_device
from .hooks import BestCheckpointer, ModelEMA
from .trainer import Trainer

__all__ = ["BestCheckpointer", "ModelEMA", "Trainer", "load_config", "select_device"]
