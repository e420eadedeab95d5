"""StageInteractor, ResNet-50, 100 queries, 12 epochs of COCO: 44.8 AP in the paper (table 2).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_12ep.py

The released recipe: 16 images a step on 8 GPUs, float32 (without TF32, which torch's default uses
in convolutions). Not run here.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from projects.stageinteractor.engine.optim import BackboneLRFactor

from ....configs.common.data.coco_detr import dataloader
from ....configs.common.optim import AdamW as optimizer
from ....configs.common.train import train
from .models.stageinteractor_r50 import model

EPOCH = 7330  # steps: 117266 images with objects, 16 a step

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/stageinteractor_r50_12ep"
train.max_iter = 12 * EPOCH
train.eval_period = EPOCH
train.checkpointer.period = EPOCH
train.clip_grad.enabled = True
train.clip_grad.params.max_norm = 1.0

dataloader.train.mapper = L(DatasetMapper)(
    is_train=True,
    augmentations=[
        L(T.RandomFlip)(),
        # The release trains at one scale in this schedule.
        L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333),
    ],
    image_format="RGB",
)
dataloader.evaluator.output_dir = "${train.output_dir}"

optimizer.lr = 2.5e-5
# The release clamps AdamW's denominator at 1e-10. Clipped gradients are so small that torch's
# default of 1e-8 would shorten first steps by up to two thirds; adding 1e-10 gives the same steps.
optimizer.eps = 1e-10
optimizer.weight_decay = 1e-4
optimizer.params.weight_decay_norm = None  # norms decay like everything else

optimizer.params.lr_factor_func = L(BackboneLRFactor)(factor=1.0)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1, 0.1, 0.01],
        milestones=[8, 11],  # epochs
        num_updates=12,
    ),
    warmup_factor=0.001,
    warmup_length=500 / (12 * EPOCH),
)
