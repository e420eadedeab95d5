"""Names in the authors' released checkpoints (an mmdet fork) and what they are called here.

StageInteractor's and AdaMixer's. The tables are read in both directions.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

# In a name, # stands for a number and * for a last part without a dot. The first fitting row wins.
MODEL = [
    ("rpn_head.init_content_features.*", "query_generator.content.*"),
    ("neck.lateral_convs.#.conv.*", "neck.projections.#.*"),
    ("neck.gn_out.*", "neck.norm.*"),
]
STAGE = [
    ("iof_tau", "attention.iof_tau"),
    ("attention.attn.in_proj_weight", "attention.in_proj.weight"),
    ("attention.attn.in_proj_bias", "attention.in_proj.bias"),
    ("attention.attn.out_proj.*", "attention.out_proj.*"),
    ("attention_norm.*", "attention.norm.*"),
    ("ffn.layers.0.0.*", "ffn.layers.0.*"),
    ("ffn.layers.1.*", "ffn.layers.2.*"),
    ("ffn_norm.*", "ffn.norm.*"),
    ("fc_cls.*", "class_head.3.*"),
    ("cls_fcs.#.*", "class_head.#.*"),
    ("fc_reg.*", "box_head.3.*"),
    ("reg_fcs.#.*", "box_head.#.*"),
]
STAGEINTERACTOR_STAGE = [
    ("feat_extractor.gen_one_d.0.*", "points.first_offsets.*"),
    ("feat_extractor.gen_double_d.0.*", "points.sub_offsets.*"),
    ("dynamic_conv.parameter_generator.*", "mixing.filter_generator.*"),
    ("dynamic_conv.mix_bias.*", "mixing.bias_generator.*"),
    ("dynamic_conv.axis_atten_list.#.*", "mixing.static_mixings.#.across.*"),
    ("dynamic_conv.subbox_local_list.#.*", "mixing.static_mixings.#.within.*"),
    ("dynamic_conv.M_score_list.*", "mixing.channel_adapter.gates.*"),
    ("dynamic_conv.M_score_list_mix_bias.*", "mixing.channel_adapter.biases.*"),
    ("dynamic_conv.S_score_list.*", "mixing.spatial_adapter.row_gate.*"),
    ("dynamic_conv.S_score_list2.*", "mixing.spatial_adapter.column_gate.*"),
    ("dynamic_conv.Wv.*", "mixing.out_proj.*"),
    ("dynamic_conv.Wv_layer_norm.*", "mixing.norm.*"),
]
ADAMIXER_STAGE = [
    ("sampling_n_mixing.sampling_offset_generator.0.*", "points.offsets.*"),
    ("sampling_n_mixing.adaptive_mixing.parameter_generator.0.*", "mixing.filter_generator.*"),
    ("sampling_n_mixing.adaptive_mixing.out_proj.*", "mixing.out_proj.*"),
    ("sampling_n_mixing.norm.*", "mixing.norm.*"),
]
RESNET = [("conv1.*", "stem.conv1.*"), ("bn1.*", "stem.conv1.norm.*")] + [
    (f"layer{stage}.#.{old}", f"res{stage + 1}.#.{new}")
    for stage in range(1, 5)
    for old, new in (
        ("conv#.*", "conv#.*"),
        ("bn#.*", "conv#.norm.*"),
        ("conv2.conv_offset.*", "conv2.offset.*"),
        ("downsample.0.*", "shortcut.*"),
        ("downsample.1.*", "shortcut.norm.*"),
    )
]
SWIN = [
    ("patch_embed.projection.*", "patch_embed.proj.*"),
    ("patch_embed.norm.*", "patch_embed.norm.*"),
    ("stages.#.blocks.#.norm#.*", "layers.#.blocks.#.norm#.*"),
    ("stages.#.blocks.#.attn.w_msa.*", "layers.#.blocks.#.attn.*"),
    ("stages.#.blocks.#.attn.w_msa.qkv.*", "layers.#.blocks.#.attn.qkv.*"),
    ("stages.#.blocks.#.attn.w_msa.proj.*", "layers.#.blocks.#.attn.proj.*"),
    ("stages.#.blocks.#.ffn.layers.0.0.*", "layers.#.blocks.#.mlp.fc1.*"),
    ("stages.#.blocks.#.ffn.layers.1.*", "layers.#.blocks.#.mlp.fc2.*"),
    ("stages.#.downsample.reduction.*", "layers.#.downsample.reduction.*"),
    ("stages.#.downsample.norm.*", "layers.#.downsample.norm.*"),
    ("norm#.*", "norm#.*"),
]


def full_names(stage_table: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The table of a whole model, released name and ours, whose stages are those of a method."""
    return [
        *MODEL,
        *((f"backbone.{old}", f"backbone.{new}") for old, new in RESNET + SWIN),
        *((f"roi_head.bbox_head.#.{old}", f"decoder.stages.#.{new}")
          for old, new in STAGE + stage_table),
    ]


TABLES = {
    "StageInteractor": full_names(STAGEINTERACTOR_STAGE),
    "AdaMixer": full_names(ADAMIXER_STAGE),
}
# Without effect in the released code, and absent here.
DEAD = re.compile(
    r"rpn_head\.init_proposal_bboxes(\.weight)?|.*\.num_batches_tracked"
    r"|.*\.iou_snyc_statistics\.\w+|.*\.subbox_score_list\.\d+\.\w+"
)
WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)  # every query's first box: centre, width and height
PATCH_MERGING = re.compile(r"backbone\.(stages|layers)\.\d+\.downsample\.\w+\.\w+")


