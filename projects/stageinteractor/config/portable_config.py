"""The part of a config that inference needs, as text that travels with weights and never runs.

A LazyConfig file is Python and runs, in YAML too. This is JSON: numbers, texts, lists,
dictionaries, and names of the classes that `parts` finds. Nothing is imported to look up a name.
"""

import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import detectron2.data.transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.utils.registry import _convert_target_to_string as name_of
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf._utils import split_key
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from .. import modeling
from ..data import ResizeShortestEdgeBilinear
from ..data.coco_file import is_id
from ..errors import UserError
from ..modeling import ablations, adamixer, backbones  # noqa: F401, `parts` lists what is loaded
from .overrides import apply_override
from .own_data import DATASET

# The modules whose classes a config in a file may name: all of ours, and those of Detectron2 with
# backbones and the detectors that ours are compared with.
OURS = modeling.__name__
MODULES = tuple(f"detectron2.modeling.{name}" for name in (
    "anchor_generator", "backbone.fpn", "backbone.resnet", "meta_arch.rcnn", "meta_arch.retinanet",
    "poolers", "proposal_generator.rpn", "roi_heads.box_head", "roi_heads.fast_rcnn",
    "roi_heads.roi_heads",
))
OTHERS = (  # that configs name besides; other augmentations could take any amount of memory
    adamixer.refine_boxes_by_scale,
    backbones.resnext_dcn_stages,
    ResizeShortestEdgeBilinear,
    T.Resize,
    T.ResizeShortestEdge,
    ResNet.make_default_stages,
    ShapeSpec,
    Box2BoxTransform,
    Matcher,
)
TARGET, NAME = "_target_", "_name_"
PREPROCESSING = {"augmentations", "image_format"}  # of a mapper
REFERENCE = re.compile(r"\$\{[\w.]+\}")  # to another value; anything more could run a resolver
# What a config in a file may ask for: of a stranger's, a few bytes could otherwise take all memory.
MOST = 100_000  # of every number
MOST_OF = {  # of some numbers, and of lists of them; pixels
    "size_divisibility": 1024, "square_pad": 4096,
    "short_edge_length": 16_384, "max_size": 16_384, "shape": 16_384,
}
MOST_VALUES = 2_000  # once its references are followed; configs here have 180
REFERENCE_COST = 20  # values, in time
MOST_CLASSES = 100_000


class NotPortable(ValueError):
    """Says what of a config cannot travel in a file: code, or a value that is out of range."""


@functools.cache
def parts() -> dict[str, Any]:
    """The classes and functions that a config in a file may name, by the name that it has there.

    These are `OTHERS` and every ``nn.Module`` that is defined in `OURS` or `MODULES`: constructors
    of those neither run commands nor open files. What a module merely imports does not count.
    """
    found = [
        part
        for name, module in list(sys.modules.items())
        if name in MODULES or f"{name}.".startswith(f"{OURS}.")
        for part in vars(module).values()
        if inspect.isclass(part) and issubclass(part, nn.Module) and part.__module__ == name
    ]
    return {name_of(part): part for part in (*found, *OTHERS)}


class Portable(NamedTuple):
    """What `portable_config` has written."""

    cfg: DictConfig  # the keys of a config file, as far as inference needs them
    categories: list[dict]  # id and name; no part of the config, where $ has a meaning


def portable_config(cfg: DictConfig, classes: Sequence[dict]) -> str:
    """The model, the test images' preprocessing and the classes of a config, as JSON.

    Args:
        classes: ``id`` and ``name`` of each, in the model's order.

    Returns:
        "" if the preprocessing cannot be written down, as it has classes of somebody else's. A
        model that cannot be written down is null, and ``model_needs`` says which class it needs.
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


def parse_portable(text: str, filename: str, overrides: Sequence[str] = ()) -> Portable:
    """The config and the classes that `portable_config` has written, with overrides.

    Args:
        filename: where the text was found, for messages.

    Raises:
        UserError: the text is empty or something else, has a name that is not one of the `parts`,
            or asks for too much; an override is wrong.
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
            "model_needs": str(content.get("model_needs", "")).replace("$", ""),
        }, flags={"allow_objects": True})
        check_references(cfg)
        categories = [{key: item[key] for key in ("id", "name")} for item in content["categories"]]
        if not is_complete(cfg, categories):
            raise ValueError("something is missing or of another type")
    except NotPortable as error:
        raise UserError(
            f"the config in {filename} asks for {error}, which is not accepted from a file that "
            "may be a stranger's: give --config-file FILE"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
            OmegaConfBaseException) as error:
        raise UserError(
            f"the config in {filename} cannot be read: give --config-file FILE"
        ) from error
    for override in overrides:
        apply_override(cfg, override)
    return Portable(cfg, categories)


