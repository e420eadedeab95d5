"""A person's own COCO-format files in place of a config's data sets.

Every config takes ``dataset.train=FILE dataset.val=FILE dataset.images=FOLDER``; a config of one's
own may have ``dataset = dict(train=..., val=..., images=...)`` instead.
"""

import os
from typing import Collection, Dict

from detectron2.config import LazyCall as L
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..data import coco_dataset
from ..data.checks import Split, check_splits, describe
from ..data.coco_file import read_tables
from ..errors import UserError

DATASET = dict(
    train=None,  # JSON files in COCO's instance format
    val=None,
    images=None,  # folder that file names are relative to; None: that of the JSON file
    val_images=None,  # where it is another one
    keep_empty=False,  # train on images without objects too
    allow_mistakes=False,  # train in spite of what the checks find
)
# Where StageInteractor, Detectron2's dense detectors and its R-CNNs have their number of classes.
NUM_CLASSES = ("model.decoder.num_classes", "model.num_classes", "model.roi_heads.num_classes")


def settle_dataset(cfg: DictConfig, given: Collection[str], *, training: bool) -> str:
    """Put the files of ``dataset``, if it names any, where the config has its data sets.

    The number of classes becomes that of the files, unless the command line gives one.

    Args:
        cfg: the config, changed in place.
        given: keys that the command line has set.
        training: whether this is a training run; evaluation needs ``dataset.val`` only.

    Returns:
        what the checks have to say although training can go on, or nothing.

    Raises:
        UserError: a file is missing, or the checks find mistakes; all of them are listed.
    """
    splits = own_splits(cfg.dataset, training)
    if not splits:
        return ""
    # One process reads the files; all of them hear what it found.
    findings = comm.all_gather(check_splits(splits) if comm.is_main_process() else None)[0]
    mistakes = [finding for finding in findings if finding.is_mistake]
    categories = {name: read_tables(split.json_file).categories for name, split in splits.items()}
    if mistakes and not (cfg.dataset.allow_mistakes and all(categories.values())):
        raise UserError(
            f"mistakes in the data set: {len(mistakes)}\n{describe(mistakes)}\n"
            "tools/check_dataset.py shows more; dataset.allow_mistakes=true goes on all the same, "
            "if the files can be read"
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
        OmegaConf.update(cfg, num_classes_key(cfg), len(categories["val"]))
    return describe(findings) if findings else ""


def own_splits(dataset: DictConfig, training: bool) -> Dict[str, Split]:
    """The splits that a run needs: ``val``, and ``train`` where it trains; none without files.

    Raises:
        UserError: one of them is not given, a key is unknown, or a value is no path.
    """
    unknown = dataset.keys() - DATASET.keys()
    if unknown:
        raise UserError(f"dataset.{min(unknown)}: there is {', '.join(DATASET)}")
    for name in ("train", "val", "images", "val_images"):
        if not isinstance(dataset[name] or "", str):
            raise UserError(f"dataset.{name}={dataset[name]}: one path, a number in quotes")
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
    """Where whatever model the config has keeps its number of classes.

    Raises:
        UserError: in none of the places that are known.
    """
    for key in NUM_CLASSES:
        if OmegaConf.select(cfg, key) is not None:
            return key
    raise UserError(f"the config's model has its number of classes in none of {NUM_CLASSES}")
