"""AdaMixer with an EfficientNet-Lite0, of the size of the small StageInteractor."""

from .adamixer_r50 import model
from .stageinteractor_lite0 import model as small

model.update(
    backbone=small.backbone,
    neck=small.neck,
    query_generator=small.query_generator,
    pixel_mean=small.pixel_mean,
    pixel_std=small.pixel_std,
)
model.decoder.update(
    embed_dim=small.decoder.embed_dim,
    feature_dim=small.decoder.feature_dim,
    ffn_dim=small.decoder.ffn_dim,
    points_per_stage=small.decoder.points_per_stage,
    out_points=small.decoder.out_points,
    first_reuse_stage=len(small.decoder.points_per_stage),
)
