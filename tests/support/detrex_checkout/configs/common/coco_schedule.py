"""One of detrex's schedules for COCO, which our configs do without."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

EPOCH = 7500  # steps

lr_multiplier_12ep = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[11 * EPOCH, 12 * EPOCH]),
    warmup_length=0.0,
    warmup_method="linear",
    warmup_factor=0.001,
)
