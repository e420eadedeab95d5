"""The same with cross-stage labels."""

from projects.stageinteractor.modeling import CrossStageLabelAssigner
from projects.stageinteractor.plugins.cross_stage_criterion import CrossStageCriterion

from .one_to_one import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion._target_ = CrossStageCriterion
model.criterion.label_assigner = {"_target_": CrossStageLabelAssigner}
train.output_dir = "./output/small_detr/cross_stage"
