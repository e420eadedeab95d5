"""What of a config inference needs, as text that travels with weights and that nothing executes.

A LazyConfig file is Python and runs, in YAML too. This is JSON: numbers, texts, lists,
dictionaries, and names that stand for the classes of `KNOWN`. None is looked up elsewhere.
"""

import json
import re
from typing import Any, Sequence

import detectron2.data.transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    FPN,
    FastRCNNOutputLayers,
    GeneralizedRCNN,
    ResNet,
    RetinaNet,
    StandardROIHeads,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.utils.registry import _convert_target_to_string as name_of
from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from .. import modeling
from ..data import ResizeShortestEdgeBilinear
from ..data.coco_file import is_id
from ..errors import UserError
from ..modeling import ablations, adamixer, backbones
from .config import apply_override
from .dataset import DATASET

PARTS = (
    # ours
    *(getattr(modeling, name) for name in modeling.__all__),
    *(getattr(backbones, name) for name in backbones.__all__),
    adamixer.AdaMixerAttention,
    adamixer.AdaMixerSamplingPoints,
    adamixer.AdaptiveMixing,
    adamixer.VanillaSamplingPoints,
    adamixer.refine_boxes_by_scale,
    ablations.ChannelStaticCascade,
    ablations.DynamicOnlyMixing,
    ablations.GroupInitialisedSamplingPoints,
    ablations.SpatialStaticCascade,
    ablations.StageInteractorWithNMS,
    ablations.StaticOnlyMixing,
    ResizeShortestEdgeBilinear,
    # Detectron2's: preprocessing, backbones, and the detectors that ours are compared with
    T.Resize,
    T.ResizeShortestEdge,
    ShapeSpec,
    BasicStem,
    ResNet,
    ResNet.make_default_stages,
    FPN,
    LastLevelMaxPool,
    LastLevelP6P7,
    DefaultAnchorGenerator,
    Box2BoxTransform,
    Matcher,
    RetinaNet,
    RetinaNetHead,
    GeneralizedRCNN,
    RPN,
    StandardRPNHead,
    StandardROIHeads,
    ROIPooler,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
)
# The classes and functions that a config in a file may name.
KNOWN = {name_of(part): part for part in PARTS}
TARGET, NAME = "_target_", "_name_"
PREPROCESSING = {"augmentations", "image_format"}  # of a mapper
REFERENCE = re.compile(r"\$\{[\w.]+\}")  # to another value; anything more could run a resolver


class NotPortable(ValueError):
    """Something in a config that is no data and not in `KNOWN`."""


def portable_config(cfg: DictConfig, classes: Sequence[dict]) -> str:
    """The model, the test images' preprocessing and the classes of a config, as JSON.

    Args:
        classes: ``id`` and ``name`` of each, in the model's order.

    Returns:
        nothing if the preprocessing cannot be written down, such as a class of somebody else's. A
        model that cannot be is null, and ``model_needs`` says what it needs.
    """
    mapper = cfg.dataloader.test.mapper
    if not PREPROCESSING <= set(mapper):  # not Detectron2's
        return ""
    try:
        content = {
            "model": None,
            "preprocessing": {key: encode(mapper[key]) for key in sorted(PREPROCESSING)},
            "model_ema": encode(cfg.train.model_ema),
            "categories": list(classes),
        }
        try:
            content["model"] = encode(cfg.model)
        except NotPortable as error:
            content["model_needs"] = str(error)
        return json.dumps(content)
    except NotPortable:
        return ""


def parse_portable(text: str, filename: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `portable_config` has written, with overrides.

    Its keys are those of a config file, as far as inference needs them, and ``categories``.

    Args:
        filename: where the text was found, for messages.

    Raises:
        UserError: the text is empty or something else, or names what is not looked up; an override
            is wrong.
    """
    if not text:
        raise UserError(f"{filename} has no config of its own: give --config-file FILE")
    try:
        content = json.loads(text)
        cfg = OmegaConf.create({
            "model": decode(content["model"]),
            "dataloader": {"test": {"mapper": decode(content["preprocessing"])}},
            "train": {"device": "auto", "model_ema": decode(content["model_ema"])},
            "dataset": DATASET,
            "categories": decode(content["categories"]),
            "model_needs": str(content.get("model_needs", "")).replace("$", ""),
        }, flags={"allow_objects": True})
        is_whole = has_all_parts(cfg)
    except NotPortable as error:
        raise UserError(
            f"the config in {filename} asks for {error}, which is not looked up in a file that "
            "may be a stranger's: give --config-file"
        ) from error
    except Exception as error:  # JSON and omegaconf raise all sorts
        raise UserError(f"the config in {filename} cannot be read: give --config-file") from error
    if not is_whole:
        raise UserError(f"the config in {filename} cannot be read: give --config-file")
    for override in overrides:
        apply_override(cfg, override)
    return cfg


def has_all_parts(cfg: DictConfig) -> bool:
    """Whether what surrounds the model in a config is what inference expects there."""
    mapper, ema, classes = cfg.dataloader.test.mapper, cfg.train.model_ema, cfg.categories
    return (
        isinstance(mapper.augmentations, ListConfig)
        and mapper.image_format in ("RGB", "BGR")
        and isinstance(ema.enabled, bool)
        and isinstance(classes, ListConfig)
        and all(is_id(c.id) and isinstance(c.name, str) for c in classes)
    )


def encode(value: Any) -> Any:
    """A part of a config as JSON has it; references to other values stay.

    Raises:
        NotPortable: an object that is none of those in a config.
    """
    if isinstance(value, Container) and value._is_interpolation():
        return value._value()
    if isinstance(value, DictConfig):
        items = {key: encode(value._get_node(key)) for key in value}
        if OmegaConf.get_type(value) is ShapeSpec:
            return {**items, TARGET: name_of(ShapeSpec)}
        return items
    if isinstance(value, ListConfig):
        return [encode(value._get_node(index)) for index in range(len(value))]
    value = getattr(value, "_value", lambda: value)()  # an OmegaConf node's
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    for name, part in KNOWN.items():
        if part is value:
            return {NAME: name}
    raise NotPortable(name_of(value) if hasattr(value, "__qualname__") else repr(value))


def decode(value: Any) -> Any:
    """What `encode` has written, with classes in the place of their names.

    Raises:
        NotPortable: a name that is not in `KNOWN`, or a text that omegaconf could evaluate.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, str) and "$" in value and not REFERENCE.fullmatch(value):
        raise NotPortable(value)
    if not isinstance(value, dict):
        return value
    if NAME in value:
        return known(value[NAME])
    items = {key: decode(item) for key, item in value.items() if key != TARGET}
    if TARGET not in value:
        return items
    target = value[TARGET]
    target = known(target[NAME] if isinstance(target, dict) else target)
    return ShapeSpec(**items) if target is ShapeSpec else {TARGET: target, **items}


def known(name: Any) -> Any:
    """The class or function of a name. Raises NotPortable if it is not in `KNOWN`."""
    if not isinstance(name, str) or name not in KNOWN:
        raise NotPortable(str(name))
    return KNOWN[name]
