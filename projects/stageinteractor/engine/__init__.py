"""Training on Detectron2's engine: what ``tools/train_net.py`` adds to it."""

from .checks import check_classes, check_dataset, check_options, class_names
from .config import load_config
from .device import select_device
from .hooks import BestCheckpointer, ModelEMA
from .schedule import fit_schedule, settle_schedule
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "ModelEMA",
    "Trainer",
    "check_classes",
    "check_dataset",
    "check_options",
    "class_names",
    "fit_schedule",
    "load_config",
    "select_device",
    "settle_schedule",
]
