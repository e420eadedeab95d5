"""What a run needs, checked before it starts."""

import difflib
import math
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..errors import UserError

# The least whole numbers that work.
LEAST = {
    "dataloader.train.total_batch_size": 1,
    "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
    "train.max_iter": 1,
    "train.epochs": 1,
    "train.warmup_steps": 0,
    "train.scale_lr.batch_size": 1,
    "train.accumulation_steps": 1,
    "train.max_skipped_steps": 0,
    "train.log_period": 1,
    "train.eval_period": 0,
    "train.checkpointer.period": 1,
    "train.checkpointer.max_to_keep": 1,
}
MAY_BE_NULL = {
    "train.epochs": ", or null to count iterations",
    "train.warmup_steps": ", or null for lr_multiplier.warmup_length",
    "train.checkpointer.max_to_keep": ", or null to keep all",
}
POSITIVE = ("optimizer.lr", "train.clip_grad.params.max_norm")


def check_options(cfg: DictConfig):
    """Check the values of ``train`` that only fail later, or never.

    Raises:
        UserError: the first one that cannot work.
    """
    options, batch, processes = (
        cfg.train, cfg.dataloader.train.total_batch_size, comm.get_world_size()
    )
    if options.amp.dtype not in ("bfloat16", "float16"):
        raise UserError(f"train.amp.dtype={options.amp.dtype}: choose bfloat16 or float16")
    for key, least in LEAST.items():
        value = OmegaConf.select(cfg, key, default=least)
        if value is None and key in MAY_BE_NULL:
            continue
        if not isinstance(value, int) or value < least:
            or_null = MAY_BE_NULL.get(key, "")
            raise UserError(f"{key}={value}: a whole number, at least {least}{or_null}")
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key, default=1)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{key}={value}: a finite number above 0")
    if not 0 <= options.model_ema.decay < 1:
        raise UserError(f"train.model_ema.decay={options.model_ema.decay}: 0 or more, below 1")
    if batch % processes:
        raise UserError(
            f"dataloader.train.total_batch_size={batch} does not divide over {processes} "
            f"processes: take a multiple of {processes}"
        )
    try:
        os.makedirs(options.output_dir, exist_ok=True)
        writable = os.access(options.output_dir, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"cannot write to {options.output_dir}: set train.output_dir=FOLDER")


def dataset_names(dataset: DictConfig) -> list[str]:
    """Names under which a data set of the config is registered with Detectron2."""
    names = dataset.get("names", dataset.get("json_file", []))
    return [names] if isinstance(names, str) else list(names)


def check_dataset(dataset: DictConfig):
    """Check that a data set's files are there.

    Raises:
        UserError: an unknown name, or a file or folder that is missing.
    """
    for name in dataset_names(dataset):
        metadata = dataset
        if "names" in dataset:
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
                    f"COCO belongs into {root}/coco (annotations/instances_*2017.json, train2017/, "
                    "val2017/), DETECTRON2_DATASETS names another root; "
                    "the demo's data: python tools/prepare_trees.py"
                )


def check_classes(dataset: DictConfig, key: str, num_classes: int):
    """Check the number of classes of a data set that has been loaded.

    Args:
        dataset: the config's.
        key: where the config has the model's number of classes.
        num_classes: that number.

    Raises:
        UserError: the model has another number.
    """
    for name in dataset_names(dataset):
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if classes and len(classes) != num_classes:
            raise UserError(
                f"{key}={num_classes}, but {name} has {len(classes)} classes: "
                f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
            )


def categories(dataset: DictConfig) -> list[dict]:
    """``id`` in the files and ``name`` of the classes of a data set that Detectron2 knows.

    In the model's order; empty where the data set has none, or is not loaded yet.
    """
    for name in dataset_names(dataset):
        metadata = MetadataCatalog.get(name)
        names = metadata.get("thing_classes")
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        if names and ids:
            return [{"id": i, "name": name} for i, name in zip(sorted(ids, key=ids.get), names)]
    return []


def class_names(dataset: DictConfig) -> list[str]:
    """Names of the classes of a data set that has been loaded, empty where it has none."""
    metadata = (MetadataCatalog.get(name) for name in dataset_names(dataset))
    return next((list(m.thing_classes) for m in metadata if m.get("thing_classes")), [])
