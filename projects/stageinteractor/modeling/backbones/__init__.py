"""Backbones that Detectron2 does not have, and the norm that the released recipe uses in them."""

from .batch_norm import EvalModeBatchNorm2d
from .resnext_dcn import resnext_dcn_stages
from .swin import SwinTransformer
from .timm_backbone import TimmBackbone

__all__ = ["EvalModeBatchNorm2d", "SwinTransformer", "TimmBackbone", "resnext_dcn_stages"]
