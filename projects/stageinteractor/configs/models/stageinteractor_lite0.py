"""A small StageInteractor with an EfficientNet-Lite0, quick to train on two CPU cores."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from projects.stageinteractor.modeling.backbones import TimmBackbone

from .stageinteractor_r50 import model

model.backbone = L(TimmBackbone)(
    model_name="tf_efficientnet_lite0",
    frozen_modules=["conv_stem", "bn1", "blocks"],  # all of it: a third less time a step
)
model.neck.input_shapes = {
    "stride4": ShapeSpec(channels=24),
    "stride8": ShapeSpec(channels=40),
    "stride16": ShapeSpec(channels=112),
    "stride32": ShapeSpec(channels=320),
}
model.neck.in_features = ["stride4", "stride8", "stride16", "stride32"]
model.neck.num_groups = 8
model.query_generator.num_queries = 60
model.decoder.update(
    embed_dim=128,
    feature_dim=64,
    ffn_dim=256,
    points_per_stage=[32, 32, 32, 32],
    out_points=32,
)
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]
