"""StageInteractor with a Swin-S."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from projects.stageinteractor.modeling.backbones import SwinTransformer

from .stageinteractor_r50 import model

model.backbone = L(SwinTransformer)(
    embed_dim=96,
    depths=[2, 2, 18, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    # The release asks for a stochastic depth of 0.2, but its layers ignore it.
    drop_path_rate=0.0,
)
model.neck.input_shapes = {
    "p0": ShapeSpec(channels=96),
    "p1": ShapeSpec(channels=192),
    "p2": ShapeSpec(channels=384),
    "p3": ShapeSpec(channels=768),
}
model.neck.in_features = ["p0", "p1", "p2", "p3"]
