"""It learns: a tiny model trained from nothing on two images finds every object in them."""

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.layers import ShapeSpec
from torch import nn

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.modeling import (
    CrossStageLabelAssigner,
    HungarianMatcher,
    QueryGenerator,
    SetCriterion,
    SharedNormChannelMapper,
    StageInteractor,
    StageInteractorDecoder,
)
from projects.stageinteractor.modeling.boxes import box_iou
from support.shapes import make_shapes


class SmallBackbone(nn.Module):
    """Four strided convolutions; unlike pretrained backbones, it can start from random weights."""

    def __init__(self, channels=32):
        super().__init__()
        strides = (4, 2, 2, 2)
        widths = (3, channels, channels, channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, stride + 1, stride, stride // 2),
                nn.GroupNorm(4, channels),
                nn.ReLU(),
            )
            for width, stride in zip(widths, strides)
        )

    def forward(self, images):
        maps = {}
        for index, stage in enumerate(self.stages):
            images = maps[f"p{index + 2}"] = stage(images)
        return maps


@pytest.mark.slow
def test_two_images_are_learned_by_heart(tmp_path):
    annotations = make_shapes(tmp_path, images=2, size=(96, 128), seed=3)
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    dataset = coco_dataset(json_file=str(annotations), image_root=str(tmp_path / "images"))
    batch = [mapper(image) for image in dataset]
    names = ("p2", "p3", "p4", "p5")
    model = StageInteractor(
        backbone=SmallBackbone(),
        neck=SharedNormChannelMapper(
            input_shapes={name: ShapeSpec(channels=32) for name in names},
            in_features=names,
            out_channels=32,
            num_groups=4,
        ),
        query_generator=QueryGenerator(num_queries=15, embed_dim=64),
        decoder=StageInteractorDecoder(
            num_classes=3, embed_dim=64, feature_dim=32, ffn_dim=64, num_groups=2,
            points_per_stage=(16, 16, 16, 16), out_points=16,
        ),
        criterion=SetCriterion(
            matcher=HungarianMatcher(), label_assigner=CrossStageLabelAssigner()
        ),
        pixel_mean=[127.5] * 3,
        pixel_std=[127.5] * 3,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=250)
    for _ in range(250):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        outputs = model.eval()(batch)
    for image, output in zip(batch, outputs):
        truth, found = image["instances"], output["instances"]
        best = found[: len(truth)]  # as many detections as objects, the most certain ones
        iou = box_iou(truth.gt_boxes.tensor[:, None], best.pred_boxes.tensor[None])
        iou, index = iou.max(dim=1)
        assert sorted(index.tolist()) == list(range(len(truth))), "an object was found twice"
        assert iou.min() > 0.7
        assert torch.equal(best.pred_classes[index], truth.gt_classes)
