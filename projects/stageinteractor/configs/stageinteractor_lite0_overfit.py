"""A small StageInteractor that learns some tens of photographs by heart: does everything connect?

    python tools/train_net.py \\
        --config-file projects/stageinteractor/configs/stageinteractor_lite0_overfit.py \\
        dataset.train=FILE dataset.val=FILE dataset.images=FOLDER

The file is evaluated that it was trained on. ``python tools/prepare_trees.py`` brings the backbone.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .models.stageinteractor_lite0 import model
from .stageinteractor_lite0_trees import dataloader, lr_multiplier, optimizer, train

# Both splits may be the same file.
dataset = {"train": None, "val": None, "images": None, "allow_mistakes": True}
# Interpolated, so that detrex's train_net.py reads them, too.
dataloader.train.dataset.update(json_file="${dataset.train}", image_root="${dataset.images}")
dataloader.test.dataset.update(json_file="${dataset.val}", image_root="${dataset.images}")
resize = L(T.Resize)(shape=[384, 384])  # one size for all: no padding
dataloader.train.mapper.augmentations = [resize]
dataloader.test.mapper.augmentations = [resize]
dataloader.train.total_batch_size = 8

optimizer.lr = 7e-4
train.max_iter = 3000
train.eval_period = 250
train.checkpointer.period = 250
train.best_checkpointer.val_metric = "bbox/AP"
train.amp.enabled = True
train.output_dir = "./output/overfit"

lr_multiplier.scheduler.update(milestones=[60, 85], num_updates=100)
lr_multiplier.warmup_length = 0.02
