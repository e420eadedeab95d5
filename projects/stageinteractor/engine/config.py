"""Load a LazyConfig file with command-line overrides, and say clearly what is wrong with them."""

import difflib
import inspect
import os
import re
import shlex
from pydoc import ErrorDuringImport
from typing import Any, Callable, List, Sequence, Set

import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..errors import UserError
from .dataset import DATASET


def load_config(config_file: str, overrides: List[str]) -> DictConfig:
    """The config of a LazyConfig file with ``key=value`` overrides applied.

    A key must be in the config or be an argument of the class it configures; ``+key=value`` adds
    any other. Every config has the keys of ``dataset``. A class or function is given by its full
    dotted name. A LazyConfig file is Python and runs.

    Raises:
        UserError: no such file, or none that can be read; an override that does not parse, an
            unknown key or a wrong type.
    """
    if not config_file:
        raise UserError("no config: pass --config-file FILE (projects/stageinteractor/configs/)")
    if not os.path.isfile(config_file):
        raise UserError(f"no config file {config_file}")
    if not config_file.endswith((".py", ".yaml", ".yml")):
        raise UserError(f"{config_file} is no config, which ends in .py or .yaml: a checkpoint?")
    try:
        cfg = LazyConfig.load(config_file)
    except SyntaxError as error:
        found = error.__cause__ or error  # Detectron2's own names the file, but no line
        raise UserError(f"{error} Line {found.lineno}: {found.msg}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{config_file}: {' '.join(str(error).split())}") from error
    cfg.dataset = OmegaConf.merge(DATASET, cfg.get("dataset") or {})
    for text in overrides:
        apply_override(cfg, text)
    return cfg


def given_keys(overrides: Sequence[str]) -> Set[str]:
    """The keys that overrides set."""
    return {text.partition("=")[0].lstrip("+") for text in overrides}


def apply_override(cfg: DictConfig, text: str):
    """Check one ``key=value`` against the config and apply it.

    Raises:
        UserError: what is wrong with it.
    """
    if text.startswith("-"):
        raise UserError(f"cannot read the override '{text}': options come before key=value")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read the override '{text}': {reason}") from error
    if override.is_delete():
        raise UserError(f"cannot read the override '{text}': deleting is not supported")
    if override.is_sweep_override():
        raise UserError(f"cannot read the override '{text}': quote a value that has commas")
    key, value = override.key_or_group, override.value()
    current = None if override.is_add() else current_value(cfg, key)
    if not is_compatible(current, value):
        example = f"{current.__module__}.{current.__name__}" if callable(current) else current
        raise UserError(
            f"{key}={value}: expected {type_name(current)}, as in {key}={example}, "
            f"got {type_name(value)}"
        )
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except KeyError as error:  # +key=value below something that is no dictionary
        raise UserError(error.args[0]) from error
    if callable(current) and value is not None:
        OmegaConf.update(cfg, key, named_object(key, value))


def path_override(key: str, path: Any) -> str:
    """An override that sets ``key`` to a path, as a shell takes it."""
    text = str(path)
    if not re.fullmatch(r"[\w./-]+", text, re.ASCII):  # Hydra's grammar
        text = "'" + text.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={text}")


def named_object(key: str, name: str) -> Callable:
    """The class or function of a full dotted name, the value of ``key``.

    Raises:
        UserError: there is none.
    """
    try:
        found = locate(name)
    except (ImportError, ValueError, ErrorDuringImport):
        found = None
    if not callable(found):
        raise UserError(f"{key}={name}: no class or function of that name, give it in full")
    return found


def current_value(cfg: DictConfig, key: str) -> Any:
    """The value that ``key`` has without an override.

    Raises:
        UserError: the key is neither in the config nor an argument of the class it configures.
    """
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    if isinstance(parent, ListConfig) and name.isdigit() and int(name) < len(parent):
        return parent[int(name)]
    if isinstance(parent, DictConfig):
        if name in parent:
            return parent[name]
        arguments = constructor_arguments(parent)
        if name in arguments:
            default = arguments[name].default
            return None if default is inspect.Parameter.empty else default
    close = difflib.get_close_matches(key, known_keys(cfg), n=1)
    hint = f"did you mean {close[0]}?" if close else "+key=value adds a new one"
    raise UserError(f"unknown config key {key}: {hint}")


def constructor_arguments(node: DictConfig) -> dict:
    """Named arguments of the class or function that a LazyCall node configures."""
    target = node.get("_target_")
    if target is None:
        return {}
    target = locate(target) if isinstance(target, str) else target
    return dict(inspect.signature(target).parameters)


def known_keys(node: DictConfig, prefix: str = "") -> List[str]:
    """Dotted names of everything in a config."""
    keys = []
    for name in node:
        keys.append(f"{prefix}{name}")
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            keys += known_keys(child, f"{prefix}{name}.")
            keys += [f"{prefix}{name}.{argument}" for argument in constructor_arguments(child)]
    return keys


def is_compatible(current: Any, value: Any) -> bool:
    """Whether a value may replace another: same kind, an integer for a float, null for anything."""
    if current is None or value is None:
        return True
    if isinstance(current, bool) or isinstance(value, bool):
        return isinstance(current, bool) and isinstance(value, bool)
    if isinstance(current, float):
        return isinstance(value, (int, float))
    if isinstance(current, (list, tuple, ListConfig)):
        return isinstance(value, (list, tuple))
    if isinstance(current, (dict, DictConfig)):
        return isinstance(value, dict)
    if isinstance(current, (int, str)):
        return isinstance(value, type(current))
    if callable(current):
        return isinstance(value, str)
    return True


def type_name(value: Any) -> str:
    """What a person would call the type of a value."""
    names = [
        (bool, "true or false"),
        (int, "an integer"),
        (float, "a number"),
        (str, "text"),
        ((list, tuple, ListConfig), "a list"),
        ((dict, DictConfig), "a dictionary"),
    ]
    if callable(value):
        return "the dotted name of a class or function"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
