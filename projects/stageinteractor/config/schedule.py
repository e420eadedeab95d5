"""Schedules in epochs: configs give iterations for COCO, which a run adapts to its own data."""

import logging
import math
from collections.abc import Collection, Sequence

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig

from ..errors import UserError

# Fields of `train` that detrex does not have, and that change what is trained.
ONLY_HERE = ("epochs", "scale_lr", "accumulation_steps", "compile")
COCO_EPOCH = 7330  # steps: 117266 images with objects, 16 a step
MAX_WARMUP = 0.1  # share of a run that is too short for the whole warm-up


def set_epochs(
    train: DictConfig,
    lr_multiplier: DictConfig,
    epochs: int,
    milestones: Sequence[int],
    warmup_steps: int = 500,
):
    """Set the length of a config's schedule, for COCO with 16 images a step.

    An evaluation and a checkpoint follow each epoch.

    Args:
        train, lr_multiplier: of the config, changed in place.
        epochs: length of the schedule.
        milestones: epochs after which the learning rate drops.
        warmup_steps: steps until the learning rate reaches its full value.
    """
    if "epochs" in train:  # detrex counts iterations
        train.epochs, train.warmup_steps = epochs, warmup_steps
    train.max_iter = epochs * COCO_EPOCH
    train.eval_period = train.checkpointer.period = COCO_EPOCH
    lr_multiplier.scheduler.update(milestones=list(milestones), num_updates=epochs)
    lr_multiplier.warmup_length = warmup_steps / train.max_iter


def warmup_schedule(
    *,
    scheduler: ParamScheduler,
    warmup_factor: float,
    warmup_length: float,
    warmup_method: str = "linear",
    train: DictConfig,
    own_data: str | None,
    json_file: str | None,
) -> WarmupParamScheduler:
    """Make Detectron2's schedule with warm-up, unless the training script ignores the command line.

    detrex's script ignores keys that it does not know, and so would train something else.

    Args:
        train: of the config.
        own_data, json_file: the training set that ``dataset`` asks for, and the one that is loaded.

    Raises:
        UserError: a key has no effect.
    """
    ignored = []
    if "max_skipped_steps" not in train:  # detrex's fields
        ignored = [f"train.{name}" for name in ONLY_HERE if train.get(name) is not None]
    if own_data not in (None, json_file):
        ignored.append("dataset.train")
    if ignored:
        raise UserError(
            f"{', '.join(ignored)}: only this project's own tools/train_net.py reads that. With "
            "another one, set train.max_iter, optimizer.lr, dataloader.train.total_batch_size and "
            "dataloader.train.dataset"
        )
    return WarmupParamScheduler(scheduler, warmup_factor, warmup_length, warmup_method)


def resolve_schedule(cfg: DictConfig, given: Collection[str]):
    """Adapt a schedule to the part of it that the command line sets.

    Args:
        cfg: the config, changed in place.
        given: keys that the command line sets.

    Raises:
        UserError: epochs and iterations contradict each other.
    """
    train = cfg.train
    if "lr_multiplier.warmup_length" in given:
        train.warmup_steps = None
    if "train.epochs" in given and train.epochs is not None:
        if "train.max_iter" in given:
            raise UserError("give train.epochs or train.max_iter, not both")
        train.max_iter = train.epochs * COCO_EPOCH
    elif "train.max_iter" in given:
        train.epochs = None
    elif train.epochs is not None and train.max_iter != train.epochs * COCO_EPOCH:
        raise UserError(
            f"train.max_iter={train.max_iter} of the config is not train.epochs={train.epochs} of "
            f"COCO ({COCO_EPOCH} iterations each). To count iterations, set train.epochs=null"
        )


def fit_schedule(cfg: DictConfig, num_images: int):
    """Recompute a config's iteration numbers for a data set and batch size, and log them.

    If ``train.epochs`` is set, it gives the length of the run. Periods of whole epochs of COCO
    become epochs of the data. ``train.warmup_steps`` stays, but is limited to a tenth of the run.
    ``train.scale_lr`` multiplies the learning rate. Everything else stays as it is.

    Args:
        cfg: the config, changed in place.
        num_images: number of training images.
    """
    train = cfg.train
    images_a_step = cfg.dataloader.train.total_batch_size * train.accumulation_steps
    epoch = math.ceil(num_images / images_a_step)
    if train.epochs is not None:
        train.max_iter = train.epochs * epoch
    for options, name in ((train, "eval_period"), (train.checkpointer, "period")):
        if options[name] % COCO_EPOCH == 0:
            options[name] = options[name] // COCO_EPOCH * epoch
    if train.warmup_steps is not None:
        cfg.lr_multiplier.warmup_length = min(train.warmup_steps / train.max_iter, MAX_WARMUP)
    if train.scale_lr.enabled:
        cfg.optimizer.lr *= images_a_step / train.scale_lr.batch_size
    length = "" if train.epochs is None else f"{train.epochs} epochs of "
    logging.getLogger(f"detectron2.{__name__}").info(
        f"{length}{num_images} images, {images_a_step} a step: {train.max_iter} iterations, "
        f"{cfg.lr_multiplier.warmup_length * train.max_iter:.0f} of them to warm up, evaluation "
        f"every {train.eval_period}, checkpoint every {train.checkpointer.period}; "
        f"learning rate {cfg.optimizer.lr:g}"
    )
