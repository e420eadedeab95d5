"""What of a config inference needs, as text that travels with weights and that nothing executes.

A LazyConfig file is Python and runs, in YAML too. This is JSON: numbers, texts, lists, dictionaries
and names of classes, and only classes that a model or its preprocessing is made of are looked up.
"""

import contextlib
import dataclasses
import inspect
import json
from pydoc import locate
from typing import Any, Sequence

from detectron2.utils.registry import _convert_target_to_string as name_of
from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from ..errors import UserError
from .config import apply_override
from .dataset import DATASET

# Where the classes and functions that a config may name are defined.
MODULES = (
    "projects.stageinteractor.data.resize",
    "projects.stageinteractor.modeling",
    "detectron2.data.transforms",
    "detectron2.layers",
    *(
        f"detectron2.modeling.{part}"
        for part in (
            "anchor_generator", "backbone", "box_regression", "matcher", "meta_arch", "poolers",
            "proposal_generator", "roi_heads",
        )
    ),
    "torch.nn.modules",
)
PACKAGES = ("projects.stageinteractor.", "detectron2.", "torch.nn.")  # theirs may be imported
TARGET, NAME, DATACLASS = "_target_", "_name_", "_dataclass_"


class NotPortable(ValueError):
    """Something in a config that is no data and no class of `MODULES`."""


def portable_config(cfg: DictConfig, classes: Sequence[dict]) -> str:
    """The model, the test images' preprocessing and the classes of a config, as JSON.

    Args:
        classes: ``id`` and ``name`` of each, in the model's order.

    Returns:
        nothing if the preprocessing cannot be written down, such as a class of somebody else's. A
        model that cannot be is null.
    """
    mapper = cfg.dataloader.test.mapper
    if "augmentations" not in mapper:  # not Detectron2's
        return ""
    try:
        content = {
            "model": None,
            "preprocessing": {k: encode(mapper[k]) for k in ("augmentations", "image_format")},
            "model_ema": encode(cfg.train.model_ema),
            "categories": list(classes),
        }
        with contextlib.suppress(NotPortable):
            content["model"] = encode(cfg.model)
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
        }, flags={"allow_objects": True})
    except NotPortable as error:
        raise UserError(
            f"the config in {filename} asks for {error}, which is not looked up in a file that "
            "may be a stranger's: give --config-file"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the config in {filename} cannot be read: give --config-file") from error
    for override in overrides:
        apply_override(cfg, override)
    return cfg


def encode(value: Any) -> Any:
    """A part of a config as JSON has it; interpolations stay.

    Raises:
        NotPortable: an object that is none of those in a config.
    """
    if isinstance(value, Container) and value._is_interpolation():
        return value._value()
    if isinstance(value, DictConfig):
        kind = OmegaConf.get_type(value)
        items = {key: encode(value._get_node(key)) for key in value}
        return {DATACLASS: name_of(kind), **items} if dataclasses.is_dataclass(kind) else items
    if isinstance(value, ListConfig):
        return [encode(value._get_node(index)) for index in range(len(value))]
    value = getattr(value, "_value", lambda: value)()  # an OmegaConf node's
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {DATACLASS: name_of(type(value)), **encode(vars(value))}
    if callable(value):
        known_object(name_of(value))
        return {NAME: name_of(value)}
    raise NotPortable(type(value).__name__)


def decode(value: Any) -> Any:
    """What `encode` has written.

    Raises:
        NotPortable: a name of something else than `known_object` knows.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, str) and "${" in value and ":" in value:
        raise NotPortable(value)  # a resolver, which could read this machine's environment
    if not isinstance(value, dict):
        return value
    if NAME in value:
        return known_object(value[NAME])
    if DATACLASS in value:
        kind = known_object(value[DATACLASS])
        return kind(**{key: decode(item) for key, item in value.items() if key != DATACLASS})
    if TARGET in value:
        target = value[TARGET]
        known_object(target[NAME] if isinstance(target, dict) else target)
    return {key: decode(item) for key, item in value.items()}


def known_object(name: str) -> Any:
    """The class or function of a full dotted name.

    Raises:
        NotPortable: it is not defined in `MODULES`.
    """
    if isinstance(name, str) and name.startswith(PACKAGES):
        found = locate(name)
        # A name may lead through a module to what this imports from elsewhere.
        if (inspect.isclass(found) or inspect.isfunction(found)) and is_known(found.__module__):
            return found
    raise NotPortable(str(name))


def is_known(module: str) -> bool:
    """Whether a module is one of `MODULES` or below one of them."""
    return any(f"{module}.".startswith(f"{known}.") for known in MODULES)
