"""Which published model a set of weights is, told from its tensors."""

import re
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError
from .released import method_of

NUM_GROUPS = 4  # channel groups of every published model
# The part of a config's name that says the backbone, by what is found in the weights: the blocks of
# its third stage, and whether they are deformable.
RESNETS = {(6, False): "r50", (23, False): "r101", (23, True): "x101_dcn"}
# The config by method, backbone and number of queries; the last of a backbone serves other numbers.
CONFIGS = {
    "StageInteractor": {
        "r50": {100: "12ep", 500: "500q_12ep", 900: "900q_36ep", 300: "300q_36ep"},
        "r101": {300: "300q_36ep"},
        "x101_dcn": {300: "300q_36ep"},
        "swin_s": {300: "300q_36ep"},
    },
    "AdaMixer": {
        "r50": {100: "12ep", 300: "300q_36ep"},
        "r101": {300: "300q_36ep"},
        "x101_dcn": {300: "300q_36ep"},
        "swin_s": {300: "300q_36ep"},
    },
}


class Variant(NamedTuple):
    """A published model."""

    method: str  # StageInteractor or AdaMixer
    backbone: str  # as in the configs' names
    num_queries: int
    num_classes: int
    points_per_stage: tuple[int, ...]

    @property
    def config(self) -> str:
        """Name of the config."""
        by_queries = CONFIGS[self.method][self.backbone]
        ending = by_queries.get(self.num_queries, list(by_queries.values())[-1])
        return f"{self.method.lower()}_{self.backbone}_{ending}"

    @property
    def settings(self) -> dict[str, object]:
        """What the config has to say for these weights to fit."""
        return {
            "model.query_generator.num_queries": self.num_queries,
            "model.decoder.num_classes": self.num_classes,
            "model.decoder.points_per_stage": list(self.points_per_stage),
        }


def describe(weights: dict[str, Tensor]) -> Variant:
    """The published model that weights under this project's names belong to.

    Raises:
        UserError: an essential weight is missing, or the backbone is none of the published ones.
    """
    method = method_of(weights)

    def rows(name: str) -> int:
        if name not in weights:
            raise UserError(f"this is no whole {method}: {name} is missing")
        return len(weights[name])

    stages = {int(found[1]) for found in map(re.compile(r"decoder\.stages\.(\d+)\.").match, weights)
              if found}
    points = []
    for stage in range(max(stages, default=-1) + 1):
        prefix = f"decoder.stages.{stage}.points"
        if method == "AdaMixer":
            points.append(rows(f"{prefix}.offsets.bias") // 3 // NUM_GROUPS)
        else:
            first, sub = rows(f"{prefix}.first_offsets.bias"), rows(f"{prefix}.sub_offsets.bias")
            points.append(first // 3 // NUM_GROUPS * (sub // 3))
    return Variant(
        method,
        backbone_of(weights),
        rows("query_generator.content.weight"),
        rows("decoder.stages.0.class_head.3.bias"),
        tuple(points),
    )


def backbone_of(weights: dict[str, Tensor]) -> str:
    """The backbone as the configs' names call it.

    Raises:
        UserError: it is none of the published ones.
    """
    blocks = {name.split(".")[2] for name in weights if name.startswith("backbone.res4.")}
    deformable = "backbone.res4.0.conv2.offset.weight" in weights
    if (len(blocks), deformable) in RESNETS:
        return RESNETS[len(blocks), deformable]
    if "backbone.layers.2.blocks.17.attn.qkv.weight" in weights:
        return "swin_s"
    raise UserError(
        "the backbone is none of the published models' (ResNet-50, ResNet-101, ResNeXt-101-DCN, "
        "Swin-S): such a checkpoint has no released form"
    )
