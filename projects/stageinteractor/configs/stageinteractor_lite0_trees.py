"""A small StageInteractor on aerial photographs of trees: what ``make demo`` trains on a CPU.

    python tools/prepare_trees.py
    python tools/train_net.py \\
        --config-file projects/stageinteractor/configs/stageinteractor_lite0_trees.py
"""

import os

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper

from projects.stageinteractor.data import coco_dataset

from .models.stageinteractor_lite0 import model
from .stageinteractor_r50_12ep import dataloader, lr_multiplier, optimizer, train

ROOT = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "trees")

model.decoder.num_classes = 1

dataloader.train.dataset = L(coco_dataset)(
    json_file=f"{ROOT}/train.json",
    image_root=f"{ROOT}/images",
    training=True,
    names="${.json_file}",  # for detrex's tools
)
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True, vertical=False),
    L(T.RandomFlip)(horizontal=False, vertical=True),
    # The photographs differ in light and season.
    L(T.RandomBrightness)(intensity_min=0.7, intensity_max=1.3),
    L(T.RandomContrast)(intensity_min=0.7, intensity_max=1.3),
    L(T.RandomSaturation)(intensity_min=0.7, intensity_max=1.3),
]
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 0  # a tile loads in milliseconds
# The checkpoint is chosen on `select`; the reported figure comes from `val`.
dataloader.test.dataset = L(coco_dataset)(
    json_file=f"{ROOT}/select.json", image_root=f"{ROOT}/images"
)
dataloader.test.mapper = L(DatasetMapper)(
    is_train=False, augmentations=[], image_format="RGB"
)
dataloader.test.num_workers = 0
dataloader.evaluator.dataset_name = "${..test.dataset.json_file}"

optimizer.lr = 3e-4

train.init_checkpoint = f"{ROOT}/lite0.pth"
train.output_dir = "./output/demo"
train.epochs = train.warmup_steps = None  # iterations count
train.max_iter = 1600
train.eval_period = 200
train.checkpointer.period = 200
train.best_checkpointer = {"val_metric": "bbox/AP50", "mode": "max"}
train.seed = 0

lr_multiplier.scheduler.update(milestones=[80, 95], num_updates=100)  # per cent of max_iter
lr_multiplier.warmup_length = 0.05