class Converted(NamedTuple):
    """What came of a checkpoint's weights."""

    weights: dict[str, Tensor]
    dropped: list[str]  # names of what has no effect
    unplaced: list[str]  # names that no table knows


def rename(name: str, pattern: str, replacement: str) -> str | None:
    """``name`` written as ``replacement``, or None if it is not of the form ``pattern``."""
    regex = re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "([a-z_]+)")
    found = re.fullmatch(regex, name)
    parts = iter(found.groups()) if found else None
    return found and re.sub(r"[#*]", lambda _: next(parts), replacement)


def lookup(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """What the first row that fits makes of ``name``, or None."""
    return next(filter(None, (rename(name, *row) for row in table)), None)


def project_name(released_name: str) -> str | None:
    """This project's name of a released entry, or None where it is dead or unknown."""
    if DEAD.fullmatch(released_name):
        return None
    return lookup(released_name, (row for table in TABLES.values() for row in table))


def is_released(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of a released StageInteractor or AdaMixer checkpoint."""
    stage = "roi_head.bbox_head.0."
    return any(
        name.startswith((f"{stage}dynamic_conv.", f"{stage}sampling_n_mixing.")) for name in state
    )


def method_of(weights: dict[str, Tensor]) -> str:
    """Whether weights under this project's names are "StageInteractor" or "AdaMixer"."""
    stage = "decoder.stages.0"
    one_level = f"{stage}.points.offsets.weight" in weights  # in an ablation of ours as well
    generates_biases = f"{stage}.mixing.bias_generator.weight" in weights
    return "AdaMixer" if one_level and not generates_biases else "StageInteractor"


def swap_merged_patches(name: str, value: Tensor) -> Tensor:
    """A weight of Swin's patch merging in the other convention, any other weight as it is.

    The release orders the channels of the 2x2 patches that are merged (channel, row, column);
    Detectron2 and Microsoft order them (column, row, channel).
    """
    if not PATCH_MERGING.fullmatch(name):
        return value
    channels = value.shape[-1] // 4
    shape = (channels, 2, 2) if name.startswith("backbone.stages") else (2, 2, channels)
    return value.unflatten(-1, shape).transpose(-1, -3).flatten(-3)


def convert_released(state: dict[str, Tensor]) -> Converted:
    """Released weights under this project's names.

    Raises:
        UserError: the queries do not start as the whole image, as all do here.
    """
    converted = Converted({}, [], [])
    for released, value in state.items():
        name = project_name(released)
        if DEAD.fullmatch(released):
            converted.dropped.append(released)
        elif name is None:
            converted.unplaced.append(released)
        else:
            converted.weights[name] = swap_merged_patches(released, value)
        if "init_proposal_bboxes" in released:
            if not torch.allclose(value, value.new_tensor(WHOLE_IMAGE), atol=1e-4):
                raise UserError(
                    f"{released}: the queries of this checkpoint start at boxes of their own, but "
                    "here every query starts as the whole image"
                )
    return converted


def convert_to_released(weights: dict[str, Tensor]) -> Converted:
    """Weights of this project under released names, with neutral values where those are dead."""
    method = method_of(weights)
    table = [(ours, released) for released, ours in TABLES[method]]
    converted = Converted({}, [], [])
    for name, value in weights.items():
        released = lookup(name, table)
        if DEAD.fullmatch(name):
            converted.dropped.append(name)
        elif released is None:
            converted.unplaced.append(name)
        else:
            converted.weights[released] = swap_merged_patches(name, value)
    converted.weights.update(dead_entries(converted.weights, method))
    return converted


def dead_entries(state: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    """What a released state dict holds beside what has an effect."""
    queries = len(state["rpn_head.init_content_features.weight"])
    boxes = torch.tensor(WHOLE_IMAGE).repeat(queries, 1)
    counter = torch.zeros((), dtype=torch.int64)
    dead = {"rpn_head.init_proposal_bboxes": boxes}
    if method == "AdaMixer":
        dead = {"rpn_head.init_proposal_bboxes.weight": boxes}
    for name in state:
        module = name.rpartition(".")[0]
        if name.endswith(".running_var"):
            dead[f"{module}.num_batches_tracked"] = counter
        if method == "AdaMixer":
            continue
        if name.endswith(".iof_tau"):
            statistics = f"{module}.iou_snyc_statistics"
            dead[f"{statistics}.running_mean"] = torch.full((1,), 0.5)
            dead[f"{statistics}.running_var"] = torch.zeros(1)
            dead[f"{statistics}.num_batches_tracked"] = counter
        if ".axis_atten_list." in name and name.endswith(".weight"):
            # A score a group and sampling point: as many as gates of the spatial filter's columns.
            mixing, _, index = module.rpartition(".axis_atten_list.")
            gate = state[f"{mixing}.S_score_list2.weight"]
            dead[f"{mixing}.subbox_score_list.{index}.weight"] = torch.zeros_like(gate)
            dead[f"{mixing}.subbox_score_list.{index}.bias"] = gate.new_zeros(len(gate))
    return dead
