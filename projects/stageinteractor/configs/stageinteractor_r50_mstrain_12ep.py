"""StageInteractor, ResNet-50, 100 queries, multi-scale, 12 epochs: no figure in the paper.

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_mstrain_12ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from projects.stageinteractor.data import ResizeShortestEdgeBilinear

from .stageinteractor_r50_12ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(),
    L(ResizeShortestEdgeBilinear)(short_edge_length=list(range(480, 801, 32)), max_size=1333),
]
train.output_dir = "./output/stageinteractor_r50_mstrain_12ep"
