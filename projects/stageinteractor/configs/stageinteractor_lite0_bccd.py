"""A small StageInteractor on BCCD, photographs of blood cells: docs/bccd.md compares it there.

    python tools/train_net.py \\
        --config-file projects/stageinteractor/configs/stageinteractor_lite0_bccd.py

Its peers, ``*_lite0_bccd.py`` beside this one, change the model only: backbone, images,
augmentation, optimiser, length and evaluator are the same.
"""

import os

from detectron2.config import LazyCall as L

from projects.stageinteractor.data import ResizeShortestEdgeBilinear

from .models.stageinteractor_lite0 import model
from .stageinteractor_lite0_trees import dataloader, lr_multiplier, optimizer, train

DATASETS = os.environ.get("DETECTRON2_DATASETS", "datasets")

dataset = {
    "train": f"{DATASETS}/bccd/train.json",
    "val": f"{DATASETS}/bccd/val.json",
    "images": f"{DATASETS}/BCCD_Dataset/BCCD/JPEGImages",
}
# Interpolated, so that detrex's train_net.py reads them, too.
dataloader.train.dataset.update(json_file="${dataset.train}", image_root="${dataset.images}")
dataloader.test.dataset.update(json_file="${dataset.val}", image_root="${dataset.images}")
model.decoder.num_classes = 3
resize = L(ResizeShortestEdgeBilinear)(short_edge_length=240, max_size=400)  # half of 640x480
dataloader.train.mapper.augmentations.insert(0, resize)
dataloader.test.mapper.augmentations = [resize]

train.best_checkpointer.val_metric = "bbox/AP"
train.output_dir = "./output/bccd/stageinteractor"
