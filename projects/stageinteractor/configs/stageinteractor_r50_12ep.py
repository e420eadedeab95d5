"""StageInteractor, ResNet-50, 100 queries, 12 epochs: 44.8 AP in the paper (table 2).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_12ep.py

The released recipe, which all others start from: 16 images a step on 8 GPUs, float32 (without TF32,
which torch's default uses in convolutions). Not run here.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import DatasetMapper
from fvcore.common.param_scheduler import MultiStepParamScheduler

from projects.stageinteractor.config.schedule import set_epochs, warmup_schedule
from projects.stageinteractor.data import (
    ResizeShortestEdgeBilinear,
    TrainingMapper,
    build_train_loader,
    training_dicts,
)
from projects.stageinteractor.engine.evaluator import COCOEvaluator
from projects.stageinteractor.engine.optim import BackboneLRFactor

from .models.stageinteractor_r50 import model

# By path, because the folders above `projects` are in no package. In detrex, these are detrex's.
COMMON = "../../../configs/common"
train = LazyConfig.load_rel(f"{COMMON}/train.py", "train")
optimizer = LazyConfig.load_rel(f"{COMMON}/optim.py", "AdamW")
dataloader = LazyConfig.load_rel(f"{COMMON}/data/coco_detr.py", "dataloader")

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/stageinteractor_r50_12ep"
train.clip_grad.enabled = True
train.clip_grad.params.max_norm = 1.0
if "device" in train.model_ema:  # detrex's, which looks for model.device otherwise
    train.model_ema.device = "${..device}"

dataloader.train._target_ = build_train_loader  # training resumes in the middle of an epoch
dataloader.train.dataset = L(training_dicts)(names="coco_2017_train")
dataloader.train.mapper = L(TrainingMapper)(
    is_train=True,
    augmentations=[
        L(T.RandomFlip)(),
        L(ResizeShortestEdgeBilinear)(short_edge_length=800, max_size=1333),
    ],
    image_format="RGB",
    img_format="${.image_format}",  # its name in detrex's tools
)
dataloader.test.mapper = L(DatasetMapper)(
    is_train=False,
    augmentations=[L(ResizeShortestEdgeBilinear)(short_edge_length=800, max_size=1333)],
    image_format="RGB",
)
dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}",
    own_data="${oc.select:dataset.val,null}",
    max_dets_per_image=None,  # COCO's 100
)

optimizer.lr = 2.5e-5
# The release clamps AdamW's denominator at 1e-10. Clipped gradients are so small that torch's
# default of 1e-8 would shorten first steps by up to two thirds; adding 1e-10 gives the same steps.
optimizer.eps = 1e-10
optimizer.weight_decay = 1e-4
optimizer.params.weight_decay_norm = None  # norms decay like everything else
optimizer.params.lr_factor_func = L(BackboneLRFactor)(factor=1.0)

lr_multiplier = L(warmup_schedule)(
    scheduler=L(MultiStepParamScheduler)(values=[1, 0.1, 0.01]),
    warmup_factor=0.001,
    # To refuse what detrex's train_net.py would ignore.
    train="${train}",
    own_data="${oc.select:dataset.train,null}",
    json_file="${oc.select:dataloader.train.dataset.json_file,null}",
)
set_epochs(train, lr_multiplier, 12, milestones=[8, 11])
