"""Learn a handful of images by heart: where this fails, data or code is wrong.

    python tools/train_net.py \\
        --config-file projects/stageinteractor/configs/stageinteractor_lite0_overfit.py \\
        dataset.train=FILE dataset.val=FILE dataset.images=FOLDER   # twice the same file
"""

from detectron2.config import LazyCall as L

from projects.stageinteractor.data import ResizeShortestEdgeBilinear

from .stageinteractor_lite0_trees import dataloader, lr_multiplier, model, optimizer, train

dataset = dict(allow_mistakes=True)  # such as that training and validation share images

resize = L(ResizeShortestEdgeBilinear)(short_edge_length=480, max_size=640)
dataloader.train.mapper.augmentations = [resize]  # nothing random
dataloader.test.mapper.augmentations = [resize]
model.query_generator.num_queries = 100

train.best_checkpointer.val_metric = "bbox/AP"
train.output_dir = "./output/overfit"
train.max_iter = train.eval_period = 3000
