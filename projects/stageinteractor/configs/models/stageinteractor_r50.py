"""StageInteractor with a ResNet-50, 100 queries: the paper's dimensions."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet

from projects.stageinteractor.modeling import (
    CrossStageLabelAssigner,
    HungarianMatcher,
    QueryGenerator,
    SetCriterion,
    SharedNormChannelMapper,
    StageInteractor,
    StageInteractorDecoder,
)
from projects.stageinteractor.modeling.backbones import EvalModeBatchNorm2d

model = L(StageInteractor)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm=EvalModeBatchNorm2d),
        stages=L(ResNet.make_default_stages)(
            depth=50, stride_in_1x1=False, norm=EvalModeBatchNorm2d
        ),
        out_features=["res2", "res3", "res4", "res5"],
        freeze_at=2,  # stem and res2
    ),
    neck=L(SharedNormChannelMapper)(
        input_shapes={
            "res2": ShapeSpec(channels=256),
            "res3": ShapeSpec(channels=512),
            "res4": ShapeSpec(channels=1024),
            "res5": ShapeSpec(channels=2048),
        },
        in_features=["res2", "res3", "res4", "res5"],
        out_channels="${..decoder.feature_dim}",
    ),
    query_generator=L(QueryGenerator)(num_queries=100, embed_dim="${..decoder.embed_dim}"),
    decoder=L(StageInteractorDecoder)(
        num_classes=80,
        embed_dim=256,
        feature_dim=256,
        num_heads=8,
        ffn_dim=2048,
        num_groups=4,
        points_per_stage=[64, 32, 32, 32, 32, 32],
        out_points=128,
        first_reuse_stage=2,
        strides=[4, 8, 16, 32],
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        label_assigner=L(CrossStageLabelAssigner)(scope=[-1, None], iou_threshold=0.5),
        weight_class=2.0,
        weight_bbox=5.0,
        weight_giou=2.0,
    ),
    pixel_mean=[123.675, 116.28, 103.53],  # RGB
    pixel_std=[58.395, 57.12, 57.375],
    detections_per_image="${.query_generator.num_queries}",
)
