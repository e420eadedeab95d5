"""Training on Detectron2's engine: what ``tools/train_net.py`` adds to it."""

from .checks import categories, check_classes, check_dataset, check_options, class_names
from .config import given_keys, load_config, path_override
from .dataset import num_classes_key, settle_dataset
from .device import keep_freed_memory, select_device
from .failures import explain, may_be_of_one, takes_traceback
from .hooks import (
    BestCheckpointer,
    FinishStep,
    ModelEMA,
    PeriodicCheckpointer,
    PeriodicWriter,
    StepSeeds,
)
from .interruption import (
    EXIT_CODE,
    NOT_SAVED,
    Interrupted,
    forward_to_children,
    is_restarted,
    on_signals,
    raise_on_ctrl_c,
    stop_at_once_next_time,
)
from .out_of_memory import explain_out_of_memory
from .output import sole_use
from .pictures import PredictionPictures
from .portable_config import portable_config
from .processes import exit_at_once, join_torchrun, lost_contact
from .resume import (
    RunSettings,
    checkpoint_to_resume,
    fingerprint,
    parameter_names,
)
from .schedule import fit_schedule, settle_schedule
from .summary import RunSummary, summarize_evaluation
from .trained import fold_norms, load_trained, other_classes
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "EXIT_CODE",
    "FinishStep",
    "Interrupted",
    "ModelEMA",
    "NOT_SAVED",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PredictionPictures",
    "RunSettings",
    "RunSummary",
    "StepSeeds",
    "Trainer",
    "categories",
    "check_classes",
    "check_dataset",
    "check_options",
    "checkpoint_to_resume",
    "class_names",
    "exit_at_once",
    "explain",
    "explain_out_of_memory",
    "fingerprint",
    "fit_schedule",
    "fold_norms",
    "forward_to_children",
    "given_keys",
    "is_restarted",
    "join_torchrun",
    "load_config",
    "load_trained",
    "lost_contact",
    "may_be_of_one",
    "num_classes_key",
    "on_signals",
    "other_classes",
    "parameter_names",
    "path_override",
    "portable_config",
    "keep_freed_memory",
    "raise_on_ctrl_c",
    "select_device",
    "settle_dataset",
    "settle_schedule",
    "sole_use",
    "stop_at_once_next_time",
    "summarize_evaluation",
    "takes_traceback",
]
