"""StageInteractor with a ResNeXt-101 32x4d, deformable from res3 on."""

from detectron2.config import LazyCall as L

from projects.stageinteractor.modeling.backbones import EvalModeBatchNorm2d, resnext_dcn_stages

from .stageinteractor_r50 import model

model.backbone.stages = L(resnext_dcn_stages)(
    blocks_per_stage=[3, 4, 23, 3], num_groups=32, width_per_group=4, norm=EvalModeBatchNorm2d
)
