"""Feature sampling: where each query looks, and what it finds there.

Supplement, section B and code 2, as released: for each channel group, a query first places a few
points around its box. Each of these then spreads into K sub-points, whose offsets are shared by all
groups and all first-level points. A sampling point is (x, y, z): a position in pixels of the
network input and a scale, which decides how much each pyramid level contributes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import box_sizes

LEVEL_TEMPERATURE = 2.0  # tau of the softmax over pyramid levels


def num_subpoints(num_points: int) -> int:
    """Return K = 2^ceil(log2 sqrt(P)) for P points per group (supplement, section J)."""
    return 2 ** math.ceil(math.log2(num_points) / 2)


class SamplingPoints(nn.Module):
    """Place the sampling points of each query around its box.

    Args:
        embed_dim: size D of the content vectors.
        num_groups: channel groups G; each group has its own points.
        num_points: points P per group, a multiple of K = ``num_subpoints(P)``.

    Raises:
        ValueError: if ``num_points`` is not a multiple of K.
    """

    def __init__(self, *, embed_dim: int = 256, num_groups: int = 4, num_points: int = 32):
        super().__init__()
        self.num_groups = num_groups
        self.num_subpoints = num_subpoints(num_points)
        if num_points % self.num_subpoints:
            raise ValueError(
                f"num_points must be a multiple of K = {self.num_subpoints}, got {num_points}"
            )
        self.num_first = num_points // self.num_subpoints
        self.first_offsets = nn.Linear(embed_dim, num_groups * self.num_first * 3)
        self.sub_offsets = nn.Linear(embed_dim, self.num_subpoints * 3)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Offsets do not depend on the content at first; z and the first sub-point start at 0."""
        for layer, bound in ((self.first_offsets, 0.5), (self.sub_offsets, 0.5 / math.sqrt(2))):
            nn.init.zeros_(layer.weight)
            offsets = nn.init.zeros_(layer.bias).view(-1, 3)
            nn.init.uniform_(offsets[:, :2], -bound, bound)
        self.sub_offsets.bias[:2] = 0

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Content (B, N, D) and positional vectors (B, N, 4) -> points (B, N, G, P, 3).

        Points are (x, y) in pixels and the scale z. Those of a group are ordered by first-level
        point, then by sub-point. They may lie outside the image.
        """
        batch, queries = content.shape[:2]
        first = self.first_offsets(content).to(xyzr.dtype)
        first = first.view(batch, queries, self.num_groups, self.num_first, 1, 3)
        sub = self.sub_offsets(content).to(xyzr.dtype)
        sub = sub.view(batch, queries, 1, 1, self.num_subpoints, 3)

        # (B, N, G, P/K, K, 2), in widths and heights of the box
        offset = first[..., :2] + 2.0 ** first[..., 2:] * sub[..., :2]
        box = xyzr[:, :, None, None, None]
        xy = box[..., :2] + box_sizes(box) * offset
        z = box[..., 2:3] + first[..., 2:] + sub[..., 2:]
        return torch.cat([xy, z], dim=-1).flatten(3, 4)


def level_weights(z: Tensor, strides: Sequence[int]) -> Tensor:
    """Return the share of each pyramid level at scale z: (...) -> (..., L).

    It is the softmax over levels of -(z - 1 - log2(stride))^2 / tau, so points with a scale of 2s
    pixels prefer the level of stride s.
    """
    # A tensor of strides would have to be copied to the device, which would wait for it.
    distances = torch.stack([z - 1 - math.log2(stride) for stride in strides], dim=-1)
    return F.softmax(-(distances**2) / LEVEL_TEMPERATURE, dim=-1)


class Pyramid(Protocol):
    """Feature maps in any form that the stages can sample.

    ``FeatureMaps`` is the plain one; those of ``fast_sampling`` give the same results.
    """

    def sample(self, points: Tensor) -> Tensor:
        """Sample every level at the points, weighted by the points' scale.

        Args:
            points: (B, N, G, P, 3), x and y in pixels of the padded network input, scale z.

        Returns:
            features (B, N, G, P, Dc). Outside a map counts as zero.
        """


class FeatureMaps(NamedTuple):
    """The maps themselves, sampled one level after the other."""

    maps: list[Tensor]  # (B, G * Dc, H_l, W_l), finest first; group g reads its own Dc channels
    strides: Sequence[int]  # pixels of the network input per cell of each map
    num_groups: int

    def sample(self, points: Tensor) -> Tensor:
        """Points (B, N, G, P, 3) -> features (B, N, G, P, Dc)."""
        batch, queries, groups, num_points, _ = points.shape
        points = points.transpose(1, 2).reshape(batch * groups, queries, num_points, 3)
        weights = level_weights(points[..., 2], self.strides)  # (B*G, N, P, L)

        sampled: Tensor = 0  # type: ignore[assignment]
        for level, (features, stride) in enumerate(zip(self.maps, self.strides)):
            height, width = features.shape[-2:]
            features = features.reshape(batch * groups, -1, height, width)  # (B*G, Dc, H_l, W_l)
            x, y = points[..., 0] / (width * stride), points[..., 1] / (height * stride)
            grid = torch.stack([x, y], dim=-1) * 2 - 1
            # Positions need full precision; features keep the precision of the neck.
            values = F.grid_sample(features.to(grid.dtype), grid, align_corners=False)
            sampled = sampled + values * weights[:, None, :, :, level]  # (B*G, Dc, N, P)
        return sampled.view(batch, groups, -1, queries, num_points).permute(0, 3, 1, 4, 2)
