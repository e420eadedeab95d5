"""Detectron2's RetinaNet on the backbone of the small StageInteractor, for small images.

Narrower than the original (128 channels for 256), as the small StageInteractor is; anchors are half
the size.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config

from .stageinteractor_lite0 import model as small

model = get_config("common/models/retinanet.py").model

model.backbone.bottom_up = small.backbone
model.backbone.in_features = ["stride8", "stride16", "stride32"]
model.backbone.out_channels = 128
model.backbone.top_block.update(in_channels=320, in_feature="stride32")
model.head.input_shape = [L(ShapeSpec)(channels=128)] * 5
model.head.conv_dims = [128] * 4
model.anchor_generator.sizes = [
    [size * 2 ** (third / 3) for third in range(3)] for size in (16, 32, 64, 128, 256)
]
model.pixel_mean, model.pixel_std = small.pixel_mean, small.pixel_std
model.input_format = "RGB"
