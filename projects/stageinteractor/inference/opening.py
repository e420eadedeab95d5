"""A detector of a checkpoint or of an exported file, which carry what is needed to use them."""

import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ContextManager

import detectron2.data.transforms as T
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from ..checkpoint import about_checkpoint
from ..checkpoint.weight_files import COPIES
from ..config.device import select_device
from ..config.overrides import given_keys, load_config
from ..config.own_data import NUM_CLASSES, num_classes_key
from ..config.portable_config import MOST_CLASSES, parse_portable
from ..config.preflight import categories
from ..data.coco_file import id_order, read_tables
from ..errors import UserError
from .detector import Detector
from .evaluation_setup import check_checkpoint, explain_misfits
from .export.exported_model import SUFFIXES, ExportedModel, load_exported
from .trained import fold_norms, load_trained

MOST_MODULES = 20_000  # of the model of a config in a file; those here have 650


def load_detector(
    file: str | Path,
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    trusted: bool = False,
) -> Detector:
    """A checkpoint or an exported file, ready to detect. No data set is needed.

    Args:
        file: a checkpoint (.pth, .safetensors, .pkl), or what ``tools/export.py`` has written
            (.onnx, .pt2).
        config_file: of the model; without, the checkpoint's own config is taken.
        overrides: ``key=value`` as on the command line, for checkpoints.
        trusted: a .pt2 file is your own. Loading one can run code that somebody has hidden in it;
            all other files are read as data.

    Raises:
        UserError: a file is missing; the checkpoint does not fit, has no config of its own or has
            numbers that are not finite; an override is wrong.
    """
    file, config_file = str(file), config_file and str(config_file)
    check_checkpoint(file)
    if file.endswith(SUFFIXES):
        if config_file or overrides:
            raise UserError(f"{file} is exported, with its config: export anew to change that")
        with explain_misfits(f"{file}, of another version perhaps", "Export it anew"):
            return make_detector(*load_exported(file, trusted=trusted))
    with explain_config(file, config_file, overrides):
        cfg, classes = settle_config(file, config_file, overrides)
        return make_detector(load_model(cfg, file), cfg, classes)


def explain_config(
    checkpoint: str | None, config_file: str | None, overrides: Sequence[str]
) -> ContextManager:
    """Explain what a config makes fail, see `settle_config` and `explain_misfits`."""
    if config_file:
        return explain_misfits("model")
    if overrides:
        return explain_misfits(f"the config in {checkpoint} with these overrides")
    what = f"the config in {checkpoint}, of another version perhaps"
    return explain_misfits(what, "Give --config-file FILE")


def make_detector(
    model: nn.Module | ExportedModel, cfg: DictConfig, classes: list[dict]
) -> Detector:
    """A detector with the preprocessing of a config; ``classes`` have ``id`` and ``name``."""
    mapper = cfg.dataloader.test.mapper
    augmentations = [instantiate(augmentation) for augmentation in mapper.augmentations]
    if not all(isinstance(augmentation, T.Augmentation) for augmentation in augmentations):
        raise UserError("dataloader.test.mapper.augmentations are not all Detectron2's")
    if mapper.image_format not in ("RGB", "BGR"):
        raise UserError(f"dataloader.test.mapper.image_format={mapper.image_format}: RGB or BGR")
    if hasattr(model, "size_divisibility"):
        divisibility = model.size_divisibility
    else:  # Detectron2's own models leave it to their backbone
        divisibility = model.backbone.size_divisibility
    if isinstance(model, nn.Module):
        model.eval()
    return Detector(model, augmentations, mapper.image_format, classes, divisibility)


def settle_config(
    checkpoint: str | None, config_file: str | None, overrides: Sequence[str]
) -> tuple[DictConfig, list[dict]]:
    """The config of a file, or else a checkpoint's own, and ``id`` and ``name`` of the classes.

    The names of the classes, and their number unless an override gives it, are those that the
    checkpoint has, else those of the config's test set.

    Raises:
        UserError: there is no config, or it or an override is wrong.
    """
    about = about_checkpoint(checkpoint or "")
    if config_file:
        cfg = load_config(config_file, list(overrides))
        classes = known_categories(test_categories(cfg), about.class_names)
        with contextlib.suppress(UserError):  # which has ids of its own, if it can be read
            own = parse_portable(about.config, checkpoint).categories
            if [item["name"] for item in own] == about.class_names:
                classes = own
    else:
        cfg, own = parse_portable(about.config, checkpoint, overrides)
        if not isinstance(cfg.model, DictConfig):
            needs = f": it needs {cfg.model_needs[:200]}" if cfg.model_needs else ""
            raise UserError(
                f"the config in {checkpoint} has no model{needs}\n"
                "Classes of your own are not looked up in a file that may be a stranger's: give "
                "--config-file FILE, the config of the training"
            )
        classes = known_categories(own, about.class_names)
    key = num_classes_key(cfg)
    if classes and not given_keys(overrides) & set(NUM_CLASSES):
        OmegaConf.update(cfg, key, len(classes))
    num_classes = OmegaConf.select(cfg, key)
    if not isinstance(num_classes, int) or not 0 < num_classes <= MOST_CLASSES:
        raise UserError(f"{key}={num_classes}: a number from 1 to {MOST_CLASSES}")
    if len(classes) != num_classes:
        classes = [{"id": i + 1, "name": str(i)} for i in range(num_classes)]
    if not config_file:
        compare_outlines(cfg, checkpoint)
    cfg.train.device = select_device(cfg.train.device)
    return cfg, classes


class Outlines(TorchFunctionMode):
    """Makes tensors without memory, but for a few numbers that backbones read as they are built."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            kwargs["device"] = "cpu"
        with torch.device("meta"):
            return function(*args, **kwargs)


def compare_outlines(cfg: DictConfig, checkpoint: str):
    """Compare the model of a config with a checkpoint before either of them takes memory.

    Raises:
        UserError: names or shapes differ, or the model is much larger than the file.
    """
    count = itertools.count(1)

    def limit(*_):
        if next(count) > MOST_MODULES:
            raise UserError(
                f"the config in {checkpoint} asks for more than {MOST_MODULES} modules: give "
                "--config-file FILE"
            )

    hook = register_module_module_registration_hook(limit)
    try:
        with Outlines():
            model = instantiate(cfg.model)
            load_trained(model, checkpoint, cfg.train.model_ema, [])
    finally:
        hook.remove()
    size = sum(value.nbytes for value in model.state_dict().values())
    if os.path.isfile(checkpoint) and size > COPIES * os.path.getsize(checkpoint):
        raise UserError(  # a few numbers that are repeated
            f"the model of the config in {checkpoint} takes {size / 1e6:.0f} MB, many times the "
            "file: give --config-file FILE"
        )


def load_model(cfg: DictConfig, checkpoint: str) -> nn.Module:
    """The model of a config with the weights of a checkpoint, for inference, on its device.

    Raises:
        UserError: the checkpoint does not fit, or has numbers that are not finite.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    model = load_trained(model, checkpoint, cfg.train.model_ema, [])
    if not all(values.isfinite().all() for values in model.state_dict().values()):
        raise UserError(f"{checkpoint} has weights that are not finite: its run has diverged")
    return fold_norms(model.eval())


def random_model(cfg: DictConfig) -> nn.Module:
    """The model of a config as it is before training, for inference."""
    return fold_norms(instantiate(cfg.model).to(cfg.train.device).eval())


def known_categories(found: list[dict], class_names: Sequence[str]) -> list[dict]:
    """``id`` and ``name`` of the classes, in the model's order; empty if nothing is known.

    Args:
        found: of a config, whose ids are taken if its classes are the checkpoint's.
        class_names: of the checkpoint, empty if it has none.
    """
    if class_names and [category["name"] for category in found] != list(class_names):
        return [{"id": i + 1, "name": name} for i, name in enumerate(class_names)]
    return found


def test_categories(cfg: DictConfig) -> list[dict]:
    """``id`` and ``name`` of the classes of the test set, as far as they are known without it."""
    dataset = cfg.dataloader.test.dataset
    if cfg.dataset.val or "json_file" in dataset:
        found = read_tables(cfg.dataset.val or dataset.json_file).categories
        found = sorted(found, key=lambda category: id_order(category["id"]))
        return [{key: category[key] for key in ("id", "name")} for category in found]
    return categories(dataset)
