"""The same with cross-stage labels."""

from projects.stageinteractor.modeling import CrossStageCriterion, CrossStageLabelAssigner

from .one_to_one import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.criterion._target_ = CrossStageCriterion
model.criterion.label_assigner = dict(_target_=CrossStageLabelAssigner)
train.output_dir = "./output/small_detr/cross_stage"
