"""The alternatives in the paper's ablations (supplement, tables 1 to 3 and 5).

Each replaces one part of the model, and can do so on the command line:

    model.decoder.mixing=projects.stageinteractor.modeling.ablations.DynamicOnlyMixing

``projects/stageinteractor/README.md`` has the overrides for every row of these tables.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from torch import Tensor, nn

from .adamixer import VanillaSamplingPoints
from .filter_reuse import AdaptedFilter, zero_linear
from .mixing import CascadeMixing
from .sampling import num_subpoints
from .stageinteractor import StageInteractor


class NoStaticMixing(nn.Module):
    """Pass the mixed features on to the next dynamic mixing, without the residual.

    This and the next two take the arguments of ``StaticMixing``.
    """

    def __init__(self, *, num_points: int, group_dim: int):
        super().__init__()

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """All are (R, P, Dc)."""
        return features


class ChannelStaticMixing(nn.Module):
    """Two static layers that mix only channels, in the same way for every point."""

    def __init__(self, *, num_points: int, group_dim: int):
        super().__init__()
        self.across, self.within = (zero_linear(group_dim, group_dim) for _ in range(2))

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """All are (R, P, Dc)."""
        return self.across(features) + self.within(features) + residual


class SpatialStaticMixing(nn.Module):
    """Static layers that mix only points, in the same way for every channel."""

    def __init__(self, *, num_points: int, group_dim: int):
        super().__init__()
        self.num_subpoints = num_subpoints(num_points)
        self.num_first = num_points // self.num_subpoints
        self.across = zero_linear(self.num_first, self.num_first)
        self.within = zero_linear(self.num_subpoints, self.num_subpoints)

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """All are (R, P, Dc)."""
        grid = features.unflatten(1, (self.num_first, self.num_subpoints))  # (R, P/K, K, Dc)
        across = self.across(grid.movedim(1, -1)).movedim(-1, 1)
        within = self.within(grid.movedim(2, -1)).movedim(-1, 2)
        return (across + within).flatten(1, 2) + residual


class IdentityFilters(nn.Module):
    """Put the identity, without a bias, in place of every reused channel filter."""

    def forward(
        self, content: Tensor, own: Tensor, old: Sequence[Tensor]
    ) -> list[tuple[AdaptedFilter, Tensor]]:
        """Arguments and result are those of ``ChannelFilterAdapter``."""
        identity = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device).expand_as(own)
        gate = own.new_zeros(own.shape[:2])
        adapted = AdaptedFilter(identity, identity, gate, gate)
        return [(adapted, gate[:, None]) for _ in old]


class DynamicOnlyMixing(CascadeMixing):
    """Table 1 "dynamic", table 2 "none": no static mixing between the dynamic ones."""

    static_mixing = NoStaticMixing


class StaticOnlyMixing(CascadeMixing):
    """Table 1 "static": static mixing without reused channel filters, but with spatial ones."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        self.channel_adapter = IdentityFilters()


class ChannelStaticCascade(CascadeMixing):
    """Table 2 "channel"."""

    static_mixing = ChannelStaticMixing


class SpatialStaticCascade(CascadeMixing):
    """Table 2 "spatial"."""

    static_mixing = SpatialStaticMixing


class GroupInitialisedSamplingPoints(VanillaSamplingPoints):
    """Table 3 "group-init.": vanilla points that start where first-level and sub-points would.

    Raises:
        ValueError: if ``num_points`` is not a multiple of K.
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.offsets.weight)
        subpoints = num_subpoints(self.num_points)
        if self.num_points % subpoints:
            raise ValueError(f"{self.num_points} points are not a multiple of K = {subpoints}")
        offsets = nn.init.zeros_(self.offsets.bias).view(self.num_groups, -1, subpoints, 3)
        first = torch.empty_like(offsets[:, :, :1, :2]).uniform_(-0.5, 0.5)
        bound = 0.5 / math.sqrt(2)
        sub = torch.empty_like(offsets[..., :2]).uniform_(-bound, bound)
        sub[:, :, 0] = 0
        offsets[..., :2] = first + sub


class StageInteractorWithNMS(StageInteractor):
    """Table 5: non-maximum suppression, class by class, among the final detections.

    Args:
        nms_threshold: IoU above which the detection with the lower score is removed.
    """

    def __init__(self, *, nms_threshold: float = 0.5, **parts: Any):
        super().__init__(**parts)
        self.nms_threshold = nms_threshold

    def detect(
        self, logits: Tensor, xyzr: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        return [
            found[batched_nms(
                found.pred_boxes.tensor, found.scores, found.pred_classes, self.nms_threshold
            )]
            for found in super().detect(logits, xyzr, image_sizes)
        ]
