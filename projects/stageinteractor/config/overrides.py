"""Load a LazyConfig file with command-line overrides, and say clearly what is wrong with them."""

import difflib
import inspect
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc import ErrorDuringImport
from typing import Any

import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..errors import UserError
from .own_data import DATASET

CONFIGS = Path(__file__).parents[1] / "configs"
# What people call a key elsewhere, by what its last part is called here.
ALIASES = {
    "batch_size": "total_batch_size",
    "checkpoint": "init_checkpoint",
    "classes": "num_classes",
    "ema": "model_ema",
    "fp16": "amp",
    "grad_clip": "clip_grad",
    "iterations": "max_iter",
    "iters": "max_iter",
    "learning_rate": "lr",
    "load_from": "init_checkpoint",
    "queries": "num_queries",
    "samples_per_gpu": "total_batch_size",
    "weights": "init_checkpoint",
    "work_dir": "output_dir",
    "workers": "num_workers",
}
# Dictionaries whose entries become arguments of a library's function, and a key of Detectron2's.
PASSED_ON = ("train.clip_grad.params", "train.ddp", "train.wandb.params")
READ_BY_DETECTRON2 = "train.cudnn_benchmark"


def load_config(config_file: str, overrides: list[str]) -> DictConfig:
    """The config of a LazyConfig file with ``key=value`` overrides applied.

    A key must be in the config or be an argument of the class it configures; ``+key=value`` adds
    a key that something reads, see `is_read`. Every config has the keys of ``dataset``. A class or
    function is given by its full dotted name. A LazyConfig file is Python and runs.

    Raises:
        UserError: no such file, or none that can be read; an override that does not parse, an
            unknown key or a wrong type.
    """
    if not config_file:
        raise UserError("no config: pass --config-file FILE (projects/stageinteractor/configs/)")
    if not os.path.isfile(config_file):
        close = close_config(config_file)
        hint = f"did you mean {close}?" if close else f"see {os.path.relpath(CONFIGS)}"
        raise UserError(f"no config file {config_file}: {hint}")
    if not config_file.endswith((".py", ".yaml", ".yml")):
        raise UserError(
            f"{config_file} is not a config, which ends in .py or .yaml: is it a checkpoint?"
        )
    try:
        cfg = LazyConfig.load(config_file)
    except SyntaxError as error:
        found = error.__cause__ or error  # Detectron2's own names the file, but no line
        raise UserError(f"{error} Line {found.lineno}: {found.msg}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{config_file}: {' '.join(str(error).split())}") from error
    missing = [part for part in ("model", "dataloader", "train") if part not in cfg]
    if missing:
        raise UserError(f"{config_file} has no {', no '.join(missing)}: is it part of a config?")
    cfg.dataset = OmegaConf.merge(DATASET, cfg.get("dataset") or {})
    for text in overrides:
        apply_override(cfg, text)
    return cfg


def given_keys(overrides: Sequence[str]) -> set[str]:
    """The keys that overrides set."""
    return {text.partition("=")[0].lstrip("+") for text in overrides}


def apply_override(cfg: DictConfig, text: str):
    """Check one ``key=value`` against the config and apply it.

    Raises:
        UserError: what is wrong with it.
    """
    if text.startswith("-"):
        dashed = re.match(r"-+(\w+(\.\w+)+=.*)", text)
        hint = f"write {dashed[1]}, without dashes" if dashed else "options come before key=value"
        raise UserError(f"cannot read the override '{text}': {hint}")
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
    current = current_value(cfg, key, override.is_add())
    check_value(cfg, key, current, value)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except KeyError as error:  # +key=value below something that is no dictionary
        raise UserError(error.args[0]) from error
    if callable(current) and value is not None:
        OmegaConf.update(cfg, key, named_object(key, value))


def check_value(cfg: DictConfig, key: str, current: Any, value: Any):
    """Check that a value may replace the current one; those of a dictionary one by one.

    Raises:
        UserError: it has another type, or an unknown key.
    """
    if not is_compatible(current, value):
        example = f"{current.__module__}.{current.__name__}" if callable(current) else current
        raise UserError(
            f"{key}={value}: expected {type_name(current)}, as in {key}={example}, "
            f"got {type_name(value)}"
        )
    if isinstance(current, DictConfig):
        for name, item in (value or {}).items():
            inner = f"{key}.{name}"
            check_value(cfg, inner, current_value(cfg, inner, is_new=True), item)


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


def current_value(cfg: DictConfig, key: str, is_new: bool) -> Any:
    """The value that ``key`` has without an override; None for a new one.

    Raises:
        UserError: the key is neither in the config nor an argument of the class it configures, nor
            new and read by something.
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
    readable = is_read(cfg, key)
    if is_new and readable:
        return None
    close = close_key(cfg, key)
    hint = f"did you mean {close}?" if close else "nothing reads it"
    raise UserError(f"unknown config key {key}: {f'+{key}=VALUE adds it' if readable else hint}")


def is_read(cfg: DictConfig, key: str) -> bool:
    """Whether something reads a key that is not in the config.

    The class or function that the key configures, if it takes such an argument or any; what a
    dictionary is passed on to; or another value of the config, which refers to it.
    """
    if key == READ_BY_DETECTRON2 or key.startswith(tuple(f"{name}." for name in PASSED_ON)):
        return True
    if f"${{{key}}}" in str(OmegaConf.to_container(cfg, resolve=False)):
        return True
    node, is_within_call = cfg, False
    for name in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        arguments = constructor_arguments(node)
        if name not in node:
            break
        node, is_within_call = node._get_node(name), is_within_call or bool(arguments)
    if not arguments:
        return is_within_call
    takes_any = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments.values())
    return takes_any or name in arguments


def close_key(cfg: DictConfig, key: str) -> str:
    """The key that was probably meant: one with the same last part, or with a similar name."""
    known = known_keys(cfg)
    parent, _, name = key.rpartition(".")
    name = ALIASES.get(name, name)

    def closeness(other: str) -> tuple:
        likeness = difflib.SequenceMatcher(None, parent, other.rpartition(".")[0]).ratio()
        return likeness, OmegaConf.select(cfg, other) is not None, -other.count(".")

    same = [other for other in known if other.rpartition(".")[2] == name]
    if not same and parent in known:
        siblings = {o.rpartition(".")[2]: o for o in known if o.rpartition(".")[0] == parent}
        return "".join(siblings[o] for o in difflib.get_close_matches(name, siblings, n=1))
    if not same:
        return "".join(difflib.get_close_matches(key, known, n=1))
    best = max(same, key=closeness)
    switch = f"{best}.enabled"
    return switch if switch in known else best


def close_config(path: str) -> str:
    """The config file that was probably meant by a path that is not one, or nothing."""
    if os.path.isdir(path):
        recorded = os.path.join(path, "config.yaml")
        return recorded if os.path.isfile(recorded) else ""
    beside = Path(path).parent
    files = [*CONFIGS.glob("*.py"), *beside.glob("*.py"), *beside.glob("*.yaml")]
    by_name = {file.stem: os.path.relpath(file) for file in files}
    return "".join(by_name[name] for name in
                   difflib.get_close_matches(Path(path).stem, by_name, n=1))


def constructor_arguments(node: DictConfig) -> dict:
    """Named arguments of the class or function that a LazyCall node configures."""
    target = node.get("_target_")
    if target is None:
        return {}
    target = locate(target) if isinstance(target, str) else target
    return dict(inspect.signature(target).parameters)


def known_keys(node: DictConfig, prefix: str = "") -> list[str]:
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
