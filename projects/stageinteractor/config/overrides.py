"""Load a LazyConfig file with command-line overrides, and explain mistakes in them."""

import difflib
import inspect
import os
import re
import shlex
from collections.abc import Callable, Collection, Sequence
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
# Names of keys elsewhere, and the last part of the key here.
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
# Dictionaries whose entries become arguments of a library's function, and a key that Detectron2
# reads.
PASSED_ON = ("train.clip_grad.params", "train.ddp", "train.wandb.params")
READ_BY_DETECTRON2 = "train.cudnn_benchmark"
# Types of values, and what an error message calls them. A bool is an int in Python, too.
KINDS = (
    (bool, "true or false"),
    (int, "an integer"),
    (float, "a number"),
    (str, "text"),
    ((list, tuple, ListConfig), "a list"),
    ((dict, DictConfig), "a dictionary"),
)
DOTTED_NAME = "the dotted name of a class or function"


def load_config(
    config_file: str,
    overrides: list[str],
    parts: Sequence[str] = ("model", "dataloader", "train"),
) -> DictConfig:
    """The config of a LazyConfig file with ``key=value`` overrides applied.

    A key must be in the config or be an argument of the class that it configures. ``+key=value``
    adds a key that something reads, see `is_read`. Every config has the keys of ``dataset``. A
    class or function is given by its full dotted name. A LazyConfig file is Python code that runs.

    Args:
        parts: what the config must have.

    Raises:
        UserError: the file does not exist or is not a config; an override does not parse, has an
            unknown key or a value of the wrong type.
    """
    if not config_file:
        raise UserError("no config: pass --config-file FILE (projects/stageinteractor/configs/)")
    if not os.path.isfile(config_file):
        close = close_config(config_file)
        hint = f"did you mean {close}?" if close else f"see {os.path.relpath(CONFIGS)}"
        raise UserError(f"no config file {config_file}: {hint}")
    if not config_file.endswith((".py", ".yaml", ".yml")):
        raise UserError(
            f"{config_file} is not a config file (.py or .yaml). Is it a checkpoint?"
        )
    try:
        cfg = LazyConfig.load(config_file)
    except SyntaxError as error:
        found = error.__cause__ or error  # Detectron2's error names the file, but not the line
        raise UserError(f"{error} Line {found.lineno}: {found.msg}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{config_file}: {' '.join(str(error).split())}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{config_file} is empty, or something other than keys with values")
    missing = [part for part in parts if part not in cfg]
    if missing:
        raise UserError(f"{config_file} has no {', no '.join(missing)}. Is it part of a config?")
    cfg.dataset = OmegaConf.merge(DATASET, cfg.get("dataset") or {})
    if "train" in cfg:
        cfg.train.setdefault("accept_changes", False)  # the config.yaml of a run of version 0.1
    for text in overrides:
        apply_override(cfg, text)
    return cfg


def given_keys(overrides: Sequence[str]) -> set[str]:
    """The keys that overrides set."""
    return {text.partition("=")[0].lstrip("+") for text in overrides}


def apply_override(cfg: DictConfig, text: str):
    """Check one ``key=value`` against the config and apply it.

    Raises:
        UserError: it does not parse, or has an unknown key or a value of the wrong type.
    """
    if text.startswith("-"):
        dashed = re.match(r"-+(\w+(\.\w+)+=.*)", text)
        hint = f"write {dashed[1]}, without dashes" if dashed else "options come before key=value"
        raise UserError(f"cannot read the override '{text}': {hint}")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason, (key, _, value) = str(error).splitlines()[0], text.partition("=")
        hint = f"\nIf the value is a text, quote it: {path_override(key, value)}" if value else ""
        raise UserError(f"cannot read the override '{text}': {reason}{hint}") from error
    if override.is_delete():
        raise UserError(f"cannot read the override '{text}': deleting is not supported")
    if override.is_sweep_override():
        raise UserError(f"cannot read the override '{text}': quote a value that has commas")
    key, value = override.key_or_group, override.value()
    current = current_value(cfg, key, override.is_add())
    check_value(cfg, key, current, value)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except KeyError as error:  # +key=value below something that is not a dictionary
        raise UserError(error.args[0]) from error
    if callable(current) and value is not None:
        OmegaConf.update(cfg, key, named_object(key, value))


def check_value(cfg: DictConfig, key: str, current: Any, value: Any):
    """Check that a value may replace the current one; the entries of a dictionary one by one.

    Raises:
        UserError: the value has another type, or a key in it is unknown.
    """
    if not is_compatible(current, value):
        example = f"{current.__module__}.{current.__name__}" if callable(current) else current
        raise UserError(
            f"{key}={value}: expected {kind_of(current)}, as in {key}={example}, "
            f"got {kind_of(value)}"
        )
    if isinstance(current, DictConfig):
        for name, item in (value or {}).items():
            inner = f"{key}.{name}"
            check_value(cfg, inner, current_value(cfg, inner, is_new=True), item)


def path_override(key: str, path: Any) -> str:
    """An override that sets ``key`` to a path, quoted for a shell."""
    text = str(path)
    if not re.fullmatch(r"[\w./-]+", text, re.ASCII):  # Hydra's grammar
        text = "'" + text.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={text}")


def named_object(key: str, name: str) -> Callable:
    """The class or function with a full dotted name, the value of ``key``.

    Raises:
        UserError: there is no such class or function.
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
        UserError: the key is neither in the config, nor an argument of the class it configures, nor
            a new key that something reads.
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

    Its reader can be the class or function that the key configures, if it has such an argument or
    takes any; the function that a dictionary is passed on to; or another value that refers to it.
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
    if same:
        best = max(same, key=closeness)
        return f"{best}.enabled" if f"{best}.enabled" in known else best
    if parent not in known:
        return closest(key, known)
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    sibling = closest(name, [other.rpartition(".")[2] for other in siblings])
    return sibling and f"{parent}.{sibling}"


def closest(name: str, known: Collection[str]) -> str:
    """The most similar of several names; empty if none is similar."""
    return "".join(difflib.get_close_matches(name, known, n=1))


def close_config(path: str) -> str:
    """The config file that was probably meant by a path that is not a config; may be empty."""
    if os.path.isdir(path):
        recorded = os.path.join(path, "config.yaml")
        return recorded if os.path.isfile(recorded) else ""
    beside = Path(path).parent
    files = [*CONFIGS.glob("*.py"), *beside.glob("*.py"), *beside.glob("*.yaml")]
    by_name = {file.stem: os.path.relpath(file) for file in files}
    return by_name.get(closest(Path(path).stem, by_name), "")


def constructor_arguments(node: DictConfig) -> dict:
    """Parameters by name of the class or function that a LazyCall node configures, if it is one."""
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
    kinds = kind_of(current), kind_of(value)
    is_known = callable(current) or any(isinstance(current, types) for types, _ in KINDS)
    return (
        kinds[0] == kinds[1]
        or kinds in (("a number", "an integer"), (DOTTED_NAME, "text"))
        or not is_known
    )


def kind_of(value: Any) -> str:
    """The type of a value, in words."""
    if callable(value):
        return DOTTED_NAME
    return next((name for types, name in KINDS if isinstance(value, types)), type(value).__name__)
