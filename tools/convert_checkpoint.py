#!/usr/bin/env python
"""Convert a checkpoint between the authors' released format (mmdet) and this project's.

    python tools/convert_checkpoint.py released.pth here.pth
    python tools/convert_checkpoint.py here.pth released.pth --to released
    python tools/convert_checkpoint.py output/demo/model_best.pth weights.safetensors

StageInteractor and AdaMixer, with every backbone they were published with. Weights keep their bits,
both ways; what has no effect in the released code is left out here and neutral there. Training
loads released checkpoints without this tool too, with train.init_checkpoint=released.pth.

OUT may end in .safetensors too, which holds nothing but weights, and text: names of classes and the
config. So a checkpoint of this project, of any model, changes between .pth and .safetensors.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import _start
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from projects.stageinteractor.checkpoint import why_missing
from projects.stageinteractor.checkpoint.weight_files import (
    class_names_of,
    config_of,
    read_checkpoint,
    weights_of,
    write_checkpoint,
    write_safetensors,
)
from projects.stageinteractor.checkpoint.released import (
    DEAD,
    convert_released,
    convert_to_released,
    is_released,
)
from projects.stageinteractor.checkpoint.variant import Variant, describe
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.portable_config import portable_config
from projects.stageinteractor.config.portable_config import parse_portable
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference.opening import known_categories, test_categories

CONFIGS = "projects/stageinteractor/configs"
CONTAINERS = (".pth", ".safetensors")


def fitting_config(
    variant: Variant, weights: dict[str, Tensor]
) -> tuple[DictConfig, list[str]]:
    """The config with which weights fill a whole model, and its file and the overrides.

    Raises:
        UserError: a weight of that model is missing or has another shape.
    """
    file = f"{CONFIGS}/{variant.config}.py"
    cfg = load_config(str(Path(__file__).resolve().parents[1] / file), [])
    overrides = []
    for key, value in variant.settings.items():
        if OmegaConf.select(cfg, key) != value:
            OmegaConf.update(cfg, key, value)
            overrides.append(f"{key}={value}".replace(" ", ""))
    for name, expected in instantiate(cfg.model).state_dict().items():
        if DEAD.fullmatch(name) or name.endswith("relative_position_index"):  # no weights
            continue
        found = weights.get(name)
        if found is None or found.shape != expected.shape:
            is_ = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise UserError(
                f"{name} is {is_}, {variant.config} has it with shape {tuple(expected.shape)}"
            )
    return cfg, [file, *overrides]


def chosen_weights(
    checkpoint: dict[str, Any], state: dict[str, Tensor], config: str, source: str
) -> tuple[dict[str, Tensor], str, str]:
    """The weights that a checkpoint's config evaluates, that config for them alone, and a remark.

    Raises:
        UserError: its moving average, which its config evaluates, is none.
    """
    cfg = parse_portable(config, source).cfg if config else None
    if cfg is None or not cfg.train.model_ema.enabled or "model_ema" not in checkpoint:
        return state, config, ""
    average = weights_of(checkpoint["model_ema"], source)
    average.pop("n_averaged", None)
    content = json.loads(config)
    content["model_ema"]["enabled"] = False
    return average, json.dumps(content), ", of the moving average"


def write(checkpoint: dict[str, Any], target: str):
    """Save a converted checkpoint in the format that the name of the target says.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if target.endswith(".safetensors"):
            write_safetensors(
                checkpoint["model"], checkpoint["class_names"], checkpoint["config"], target
            )
        else:
            write_checkpoint(checkpoint, target)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {target}: {str(error).splitlines()[0]}") from error


def report_rest(checkpoint: dict[str, Any], state: dict[str, Tensor], class_names: list[str]):
    """Say what a checkpoint has beside its weights, and which of it is kept."""
    known = {"state_dict", "model", "meta", "class_names", "config"}
    rest = checkpoint.keys() - known - state.keys()
    if rest:
        print(f"left out beside the weights: {', '.join(sorted(map(str, rest)))}")
    if class_names:
        more = ", ..." if len(class_names) > 5 else ""
        print(f"{len(class_names)} class names kept: {', '.join(class_names[:5])}{more}")


def convert(source: str, target: str, to: str):
    """Convert one file and say what came of it.

    Raises:
        UserError: a file that is not there, would be overwritten, cannot be read or converted.
    """
    if not os.path.isfile(source):
        raise UserError(why_missing(source))
    if os.path.exists(target):
        raise UserError(f"{target} exists already: choose another name")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise UserError(f"no folder {os.path.dirname(target)} to write {target} to")
    if not target.endswith(CONTAINERS):
        raise UserError(f"{target}: choose a name that ends in {' or '.join(CONTAINERS)}")
    if to == "released" and not target.endswith(".pth"):
        raise UserError(f"{target}: the authors' code reads .pth alone, choose such a name")
    checkpoint = read_checkpoint(source)
    state = weights_of(checkpoint.get("state_dict", checkpoint.get("model", checkpoint)), source)
    class_names = class_names_of(checkpoint, source)
    suffixes = {os.path.splitext(source)[1], os.path.splitext(target)[1]}
    if to == "project" and not is_released(state) and suffixes == {*CONTAINERS}:
        state, config, what = chosen_weights(checkpoint, state, config_of(checkpoint), source)
        write({"model": state, "class_names": class_names, "config": config}, target)
        print(f"{len(state)} entries as they were{what}: wrote {target}")
        report_rest(checkpoint, state, class_names)
        return
    if is_released(state) == (to == "released"):
        raise UserError(
            f"{source} is a released checkpoint already" if to == "released"
            else f"{source} is no released StageInteractor or AdaMixer checkpoint (mmdet)"
        )
    if to == "released":
        variant = describe(state)
        _, command = fitting_config(variant, state)
        converted = convert_to_released(state)
        # Without the entry, the authors' code falls back to COCO's names.
        meta = {"CLASSES": tuple(class_names)} if class_names else {}
        result = {"meta": meta, "state_dict": converted.weights}
    else:
        converted = convert_released(state)
        variant = describe(converted.weights)
        cfg, command = fitting_config(variant, converted.weights)
        classes = known_categories(test_categories(cfg), class_names)
        config = portable_config(cfg, classes)
        result = {"model": converted.weights, "class_names": class_names, "config": config}
    write(result, target)

    print(
        f"{variant.method}, {variant.backbone}, {variant.num_queries} queries, "
        f"{variant.num_classes} classes: wrote {target}"
    )
    kept = len(state) - len(converted.dropped) - len(converted.unplaced)
    print(f"{kept} entries converted, {len(converted.dropped)} without effect left out")
    if converted.unplaced:
        print(f"{len(converted.unplaced)} entries have no place and were left out:")
        print("\n".join(f"  {name}" for name in converted.unplaced))
    report_rest(checkpoint, state, class_names)
    file = target if to == "project" else source
    print("evaluate with: python tools/train_net.py --eval-only --config-file", *command,
          f"train.init_checkpoint={file}")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--to", choices=("project", "released"), default="project")
    args = parser.parse_args(argv)
    convert(args.source, args.target, args.to)


if __name__ == "__main__":
    main()
