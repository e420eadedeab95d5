"""Checks of options, files and classes before a run starts, and the names of its classes."""

import difflib
import math
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..errors import UserError
from ..files import make_folder

# Whole numbers: the least that works, and what null means where it is allowed.
WHOLE = {
    "dataloader.train.total_batch_size": (1, None),
    "dataloader.train.num_workers": (0, None),
    "dataloader.test.num_workers": (0, None),
    "train.max_iter": (1, None),
    "train.epochs": (1, "count iterations"),
    "train.warmup_steps": (0, "use lr_multiplier.warmup_length"),
    "train.scale_lr.batch_size": (1, None),
    "train.accumulation_steps": (1, None),
    "train.max_skipped_steps": (0, None),
    "train.log_period": (1, None),
    "train.eval_period": (0, None),
    "train.checkpointer.period": (1, None),
    "train.checkpointer.max_to_keep": (1, "keep all"),
}
POSITIVE = ("optimizer.lr", "train.clip_grad.params.max_norm")


def check_options(cfg: DictConfig):
    """Check the values of ``train`` that would fail only later, or never. Makes the output folder.

    Raises:
        UserError: a value cannot work, or the output folder cannot be written to.
    """
    options = cfg.train
    if options.amp.dtype not in ("bfloat16", "float16"):
        raise UserError(f"train.amp.dtype={options.amp.dtype}: choose bfloat16 or float16")
    for key, (least, null_means) in WHOLE.items():
        value = OmegaConf.select(cfg, key, default=least)
        if value is None and null_means:
            continue
        if not isinstance(value, int) or value < least:
            or_null = f", or null to {null_means}" if null_means else ""
            raise UserError(f"{key}={value}: a whole number, at least {least}{or_null}")
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key, default=1)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{key}={value}: a finite number above 0")
    if not 0 <= options.model_ema.decay < 1:
        raise UserError(f"train.model_ema.decay={options.model_ema.decay}: 0 or more, below 1")
    batch, processes = cfg.dataloader.train.total_batch_size, comm.get_world_size()
    if batch % processes:
        raise UserError(
            f"dataloader.train.total_batch_size={batch} does not divide over {processes} "
            f"processes: take a multiple of {processes}"
        )
    if not make_folder(options.output_dir):
        raise UserError(f"cannot write to {options.output_dir}: set train.output_dir=FOLDER")


def dataset_names(dataset: DictConfig) -> list[str]:
    """The names under which Detectron2 knows a data set of the config."""
    names = dataset.get("json_file", dataset.get("names"))
    return [names] if isinstance(names, str) else list(names or [])


def check_dataset(dataset: DictConfig):
    """Check that the files of a data set exist.

    Raises:
        UserError: a name is unknown, or a file or folder is missing.
    """
    if dataset.get("json_file", "") is None:
        raise UserError("no data set: add dataset.train=FILE dataset.val=FILE, in COCO's format")
    for name in dataset_names(dataset):
        metadata = dataset
        if "json_file" not in dataset:
            if name not in DatasetCatalog:
                close = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
                hint = f", did you mean {close[0]}?" if close else ""
                raise UserError(f"no data set is registered as {name}{hint}")
            metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path and not os.path.exists(path):
                root = os.environ.get("DETECTRON2_DATASETS", "datasets")
                raise UserError(
                    f"data set {name}: no {path}\n"
                    f"COCO belongs in {root}/coco (annotations/instances_*2017.json, train2017/, "
                    "val2017/); DETECTRON2_DATASETS=FOLDER sets another root. "
                    "For the demo's data, run python tools/prepare_trees.py"
                )


def check_classes(dataset: DictConfig, key: str, num_classes: int):
    """Compare the number of classes of a loaded data set with the model's.

    Args:
        dataset: the config's data set.
        key: the model's number of classes in the config.
        num_classes: its value.

    Raises:
        UserError: the numbers differ.
    """
    for name in dataset_names(dataset):
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if classes and len(classes) != num_classes:
            raise UserError(
                f"{key}={num_classes}, but {name} has {len(classes)} classes: "
                f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
            )


def categories(dataset: DictConfig) -> list[dict]:
    """The classes of a loaded data set, in the model's order: ``id`` in its files, and ``name``.

    Empty if the data set has no classes or has not been loaded.
    """
    for name in dataset_names(dataset):
        metadata = MetadataCatalog.get(name)
        names = metadata.get("thing_classes")
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        if names and ids:
            return [{"id": i, "name": name} for i, name in zip(sorted(ids, key=ids.get), names)]
    return []


def class_names(dataset: DictConfig) -> list[str]:
    """Names of the classes of a loaded data set; empty if it has none."""
    metadata = (MetadataCatalog.get(name) for name in dataset_names(dataset))
    return next((list(m.thing_classes) for m in metadata if m.get("thing_classes")), [])
