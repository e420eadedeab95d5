"""Training on Detectron2's engine: what ``tools/train_net.py`` adds to it."""

from .checks import check_classes, check_dataset, check_options, class_names
from .config import load_config, path_override
from .dataset import num_classes_key, settle_dataset
from .device import keep_freed_memory, select_device
from .hooks import BestCheckpointer, ModelEMA
from .pictures import PredictionPictures
from .progress import default_writers
from .schedule import fit_schedule, settle_schedule
from .summary import RunSummary, summarize_evaluation
from .trained import fold_norms, load_trained, other_classes
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "ModelEMA",
    "PredictionPictures",
    "RunSummary",
    "Trainer",
    "check_classes",
    "check_dataset",
    "check_options",
    "class_names",
    "default_writers",
    "fit_schedule",
    "fold_norms",
    "load_config",
    "load_trained",
    "num_classes_key",
    "other_classes",
    "path_override",
    "keep_freed_memory",
    "select_device",
    "settle_dataset",
    "settle_schedule",
    "summarize_evaluation",
]
