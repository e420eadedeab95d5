"""AdaMixer with a ResNet-50, 100 queries: the baseline, of the same parts with other arguments."""

from projects.stageinteractor.modeling.adamixer import (
    AdaMixerAttention,
    AdaMixerSamplingPoints,
    AdaptiveMixing,
    refine_boxes_by_scale,
)

from .stageinteractor_r50 import model

model.decoder.update(
    points_per_stage=[32, 32, 32, 32, 32, 32],
    first_reuse_stage=6,  # none
    attention=AdaMixerAttention,
    sampling=AdaMixerSamplingPoints,
    mixing=AdaptiveMixing,
    refine=refine_boxes_by_scale,
)
model.criterion.label_assigner.update(scope=[0, 0], iou_threshold=0.0)  # one-to-one
