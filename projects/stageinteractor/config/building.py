"""Build what a config describes: its model, data sets and loaders."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..data import NameUnreadable, ReadableBatches
from ..data.coco_file import id_order, is_whole, read_tables
from ..errors import UserError
from .device import is_out_of_memory, select_device
from .overrides import constructor_arguments, given_keys, load_config
from .own_data import num_classes_key, resolve_dataset
from .preflight import categories, check_classes, check_dataset

# Keys of the number of detections kept: StageInteractor, Detectron2's dense detectors, its R-CNNs.
NUM_DETECTIONS = (
    "model.detections_per_image",
    "model.max_detections_per_image",
    "model.roi_heads.box_predictor.test_topk_per_image",
)
# What a wrong value in a config makes a constructor raise.
MISFITS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError, OmegaConfBaseException,
)


def load_resolved(config_file: str, overrides: Sequence[str], *, training: bool) -> DictConfig:
    """The config with overrides, its data set and device as a run would have them.

    Remarks on the data set go to stderr.

    Args:
        training: whether the training set is needed, too.

    Raises:
        UserError: the config or something it names cannot be used.
    """
    cfg = load_config(config_file, list(overrides))
    given = given_keys(overrides)
    remarks = resolve_dataset(cfg, given, training=training)
    resolve_detections(cfg, given)
    if remarks:
        print(f"data set: {remarks}", file=sys.stderr)
    cfg.train.device = select_device(cfg.train.device)
    return cfg


def resolve_detections(cfg: DictConfig, given: Collection[str]):
    """Let the model keep as many detections as the evaluator counts, if the config says how many.

    Args:
        cfg: the config, changed in place.
        given: keys that the command line has set, which stay.

    Raises:
        UserError: the evaluator's number is not a whole number above 0.
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


def build_mapper(cfg: DictConfig, split: str) -> Callable[[dict], Any]:
    """The mapper of ``train`` or ``test`` with its own augmentations, which keeps annotations."""
    return instantiate({**cfg.dataloader[split].mapper, "is_train": True})


def build_test_loader(cfg: DictConfig, dataset: list[dict]) -> Iterable[list[dict]]:
    """Batches of the test set or of some of its images, with their objects.

    Iterating raises UserError if an image cannot be read, see `ReadableBatches`.
    """
    mapper = NameUnreadable(build_mapper(cfg, "test"))
    options = {**cfg.dataloader.test, "dataset": dataset, "mapper": mapper}
    return ReadableBatches(instantiate(options))


def dataset_categories(cfg: DictConfig) -> list[dict]:
    """``id`` and ``name`` of the classes of the test set, as far as they are known without it."""
    dataset = cfg.dataloader.test.dataset
    if cfg.dataset.val or "json_file" in dataset:
        found = read_tables(cfg.dataset.val or dataset.json_file, keep=False).categories
        found = sorted(found, key=lambda category: id_order(category["id"]))
        return [{key: category[key] for key in ("id", "name")} for category in found]
    return categories(dataset)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model on its device, with random weights. Raises UserError if its parts do not fit."""
    with explain_misfits("model"):
        model = instantiate(cfg.model)
    return model.to(cfg.train.device)


@contextlib.contextmanager
def explain_misfits(what: str, advice: str = "") -> Iterator[None]:
    """Turn what a wrong value in a config makes a constructor raise into a UserError.

    A lack of memory, and kinds of error that a wrong value does not cause, are not changed.

    Args:
        what: the part that does not fit.
        advice: a second line.
    """
    try:
        yield
    except MISFITS as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError("\n".join(filter(None, [f"{what}: {reason}", advice]))) from error
