"""Detectron2's Faster R-CNN on the backbone of the small StageInteractor, for small images.

Narrower than the original (128 channels for 256, 512 hidden units for 1024), as the small
StageInteractor is; anchors are half the size; strides start at 8 and 128 regions an image are
trained on (512), without which a step takes five times as long as the others'.
"""

from detectron2.model_zoo import get_config

from .stageinteractor_lite0 import model as small

model = get_config("common/models/mask_rcnn_fpn.py").model

model.backbone.bottom_up = small.backbone
model.backbone.in_features = ["stride8", "stride16", "stride32"]
model.backbone.out_channels = 128
model.proposal_generator.head.in_channels = 128
model.proposal_generator.in_features = ["p3", "p4", "p5", "p6"]
model.proposal_generator.anchor_generator.update(
    sizes=[[16], [32], [64], [128]], strides=[8, 16, 32, 64]
)
model.roi_heads.box_in_features = ["p3", "p4", "p5"]
model.roi_heads.box_pooler.scales = [1 / 8, 1 / 16, 1 / 32]
model.roi_heads.batch_size_per_image = 128
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]
model.roi_heads.box_head.input_shape.channels = 128
model.roi_heads.box_head.fc_dims = [512, 512]
model.roi_heads.box_predictor.input_shape.channels = 512
model.pixel_mean, model.pixel_std = small.pixel_mean, small.pixel_std
model.input_format = "RGB"
