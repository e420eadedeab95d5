"""Names of the authors' released checkpoints (an mmdet fork) and what they are called here."""

import re
from typing import Dict, Optional

from torch import Tensor

from ..errors import UserError

# Tried from top to bottom, each on the result of the one before. None: dead in the released code.
RENAMES = [
    (r"^rpn_head\.init_content_features\.", "query_generator.content."),
    (r"^rpn_head\.init_proposal_bboxes$", None),
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"neck.projections.\1."),
    (r"^neck\.gn_out\.", "neck.norm."),
    (r"^backbone\.(conv1|bn1)\.", r"backbone.stem.\1."),
    (r"^backbone\.layer1\.", "backbone.res2."),
    (r"^backbone\.layer2\.", "backbone.res3."),
    (r"^backbone\.layer3\.", "backbone.res4."),
    (r"^backbone\.layer4\.", "backbone.res5."),
    (r"^(backbone\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"^(backbone\..*)\.downsample\.0\.", r"\1.shortcut."),
    (r"^(backbone\..*)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"^(backbone\..*)\.num_batches_tracked$", None),
    (r"^roi_head\.bbox_head\.(\d+)\.", r"decoder.stages.\1."),
    (r"\.(iou_snyc_statistics|dynamic_conv\.subbox_score_list)\.", None),
    (r"\.iof_tau$", ".attention.iof_tau"),
    (r"\.attention\.attn\.in_proj_(weight|bias)$", r".attention.in_proj.\1"),
    (r"\.attention\.attn\.out_proj\.", ".attention.out_proj."),
    (r"\.attention_norm\.", ".attention.norm."),
    (r"\.feat_extractor\.gen_one_d\.0\.", ".points.first_offsets."),
    (r"\.feat_extractor\.gen_double_d\.0\.", ".points.sub_offsets."),
    (r"\.dynamic_conv\.parameter_generator\.", ".mixing.filter_generator."),
    (r"\.dynamic_conv\.mix_bias\.", ".mixing.bias_generator."),
    (r"\.dynamic_conv\.axis_atten_list\.(\d+)\.", r".mixing.static_mixings.\1.across."),
    (r"\.dynamic_conv\.subbox_local_list\.(\d+)\.", r".mixing.static_mixings.\1.within."),
    (r"\.dynamic_conv\.M_score_list\.", ".mixing.channel_adapter.gates."),
    (r"\.dynamic_conv\.M_score_list_mix_bias\.", ".mixing.channel_adapter.biases."),
    (r"\.dynamic_conv\.S_score_list\.", ".mixing.spatial_adapter.row_gate."),
    (r"\.dynamic_conv\.S_score_list2\.", ".mixing.spatial_adapter.column_gate."),
    (r"\.dynamic_conv\.Wv\.", ".mixing.out_proj."),
    (r"\.dynamic_conv\.Wv_layer_norm\.", ".mixing.norm."),
    (r"\.ffn\.layers\.0\.0\.", ".ffn.layers.0."),
    (r"\.ffn\.layers\.1\.", ".ffn.layers.2."),
    (r"\.ffn_norm\.", ".ffn.norm."),
    (r"\.cls_fcs\.", ".class_head."),
    (r"\.fc_cls\.", ".class_head.3."),
    (r"\.reg_fcs\.", ".box_head."),
    (r"\.fc_reg\.", ".box_head.3."),
]


def is_released(state: Dict[str, Tensor]) -> bool:
    """Whether the names are those of a released StageInteractor checkpoint."""
    return "roi_head.bbox_head.0.dynamic_conv.parameter_generator.weight" in state


def project_name(released_name: str) -> Optional[str]:
    """This project's name of a released entry, or None where the entry is dead."""
    name = released_name
    for pattern, replacement in RENAMES:
        if re.search(pattern, name):
            if replacement is None:
                return None
            name = re.sub(pattern, replacement, name)
    return name


def convert_released(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Released ResNet weights under this project's names, without the dead entries.

    Raises:
        UserError: another backbone, whose names have no table yet.
    """
    for name in state:
        if "patch_embed" in name or "conv_offset" in name:
            raise UserError("of the released checkpoints, those with a ResNet can be converted")
    named = ((project_name(name), value) for name, value in state.items())
    return {name: value for name, value in named if name is not None}
