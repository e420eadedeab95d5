"""A config's model and data for tools that look into what training has made."""

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint import why_missing
from ..config.device import is_out_of_memory, select_device
from ..config.overrides import constructor_arguments, given_keys, load_config
from ..config.own_data import num_classes_key, resolve_dataset
from ..config.preflight import check_classes, check_dataset, class_names
from ..data import NameUnreadable, ReadableBatches
from ..data.coco_file import is_whole
from ..errors import UserError
from ..modeling import StageInteractor
from .trained import fold_norms, load_trained

# Where StageInteractor, Detectron2's dense detectors and its R-CNNs have how many they keep.
NUM_DETECTIONS = (
    "model.detections_per_image",
    "model.max_detections_per_image",
    "model.roi_heads.box_predictor.test_topk_per_image",
)


def load_settled(config_file: str, overrides: Sequence[str], *, training: bool) -> DictConfig:
    """The config with overrides, its data set and device as a run would have them.

    Remarks on the data set go to stderr.

    Args:
        training: whether the training set is needed, too.

    Raises:
        UserError: the config or something it names is not usable.
    """
    cfg = load_config(config_file, list(overrides))
    given = given_keys(overrides)
    remarks = resolve_dataset(cfg, given, training=training)
    settle_detections(cfg, given)
    if remarks:
        print(f"data set: {remarks}", file=sys.stderr)
    cfg.train.device = select_device(cfg.train.device)
    return cfg


def settle_detections(cfg: DictConfig, given: Collection[str]):
    """Let the model keep as many detections as the evaluator counts, if the config says how many.

    Args:
        cfg: the config, changed in place.
        given: keys that the command line has set, which stay.

    Raises:
        UserError: the number is not one.
    """
    most = OmegaConf.select(cfg, "dataloader.evaluator.max_dets_per_image")
    if most is None:
        return
    if not is_whole(most) or most < 1:
        raise UserError(f"dataloader.evaluator.max_dets_per_image={most}: a whole number above 0")
    for key in set(NUM_DETECTIONS) - set(given):
        place, _, name = key.rpartition(".")
        part = OmegaConf.select(cfg, place)
        argument = constructor_arguments(part).get(name) if part else None
        if argument and 0 <= part.get(name, argument.default) < most:  # below 0: all
            OmegaConf.update(cfg, key, most, force_add=True)


def load_dataset(cfg: DictConfig, split: str) -> list[dict]:
    """Detectron2's dictionaries of the images of ``train`` or ``test``.

    Raises:
        UserError: the data set is missing, or the model has another number of classes.
    """
    options = cfg.dataloader[split].dataset
    check_dataset(options)
    dataset = instantiate(options)
    key = num_classes_key(cfg)
    check_classes(options, key, OmegaConf.select(cfg, key))
    return dataset


def build_mapper(cfg: DictConfig, split: str):
    """The mapper of ``train`` or ``test``; that of ``test`` keeps the annotations.

    Augmentations stay those of the split.
    """
    return instantiate({**cfg.dataloader[split].mapper, "is_train": True})


def build_test_loader(cfg: DictConfig, dataset: list[dict]) -> Iterable[list[dict]]:
    """Batches of the test set or of some of its images, objects included, see `ReadableBatches`."""
    mapper = NameUnreadable(build_mapper(cfg, "test"))
    options = {**cfg.dataloader.test, "dataset": dataset, "mapper": mapper}
    return ReadableBatches(instantiate(options))


def build_model(cfg: DictConfig) -> nn.Module:
    """The model on its device, with random weights. Raises UserError if its parts do not fit."""
    with explain_misfits("model"):
        model = instantiate(cfg.model)
    return model.to(cfg.train.device)


@contextlib.contextmanager
def explain_misfits(what: str, advice: str = "") -> Iterator[None]:
    """Turn what a wrong value in a config makes fail, which can be anything, into a UserError.

    A lack of memory, and what a disk fails with, stay what they are.

    Args:
        what: is wrong.
        advice: a second line.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError("\n".join(filter(None, [f"{what}: {reason}", advice]))) from error


def require_stages(model: nn.Module):
    """Raises UserError if a model is none whose decoder stages can be looked into."""
    if not isinstance(model, StageInteractor):
        raise UserError(
            f"{type(model).__name__} has no decoder stages: give a checkpoint of a StageInteractor "
            "or an AdaMixer"
        )


def check_checkpoint(path: str):
    """Raises UserError if there is no such file, which may be a URL."""
    if "://" not in path and not os.path.isfile(path):
        hint = "overrides come after another option" if "=" in path else "check the path"
        raise UserError(why_missing(path, hint))


def load_weights(cfg: DictConfig, model: nn.Module, checkpoint: str) -> nn.Module:
    """The model for inference with weights of a checkpoint, once the test set has been loaded.

    Raises:
        UserError: the checkpoint does not fit the model or the data.
    """
    names = class_names(cfg.dataloader.test.dataset)
    return fold_norms(load_trained(model, checkpoint, cfg.train.model_ema, names))
