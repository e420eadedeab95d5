"""Detectron2's Faster R-CNN on BCCD, trained as the small StageInteractor: see docs/bccd.md.

    python tools/train_net.py \\
        --config-file projects/stageinteractor/configs/faster_rcnn_lite0_bccd.py
"""

from .models.faster_rcnn_lite0 import model
from .stageinteractor_lite0_bccd import dataloader, dataset, lr_multiplier, optimizer, train

model.roi_heads.num_classes = 3
train.output_dir = "./output/bccd/faster_rcnn"
