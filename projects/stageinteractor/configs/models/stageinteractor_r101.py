"""StageInteractor with a ResNet-101."""

from .stageinteractor_r50 import model

model.backbone.stages.depth = 101