def check_references(cfg: DictConfig):
    """Raises NotPortable if following all references of a config gives too many values.

    References can stand for each other, so that a few of them become any number of values. A path
    that leads through another reference is refused, because following a chain of such paths can
    take a time that doubles with each of them.
    """
    waiting, cost = [cfg], 0
    while waiting:
        node = waiting.pop()
        keys = range(len(node)) if isinstance(node, ListConfig) else [*node]
        cost += len(keys)
        for key in keys:
            if (child := node._get_node(key))._is_interpolation():
                check_path(node, child._value())
                cost += REFERENCE_COST
            if cost > MOST_VALUES:
                raise NotPortable(f"more than {MOST_VALUES} values")
            value = node[key]
            if isinstance(value, Container):
                waiting.append(value)


def check_path(node: Container, reference: str):
    """Raises NotPortable if the path of a reference in ``node`` leads through another reference."""
    place, path = node._resolve_key_and_root(reference[len("${"):-len("}")])
    for key in split_key(path)[:-1]:
        place = place._get_node(int(key) if isinstance(place, ListConfig) else key)
        if place._is_interpolation():
            raise NotPortable(f"{reference}, whose path leads through another reference")


def is_complete(cfg: DictConfig, categories: list[dict]) -> bool:
    """Whether a config has around its model, and in its classes, what inference expects there."""
    mapper, ema = cfg.dataloader.test.mapper, cfg.train.model_ema
    return (
        isinstance(mapper.augmentations, ListConfig)
        and mapper.image_format in ("RGB", "BGR")
        and isinstance(ema.enabled, bool)
        and len(categories) <= MOST_CLASSES
        and all(is_id(item["id"]) and isinstance(item["name"], str) for item in categories)
    )


def check_number(value: Any, key: str):
    """Raises NotPortable if a number is out of the range that a config in a file may ask for."""
    most = MOST_OF.get(key, MOST)
    if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) <= most):
        raise NotPortable(f"{key}={value:g} (at most {most})")


def encode(value: Any, key: str = "") -> Any:
    """A part of a config as JSON has it; references to other values stay.

    Args:
        key: of the value, or of the list that it is in.

    Raises:
        NotPortable: an object that is not one of the `parts`, or a number out of range.
    """
    if isinstance(value, Container) and value._is_interpolation():
        return value._value()
    if isinstance(value, DictConfig):
        items = {name: encode(value._get_node(name), str(name)) for name in value}
        if OmegaConf.get_type(value) is ShapeSpec:
            return {**items, TARGET: name_of(ShapeSpec)}
        return items
    if isinstance(value, ListConfig):
        return [encode(value._get_node(index), key) for index in range(len(value))]
    value = getattr(value, "_value", lambda: value)()  # an OmegaConf node's
    check_number(value, key)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [encode(item, key) for item in value]
    for name, part in parts().items():
        if part is value:
            return {NAME: name}
    raise NotPortable(name_of(value) if hasattr(value, "__qualname__") else repr(value))


def decode(value: Any, key: str = "") -> Any:
    """What `encode` has written, with classes in the place of their names.

    Raises:
        NotPortable: a name that is not one of the `parts`, a text that omegaconf could evaluate,
            or a number out of range.
    """
    check_number(value, key)
    if isinstance(value, list):
        return [decode(item, key) for item in value]
    if isinstance(value, str) and "$" in value and not REFERENCE.fullmatch(value):
        raise NotPortable(value)
    if not isinstance(value, dict):
        return value
    if NAME in value:
        return known(value[NAME])
    items = {name: decode(item, name) for name, item in value.items() if name != TARGET}
    if TARGET not in value:
        return items
    target = value[TARGET]
    target = known(target[NAME] if isinstance(target, dict) else target)
    return ShapeSpec(**items) if target is ShapeSpec else {TARGET: target, **items}


def known(name: Any) -> Any:
    """The class or function of a name. Raises NotPortable if it is not one of the `parts`."""
    if not isinstance(name, str) or name not in parts():
        raise NotPortable(str(name))
    return parts()[name]
