"""Neck: gives all backbone maps the same number of channels and normalises them.

The released "ChannelMapping" is a 1x1 convolution per level, followed by a single GroupNorm module
that normalises each level on its own but shares its weights. There is no top-down path, and there
are no extra levels.
"""

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn


class SharedNormChannelMapper(nn.Module):
    """Project each backbone map to ``out_channels`` and apply one GroupNorm shared by all levels.

    Args:
        input_shapes: channels of each backbone feature, by name.
        in_features: names of the features to use, finest first.
        out_channels: channels of every output map (the feature dimension).
        num_groups: groups of the shared GroupNorm.
    """

    def __init__(
        self,
        *,
        input_shapes: dict[str, ShapeSpec],
        in_features: Sequence[str],
        out_channels: int = 256,
        num_groups: int = 32,
    ):
        super().__init__()
        self.in_features = tuple(in_features)
        self.projections = nn.ModuleList(
            nn.Conv2d(input_shapes[name].channels, out_channels, kernel_size=1)
            for name in self.in_features
        )
        self.norm = nn.GroupNorm(num_groups, out_channels)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection.get_parameter("weight"))
            nn.init.zeros_(projection.get_parameter("bias"))

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Named maps (B, C_l, H_l, W_l) -> list of maps (B, out_channels, H_l, W_l)."""
        return [
            self.norm(projection(features[name]))
            for name, projection in zip(self.in_features, self.projections)
        ]
