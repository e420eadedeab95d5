"""Backbones of the timm library behind Detectron2's backbone interface."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

OUT_INDICES = (1, 2, 3, 4)  # timm's maps of stride 4 to 32


class TimmBackbone(Backbone):
    """Feature maps of a timm model, named ``stride4`` to ``stride32``.

    BatchNorm layers use their stored statistics in training, too, as in all backbones here.

    Args:
        model_name: name of a timm model that supports ``features_only``.
        frozen_modules: names of submodules that are not trained.

    Raises:
        ValueError: if the name is that of a model on a hub, which timm would access.
    """

    def __init__(self, model_name: str, *, frozen_modules: Sequence[str] = ()):
        super().__init__()
        if ":" in model_name:
            raise ValueError(f"{model_name} is not one of timm's own models")
        self.body = timm.create_model(
            model_name, features_only=True, pretrained=False, out_indices=OUT_INDICES
        )
        info: Any = self.body.feature_info
        self.shapes = {
            f"stride{stride}": ShapeSpec(channels=channels, stride=stride)
            for stride, channels in zip(info.reduction(), info.channels())
        }
        for name in frozen_modules:
            self.body.get_submodule(name).requires_grad_(False)

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> maps (B, C_l, H / stride, W / stride) by name."""
        # Depthwise convolutions, which the models used here consist of, are faster channels-last.
        images = images.contiguous(memory_format=torch.channels_last)
        return dict(zip(self.shapes, self.body(images)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes
