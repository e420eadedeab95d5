"""Open a model: the one way from a file to a model, its config and its classes."""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import detectron2.data.transforms as T
import torch
from detectron2.config import instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNetFeatures
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from ..checkpoint import ModelFile, SafeCheckpointer
from ..checkpoint.model_file import other_classes
from ..checkpoint.weight_files import COPIES
from ..config.building import build_model, dataset_categories, explain_misfits
from ..config.device import select_device
from ..config.overrides import current_value, given_keys, load_config
from ..config.own_data import NUM_CLASSES, num_classes_key
from ..config.portable_config import MOST_CLASSES, parse_portable
from ..config.preflight import categories, class_names
from ..errors import UserError
from ..modeling import StageInteractor
from .detector import Detector
from .export.exported_model import SUFFIXES, ExportedModel, load_exported
from .tiles import OVERLAP

MOST_MODULES = 20_000  # of the model of a config in a file; those here have 650


class OpenedModel(NamedTuple):
    """A model for inference, and what is needed to use it."""

    model: nn.Module | ExportedModel  # in evaluation mode and on its device
    cfg: DictConfig  # at least the model and the test images' preprocessing
    categories: list[dict]  # ``id`` and ``name`` of each class, in the model's order


def load_detector(
    file: str | Path,
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    trusted: bool = False,
    tile: int | None = None,
    overlap: float = OVERLAP,
) -> Detector:
    """A checkpoint or an exported file, ready to detect. No data set is needed.

    Args:
        file: a checkpoint (.pth, .safetensors, .pkl), or what ``tools/export.py`` has written
            (.onnx, .xml, .pt2).
        config_file: of the model; without it, the checkpoint's own config is used.
        overrides: ``key=value`` as on the command line, for checkpoints.
        trusted: a .pt2 file is your own. Loading one can run code that somebody has hidden in it;
            all other files are read as data.
        tile, overlap: how large photographs are cut, see `Detector`.

    Raises:
        UserError: a file is missing; the checkpoint does not fit, has no config of its own or has
            numbers that are not finite; an override, ``tile`` or ``overlap`` is wrong.
    """
    opened = open_model(file, config_file, overrides, trusted=trusted)
    return make_detector(opened, tile, overlap)


def open_model(
    file: str | Path | None,
    config: str | Path | DictConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    trusted: bool = False,
) -> OpenedModel:
    """Open a model for inference. A checkpoint is read once.

    Args:
        file: see `load_detector`; None gives random weights.
        config: a config file; a config whose test set has been loaded, which then has the classes;
            or None for the checkpoint's own config. An exported file takes the second alone, and
            keeps its own model.
        overrides: ``key=value`` for a config that is not loaded yet.
        trusted: see `load_detector`.

    Raises:
        UserError: a file is missing; the checkpoint does not fit the config or the data, has no
            config of its own or has numbers that are not finite; an override is wrong.
    """
    if str(file).endswith(SUFFIXES):
        is_loaded = isinstance(config, DictConfig)
        if overrides or (config and not is_loaded):
            raise UserError(
                f"{file} is an exported file, which has its own config: give the checkpoint"
            )
        with explain_misfits(f"{file}, of another version perhaps", "Export it anew"):
            opened = OpenedModel(*load_exported(str(file), trusted=trusted))
            build_augmentations(opened.cfg)
        if is_loaded and (different := other_use(opened, cast(DictConfig, config))):
            raise UserError(f"{file} {different}")
        return opened
    weights = ModelFile.read(str(file)) if file else None
    if isinstance(config, DictConfig):
        model, test_set = build_model(config), config.dataloader.test.dataset
        if weights:
            model = fill(model, weights, config.train.model_ema, class_names(test_set))
        return OpenedModel(fold_norms(model.eval()), config, categories(test_set))
    with explain_config(file, config, overrides):
        cfg, classes = resolve_config(weights, config, overrides)
        build_augmentations(cfg)
        model = build_model(cfg)
    if weights:
        model = fill(model, weights, cfg.train.model_ema)
    return OpenedModel(fold_norms(model.eval()), cfg, classes)


def other_use(opened: OpenedModel, cfg: DictConfig) -> str:
    """What keeps an exported file from being evaluated as a config says; "" if nothing does."""
    names = [item["name"] for item in opened.categories]
    if different := other_classes(names, class_names(cfg.dataloader.test.dataset)):
        return different
    key = "dataloader.test.mapper.image_format"
    theirs, ours = (OmegaConf.select(each, key) for each in (opened.cfg, cfg))
    if theirs != ours:
        return f"takes {theirs} images, and {key} is {ours}"
    key = "model.decoder.num_stages"
    theirs, ours = (OmegaConf.select(each, key) for each in (opened.cfg, cfg))
    if ours not in (None, theirs):
        return f"was exported with another number of stages: export it with {key}={ours}"
    key = "model.detections_per_image"
    least, most = (
        current_value(each, key, is_new=False) if isinstance(each.model, DictConfig) else None
        for each in (opened.cfg, cfg)
    )
    if least and most and least < most:
        return f"keeps {least} detections of an image, and here {most} count: export it with "\
            f"{key}={most}"
    return ""


def explain_config(
    file: str | Path | None, config_file: str | Path | None, overrides: Sequence[str]
) -> AbstractContextManager[None]:
    """`explain_misfits` for what a model is built from."""
    if config_file:
        return explain_misfits("model")
    if given_keys(overrides) - {"train.device"}:
        return explain_misfits(f"the config in {file} with these overrides")
    what = f"the config in {file}, of another version perhaps"
    return explain_misfits(what, "Give --config-file FILE")


def make_detector(
    opened: OpenedModel, tile: int | None = None, overlap: float = OVERLAP
) -> Detector:
    """A detector with the preprocessing of the config's test images."""
    model: Any = opened.model
    # Detectron2's own models leave it to their backbone.
    padded = model if hasattr(model, "size_divisibility") else model.backbone
    return Detector(
        model, build_augmentations(opened.cfg), opened.cfg.dataloader.test.mapper.image_format,
        opened.categories, padded.size_divisibility, tile, overlap,
    )


def build_augmentations(cfg: DictConfig) -> list[T.Augmentation]:
    """The augmentations of the test images. Raises UserError if the mapper cannot be used."""
    mapper = cfg.dataloader.test.mapper
    augmentations = [instantiate(augmentation) for augmentation in mapper.augmentations]
    if not all(isinstance(augmentation, T.Augmentation) for augmentation in augmentations):
        raise UserError("dataloader.test.mapper.augmentations are not all Detectron2's")
    if mapper.image_format not in ("RGB", "BGR"):
        raise UserError(f"dataloader.test.mapper.image_format={mapper.image_format}: RGB or BGR")
    return augmentations


def resolve_config(
    file: ModelFile | None, config_file: str | Path | None, overrides: Sequence[str]
) -> tuple[DictConfig, list[dict]]:
    """The config of a file, or else a checkpoint's own, and ``id`` and ``name`` of the classes.

    The names of the classes, and their number unless an override gives it, are those that the
    checkpoint has, else those of the config's test set.

    Raises:
        UserError: the config is missing, or the config or an override is invalid.
    """
    if config_file:
        cfg = load_config(str(config_file), list(overrides))
        classes = dataset_categories(cfg)
        if file:
            classes = file.categories(classes)
            with contextlib.suppress(UserError):  # its own config, if it has one, has its ids
                own = parse_portable(file.config, file.path).categories
                if [item["name"] for item in own] == file.class_names:
                    classes = own
    elif file:
        cfg, own = parse_portable(file.config, file.path, overrides)
        if not isinstance(cfg.model, DictConfig):
            needs = f": it needs {cfg.model_needs[:200]}" if cfg.model_needs else ""
            raise UserError(
                f"the config in {file.path} has no model{needs}\n"
                "Classes of your own are not looked up in a file that may be a stranger's: give "
                "--config-file FILE, the config of the training"
            )
        classes = file.categories(own)
    else:
        raise UserError("no model to open: give --checkpoint FILE, --config-file FILE or both")
    key = num_classes_key(cfg)
    if classes and not given_keys(overrides) & set(NUM_CLASSES):
        OmegaConf.update(cfg, key, len(classes))
    num_classes = OmegaConf.select(cfg, key)
    if not isinstance(num_classes, int) or not 0 < num_classes <= MOST_CLASSES:
        raise UserError(f"{key}={num_classes}: a number from 1 to {MOST_CLASSES}")
    if len(classes) != num_classes:
        classes = [{"id": i + 1, "name": str(i)} for i in range(num_classes)]
    if file and not config_file:
        compare_outlines(cfg, file)
    cfg.train.device = select_device(cfg.train.device)
    return cfg, classes


class Outlines(TorchFunctionMode):
    """Makes tensors without memory, but for a few numbers that backbones read as they are built."""

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            kwargs["device"] = "cpu"
        with torch.device("meta"):
            return function(*args, **kwargs)


def compare_outlines(cfg: DictConfig, file: ModelFile) -> None:
    """Compare the model of a checkpoint's own config with its weights, before it takes memory.

    Raises:
        UserError: names or shapes differ, or the model is much larger than the file.
    """
    count = itertools.count(1)

    def limit(*_: Any) -> None:
        if next(count) > MOST_MODULES:
            raise UserError(
                f"the config in {file.path} asks for more than {MOST_MODULES} modules: give "
                "--config-file FILE"
            )

    hook = register_module_module_registration_hook(limit)
    try:
        with Outlines():
            model = instantiate(cfg.model)
            fill(model, file.without_numbers(), cfg.train.model_ema)
    finally:
        hook.remove()
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > COPIES * os.path.getsize(file.local):  # a few numbers that are repeated
        raise UserError(
            f"the model of the config in {file.path} takes {size / 1e6:.0f} MB, many times the "
            "file: give --config-file FILE"
        )


def fill(
    model: nn.Module, file: ModelFile, ema: DictConfig, names: Sequence[str] = ()
) -> nn.Module:
    """A model with the weights of a checkpoint, the moving average where that is switched on.

    Args:
        model: changed in place. All of its weights have to be in the checkpoint.
        file: the checkpoint.
        ema: ``train.model_ema`` of the config.
        names: of the data's classes; those of the checkpoint, if it has any, have to be the same.

    Raises:
        UserError: the checkpoint does not fit, has no moving average, or has numbers that are not
            finite.
    """
    rest = SafeCheckpointer(model, strict=True).load(file, checkpointables=[])
    if different := other_classes(rest.get("class_names", []), names):
        raise UserError(f"{file.path} {different}")
    if ema.enabled:
        if "model_ema" not in rest:
            raise UserError(f"{file.path} has no moving average: train.model_ema.enabled=false")
        average = AveragedModel(model)
        try:
            known = average.state_dict().keys()  # the model may have fewer stages
            average.load_state_dict({k: v for k, v in rest["model_ema"].items() if k in known})
        except (AttributeError, RuntimeError, TypeError) as error:
            raise UserError(f"{file.path}: its moving average does not fit the config") from error
        model = average.module
    values = [value for value in model.state_dict().values() if not value.is_meta]
    if not all(value.isfinite().all() for value in values):
        raise UserError(f"{file.path} has weights that are not finite: its run has diverged")
    return model


def fold_norms(model: nn.Module) -> nn.Module:
    """Make a model faster for inference alone, and return it; results differ by rounding.

    Batch norms that Detectron2's convolutions apply, and those that follow a convolution of timm's
    EfficientNets, become part of its weights, which a processor reads best with channels last.
    """
    for module in model.modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, Conv2d) and isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)):
            fold(module, norm)
            module.norm = None
        if isinstance(module, EfficientNetFeatures):
            for block in module.modules():
                for (_, conv), (name, norm) in itertools.pairwise([*block.named_children()]):
                    if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                        fold(conv, norm)
                        setattr(block, name, norm.act)
    return model


def fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Make a batch norm part of the weights of a convolution."""
    known: Any = norm
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, known.running_mean, known.running_var, known.eps, known.weight,
        known.bias,
    )
    conv.to(memory_format=torch.channels_last)


def require_stages(model: nn.Module | ExportedModel | DictConfig) -> None:
    """Raises UserError if a model, or that of a config, has no decoder stages to look into."""
    kind: Any = type(model)
    if isinstance(model, DictConfig):
        target = model.model._target_
        kind = locate(target) if isinstance(target, str) else target
    if not issubclass(kind, StageInteractor):
        raise UserError(
            f"{kind.__name__} has no decoder stages: give a checkpoint of a StageInteractor "
            "or an AdaMixer"
        )
