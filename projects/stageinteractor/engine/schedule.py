"""Schedules in epochs: configs have the iterations for COCO, a run those for its own data."""

import logging
import math
from typing import Collection, Sequence

from omegaconf import DictConfig

from ..errors import UserError

COCO_EPOCH = 7330  # steps: 117266 images with objects, 16 a step
MAX_WARMUP = 0.1  # of a run that is too short for the whole warm-up


def set_epochs(
    train: DictConfig,
    lr_multiplier: DictConfig,
    epochs: int,
    milestones: Sequence[int],
    warmup_steps: int = 500,
):
    """Set the length of a config's schedule, for COCO with 16 images a step.

    Evaluation and checkpoint come once an epoch.

    Args:
        train, lr_multiplier: the config's, changed in place.
        epochs: length of the schedule.
        milestones: epochs after which the learning rate falls.
        warmup_steps: steps until it is at its height.
    """
    train.epochs = epochs
    train.max_iter = epochs * COCO_EPOCH
    train.eval_period = train.checkpointer.period = COCO_EPOCH
    lr_multiplier.scheduler.update(milestones=list(milestones), num_updates=epochs)
    lr_multiplier.warmup_length = warmup_steps / train.max_iter


def fit_schedule(cfg: DictConfig, num_images: int, given: Collection[str]):
    """Recompute a config's iteration numbers for a data set and batch size.

    Periods that are whole epochs of COCO become epochs of the data. The warm-up keeps its number of
    steps, unless that were more than a tenth of the run. Numbers of a config without
    ``train.epochs``, and those given on the command line, stay as they are.

    Args:
        cfg: the config, changed in place.
        num_images: images of the training set.
        given: keys that the command line has set.

    Raises:
        UserError: the config's iterations are not those of its epochs, so that one is a mistake.
    """
    train = cfg.train
    images_a_step = cfg.dataloader.train.total_batch_size * train.accumulation_steps
    if train.scale_lr.enabled:
        cfg.optimizer.lr *= images_a_step / train.scale_lr.batch_size
    if train.epochs is None or "train.max_iter" in given:
        return
    if "train.epochs" not in given and train.max_iter != train.epochs * COCO_EPOCH:
        raise UserError(
            f"the config's train.max_iter={train.max_iter} are not train.epochs={train.epochs} of "
            f"COCO ({COCO_EPOCH} iterations each): to count iterations set train.epochs=null"
        )
    epoch = math.ceil(num_images / images_a_step)
    warmup_steps = cfg.lr_multiplier.warmup_length * train.max_iter
    train.max_iter = train.epochs * epoch
    cfg.lr_multiplier.warmup_length = min(warmup_steps / train.max_iter, MAX_WARMUP)
    for options, name, key in (
        (train, "eval_period", "train.eval_period"),
        (train.checkpointer, "period", "train.checkpointer.period"),
    ):
        if key not in given and options[name] % COCO_EPOCH == 0:
            options[name] = options[name] // COCO_EPOCH * epoch
    logging.getLogger(f"detectron2.{__name__}").info(
        f"{train.epochs} epochs of {num_images} images, {images_a_step} a step: {train.max_iter} "
        f"iterations, {cfg.lr_multiplier.warmup_length * train.max_iter:.0f} of them to warm up, "
        f"evaluation every {train.eval_period}, checkpoint every {train.checkpointer.period}; "
        f"learning rate {cfg.optimizer.lr:g}"
    )
