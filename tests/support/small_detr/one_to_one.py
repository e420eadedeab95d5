"""The small DETR of the tests on the photographs of the demo, with ordinary one-to-one labels."""

from detectron2.config import LazyCall as L

from tests.support.small_detr.detector import SmallDetr
from tests.support.small_detr.ordinary import Matcher, OrdinaryCriterion

from ....projects.stageinteractor.configs.models.stageinteractor_lite0 import model as lite0
from ....projects.stageinteractor.configs.stageinteractor_lite0_trees import (  # noqa: F401
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

NUM_LAYERS = 4
WEIGHTS = {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}

model = L(SmallDetr)(
    backbone=lite0.backbone,
    in_features=["stride8", "stride16", "stride32"],
    in_channels=[40, 112, 320],
    num_classes=1,
    num_layers=NUM_LAYERS,
    # The arguments of the criterion in detrex's Deformable DETR.
    criterion=L(OrdinaryCriterion)(
        num_classes="${..num_classes}",
        matcher=L(Matcher)(),
        weight_dict={
            f"{name}{suffix}": weight
            for name, weight in WEIGHTS.items()
            for suffix in ("", *(f"_{layer}" for layer in range(NUM_LAYERS - 1)))
        },
        losses=["class", "boxes"],
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    ),
    pixel_mean=lite0.pixel_mean,
    pixel_std=lite0.pixel_std,
)
train.output_dir = "./output/small_detr/one_to_one"
