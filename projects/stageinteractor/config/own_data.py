"""Your own COCO-format files in place of a config's data sets.

Every config accepts ``dataset.train=FILE dataset.val=FILE dataset.images=FOLDER``. A config file
can instead set ``dataset = dict(train=..., val=..., images=...)``.
"""

import functools
import math
import os
from collections.abc import Collection
from types import SimpleNamespace

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data import ResizeShortestEdgeBilinear, coco_dataset
from ..data.coco_file import Finding, read_tables
from ..data.dataset_checks import Split, check_splits, describe
from ..data.object_checks import check_numbers, check_sizes, training_objects
from ..errors import UserError
from .main_process import in_main_process

DATASET = {
    "train": None,  # JSON files in COCO's instance format
    "val": None,
    "images": None,  # folder that file names are relative to; None: the folder of the JSON file
    "val_images": None,  # the same for val, if it is another folder
    "keep_empty": False,  # also train on images without objects
    "allow_mistakes": False,  # train in spite of mistakes that the checks find
}
SMALL_OBJECT = 8  # pixels of the network's input: two cells of its finest features
QUERIES = "model.query_generator.num_queries"
# The number of classes in StageInteractor, Detectron2's dense detectors and its R-CNNs.
NUM_CLASSES = ("model.decoder.num_classes", "model.num_classes", "model.roi_heads.num_classes")


def resolve_dataset(cfg: DictConfig, given: Collection[str], *, training: bool) -> str:
    """Replace the config's data sets by the files of ``dataset``, if it names any.

    The number of classes becomes that of the files, unless the command line sets it.

    Args:
        cfg: the config, changed in place.
        given: keys that the command line sets.
        training: whether this is a training run; an evaluation needs ``dataset.val`` only.

    Returns:
        remarks of the checks that do not prevent training; empty if there are none.

    Raises:
        UserError: a file is missing, or the checks find mistakes; all of them are listed.
    """
    splits = own_splits(cfg.dataset, training)
    if not splits:
        return ""

    def check() -> tuple[list[Finding], dict[str, int]]:
        findings = check_splits(splits) + check_capacity(cfg, splits)
        files = [split.json_file for split in splits.values()]
        return findings, {file: len(read_tables(file).categories) for file in files}

    findings, numbers = in_main_process(check)
    mistakes = [finding for finding in findings if finding.is_mistake]
    are_loaded = all(numbers.values()) and not any(f.kind == "broken entry" for f in mistakes)
    if mistakes and not (cfg.dataset.allow_mistakes and are_loaded):
        raise UserError(
            f"mistakes in the data set: {len(mistakes)}\n{describe(mistakes)}\n"
            "tools/check.py data shows more. dataset.allow_mistakes=true trains in spite of them, "
            "if all entries can be read and the files have the same number of classes"
        )
    if len({*numbers.values()}) > 1:
        found = " and ".join(f"{file} has {number} classes" for file, number in numbers.items())
        raise UserError(
            f"{found}, and a model has one number of classes: list the same categories in both "
            "files, also those without objects"
        )
    for name, split in splits.items():
        part = "train" if name == "train" else "test"
        cfg.dataloader[part].dataset = L(coco_dataset)(**split._asdict())
    if "train" in splits:
        cfg.dataloader.train.dataset.update(
            training=True, filter_empty=not cfg.dataset.keep_empty
        )
    cfg.dataloader.evaluator.dataset_name = "${..test.dataset.json_file}"
    if not set(NUM_CLASSES) & set(given):
        OmegaConf.update(cfg, num_classes_key(cfg), numbers[splits["val"].json_file])
    return describe(findings, limit=3)


def check_capacity(cfg: DictConfig, splits: dict[str, Split]) -> list[Finding]:
    """Remarks on objects that the model cannot find: too many in an image, or too small."""
    num_queries, findings = OmegaConf.select(cfg, QUERIES), []
    key = "dataloader.test.mapper.augmentations"
    try:
        augmentations = instantiate(OmegaConf.select(cfg, key, default=[]))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error
    scale = functools.cache(functools.partial(_input_scale, augmentations))
    for file in dict.fromkeys(split.json_file for split in splits.values()):
        tables = read_tables(file)
        if num_queries:
            advice = f"with {QUERIES}={num_queries}, the model cannot find more"
            findings += check_numbers(
                "more objects than queries", file, training_objects(tables), num_queries, advice
            )
        advice = f"larger images may help ({key}, and those of train)"
        findings += check_sizes(file, tables, SMALL_OBJECT, scale, advice)
    return findings


def _input_scale(augmentations, height, width):
    """The factor by which an image grows as the network's input: the mean of both sides."""
    size = height, width
    for augmentation in augmentations:
        if isinstance(augmentation, (ResizeShortestEdgeBilinear, T.ResizeShortestEdge, T.Resize)):
            resize = augmentation.get_transform(SimpleNamespace(shape=(*size, 3)))
            size = resize.new_h, resize.new_w
    return math.sqrt(math.prod(size) / (height * width))


def own_splits(dataset: DictConfig, training: bool) -> dict[str, Split]:
    """The splits that a run needs: ``val``, and ``train`` to train; empty if no file is given.

    Raises:
        UserError: one of the splits is missing, a key is unknown, or a value is not a path.
    """
    unknown = dataset.keys() - DATASET.keys()
    if unknown:
        raise UserError(f"dataset.{min(unknown)}: unknown key, the keys are {', '.join(DATASET)}")
    for name in ("train", "val", "images", "val_images"):
        try:
            dataset[name]
        except OmegaConfBaseException as error:  # ${...} that refers to nothing
            reason = str(error).splitlines()[0]
            raise UserError(f"dataset.{name}: {reason}; write the path itself") from error
        if not isinstance(dataset[name] or "", str):
            raise UserError(f"dataset.{name}={dataset[name]}: not a path; put numbers in quotes")
        dataset[name] = dataset[name] and os.path.expanduser(dataset[name])
    if not (dataset.train or dataset.val):
        if dataset.images or dataset.val_images:
            raise UserError("dataset.images needs dataset.train=FILE and dataset.val=FILE")
        return {}
    splits = {}
    for name in ("train", "val") if training else ("val",):
        file = dataset[name]
        if not file:
            raise UserError(f"dataset.{name} is missing: add dataset.{name}=FILE, in COCO's format")
        folder = dataset.images or os.path.dirname(file) or "."
        splits[name] = Split(file, dataset.val_images or folder if name == "val" else folder)
    return splits


def num_classes_key(cfg: DictConfig) -> str:
    """The key of the config that holds its model's number of classes.

    Raises:
        UserError: the model has none of the known keys.
    """
    for key in NUM_CLASSES:
        if OmegaConf.select(cfg, key) is not None:
            return key
    raise UserError(f"the config has its model's number of classes in none of {NUM_CLASSES}")
