"""Convert checkpoints between the authors' released format, this project's, and safetensors."""

import json
import os
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..config.building import dataset_categories
from ..config.overrides import CONFIGS, load_config
from ..config.portable_config import parse_portable, portable_config
from ..errors import UserError
from .model_file import ModelFile
from .released import DEAD, Converted, convert_released, convert_to_released, is_released
from .variant import Variant, describe
from .weight_files import weights_of, write_checkpoint, write_safetensors

CONTAINERS = (".pth", ".safetensors")


def convert(source: str, target: str, to: str) -> str:
    """Convert one file, and return what a user should know about the result.

    Args:
        source, target: files; the target must not exist yet.
        to: "project" or "released".

    Raises:
        UserError: a file is missing, would be overwritten, or cannot be read, converted or written.
    """
    check_target(target, to)
    file = ModelFile.read(source)
    suffixes = {os.path.splitext(source)[1], os.path.splitext(target)[1]}
    if to == "project" and not is_released(file.weights) and suffixes == {*CONTAINERS}:
        weights, config, remark = evaluated_weights(file)
        write({"model": weights, "class_names": file.class_names, "config": config}, target)
        return f"{len(weights)} entries as they were{remark}: wrote {target}\n{kept(file)}".rstrip()
    if is_released(file.weights) == (to == "released"):
        raise UserError(
            f"{source} is a released checkpoint already" if to == "released"
            else f"{source} is not a released StageInteractor or AdaMixer checkpoint (mmdet)"
        )
    if to == "released":
        variant = describe(file.weights)
        _, command = fitting_config(variant, file.weights)
        converted = convert_to_released(file.weights)
        # Without the entry, the authors' code falls back to COCO's names.
        meta = {"CLASSES": tuple(file.class_names)} if file.class_names else {}
        write({"meta": meta, "state_dict": converted.weights}, target)
    else:
        converted = convert_released(file.weights)
        variant = describe(converted.weights)
        cfg, command = fitting_config(variant, converted.weights)
        config = portable_config(cfg, file.categories(dataset_categories(cfg)))
        names = file.class_names
        write({"model": converted.weights, "class_names": names, "config": config}, target)
    evaluated = target if to == "project" else source
    return "\n".join(filter(None, [
        f"{variant.method}, {variant.backbone}, {variant.num_queries} queries, "
        f"{variant.num_classes} classes: wrote {target}",
        count_entries(len(file.weights), converted),
        kept(file),
        f"evaluate with: python tools/train_net.py --eval-only --config-file {command} "
        f"train.init_checkpoint={evaluated}",
    ]))


def check_target(target: str, to: str):
    """Raises UserError if a converted file cannot be written there."""
    if os.path.exists(target):
        raise UserError(f"{target} exists already: choose another name")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise UserError(f"no folder {os.path.dirname(target)} to write {target} to")
    if not target.endswith(CONTAINERS):
        raise UserError(f"{target}: choose a name that ends in {' or '.join(CONTAINERS)}")
    if to == "released" and not target.endswith(".pth"):
        raise UserError(f"{target}: the authors' code reads only .pth, choose such a name")


def fitting_config(variant: Variant, weights: dict[str, Tensor]) -> tuple[DictConfig, str]:
    """The config that weights fill completely, and its file and overrides for a command line.

    Raises:
        UserError: a weight of that model is missing or has another shape.
    """
    file = CONFIGS / f"{variant.config}.py"
    cfg, command = load_config(str(file), []), f"projects/stageinteractor/configs/{file.name}"
    for key, value in variant.settings.items():
        if OmegaConf.select(cfg, key) != value:
            OmegaConf.update(cfg, key, value)
            command += f" {key}={value}".replace(", ", ",")
    for name, expected in instantiate(cfg.model).state_dict().items():
        if DEAD.fullmatch(name) or name.endswith("relative_position_index"):  # not weights
            continue
        found = weights.get(name)
        if found is None or found.shape != expected.shape:
            is_ = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise UserError(
                f"{name} is {is_}, {variant.config} has it with shape {tuple(expected.shape)}"
            )
    return cfg, command


def evaluated_weights(file: ModelFile) -> tuple[dict[str, Tensor], str, str]:
    """The weights that a checkpoint's config evaluates, that config for them alone, and a remark.

    Raises:
        UserError: its moving average, which its config evaluates, does not hold weights.
    """
    cfg = parse_portable(file.config, file.path).cfg if file.config else None
    if cfg is None or not cfg.train.model_ema.enabled or "model_ema" not in file.rest:
        return file.weights, file.config, ""
    average = weights_of(file.rest["model_ema"], file.path)
    average.pop("n_averaged", None)
    content = json.loads(file.config)
    content["model_ema"]["enabled"] = False
    return average, json.dumps(content), ", of the moving average"


def write(checkpoint: dict[str, Any], target: str):
    """Save a converted checkpoint in the format of the target's name. Raises UserError."""
    try:
        if target.endswith(".safetensors"):
            write_safetensors(
                checkpoint["model"], checkpoint["class_names"], checkpoint["config"], target
            )
        else:
            write_checkpoint(checkpoint, target)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {target}: {str(error).splitlines()[0]}") from error


def count_entries(number: int, converted: Converted) -> str:
    """What became of the entries of a checkpoint."""
    dropped, unplaced = converted.dropped, converted.unplaced
    text = f"{number - len(dropped) - len(unplaced)} entries converted, "
    text += f"{len(dropped)} without effect left out"
    if unplaced:
        text += f"\n{len(unplaced)} entries have no place and were left out:\n  "
    return text + "\n  ".join(unplaced)


def kept(file: ModelFile) -> str:
    """What a checkpoint has beside its weights, and which of it is kept."""
    lines, names = [], file.class_names
    if rest := file.rest.keys() - {"meta", "class_names", "config"}:
        lines.append(f"left out beside the weights: {', '.join(sorted(map(str, rest)))}")
    if names:
        more = ", ..." if len(names) > 5 else ""
        lines.append(f"{len(names)} class names kept: {', '.join(names[:5])}{more}")
    return "\n".join(lines)
