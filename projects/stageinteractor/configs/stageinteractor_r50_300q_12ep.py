"""StageInteractor, ResNet-50, 300 queries, 12 epochs: 46.3 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_300q_12ep.py

16 images a step on 8 GPUs, float32. The schedule of this row was not released: these are the
images of the longer ones with the milestones of 12 epochs. Not run here.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from projects.stageinteractor.data import ResizeShortestEdgeBilinear

from .stageinteractor_r50_12ep import dataloader, lr_multiplier, model, optimizer, train

model.query_generator.num_queries = 300

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(),
    L(T.RandomApply)(
        tfm_or_aug=L(T.AugmentationList)(
            augs=[
                L(ResizeShortestEdgeBilinear)(short_edge_length=[400, 500, 600], max_size=1333),
                L(T.RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
            ]
        ),
        prob=0.5,
    ),
    L(ResizeShortestEdgeBilinear)(short_edge_length=list(range(480, 801, 32)), max_size=1333),
]
train.output_dir = "./output/stageinteractor_r50_300q_12ep"
