"""Cascade dynamic mixing: turn the sampled features of a query into an update of its content.

Paper section 3.2 and supplement section A, code 1. For every query and channel group:

1. generate a channel filter M and a spatial filter S from the content;
2. mix channels with M;
3. for each reused channel filter, oldest first: apply static channel-spatial mixing, then mix
   channels with the adapted filter;
4. mix the points with S; if filters are reused, half of its rows come from the preceding stage;
5. project all groups, rows and channels to one content vector.

The R = B * N * G pairs of a query and a group never see each other before step 5.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import filter_reuse
from .backward import recomputed
from .filter_reuse import AdaptedFilter, DynamicFilters, zero_linear
from .sampling import num_subpoints


def normalize_and_activate(mixed: Tensor) -> Tensor:
    """Normalise over the last two dimensions jointly, without affine parameters, then ReLU."""
    # In place, because the backward pass of the norm needs only its input.
    return F.layer_norm(mixed, mixed.shape[-2:]).relu_()


def channel_mixing(
    features: Tensor, channel_filter: Tensor | AdaptedFilter, bias: Tensor
) -> Tensor:
    """Features (R, P, Dc), filter M (R, Dc, Dc), bias (R, 1, Dc) -> (R, P, Dc)."""
    if isinstance(channel_filter, AdaptedFilter):
        channel_filter = channel_filter.blend()
    return normalize_and_activate(torch.baddbmm(bias, features, channel_filter))


def spatial_mixing(features: Tensor, spatial_filter: Tensor, bias: Tensor) -> Tensor:
    """Features (R, P, Dc), filter S (R, rows, P), bias (R, rows, 1) -> (R, rows, Dc)."""
    return normalize_and_activate(torch.baddbmm(bias, spatial_filter, features))


class StaticMixing(nn.Module):
    """Static channel-spatial mixing (code 1): across the first-level points, and within each.

    It starts at zero, so that an untrained cascade step passes on only its residual.

    Args:
        num_points: sampling points P per group: P/K first-level points with K sub-points each.
        group_dim: channels Dc per group.
    """

    def __init__(self, *, num_points: int, group_dim: int):
        super().__init__()
        self.num_subpoints = num_subpoints(num_points)
        self.num_first = num_points // self.num_subpoints
        across, within = self.num_first * group_dim, self.num_subpoints * group_dim
        self.across, self.within = zero_linear(across, across), zero_linear(within, within)

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """Add the features, mixed in both ways, to the residual; all are (R, P, Dc)."""
        rows, points, channels = features.shape
        grid = features.view(rows, self.num_first, self.num_subpoints, channels)
        across = self.across(grid.transpose(1, 2).flatten(2))  # (R, K, P/K * Dc)
        across = across.view(rows, self.num_subpoints, self.num_first, channels).transpose(1, 2)
        within = self.within(grid.flatten(2))  # (R, P/K, K * Dc)
        return within.view_as(grid).add_(across).add_(residual.view_as(grid)).view_as(features)


class CascadeMixing(nn.Module):
    """Generate dynamic filters, mix with them and with reused ones, and update the content.

    Args:
        embed_dim: size D of the content vectors.
        feature_dim: channels G * Dc of the sampled features.
        num_groups: channel groups G.
        num_points: sampling points P per group.
        out_points: number of rows after spatial mixing, even.
        num_reused: number of earlier stages whose channel filters are reused. If there are any,
            half of the rows of the spatial filter come from the preceding stage.
    """

    static_mixing: type[nn.Module] = StaticMixing  # ablations replace it

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        feature_dim: int = 256,
        num_groups: int = 4,
        num_points: int = 32,
        out_points: int = 128,
        num_reused: int = 0,
    ):
        super().__init__()
        self.group_dim = group_dim = feature_dim // num_groups
        self.num_points, self.out_points = num_points, out_points
        reused_rows = out_points // 2 if num_reused else 0
        self.filter_sizes = [group_dim * group_dim, (out_points - reused_rows) * num_points]

        self.filter_generator = nn.Linear(embed_dim, num_groups * sum(self.filter_sizes))
        self.bias_generator = nn.Linear(embed_dim, num_groups * (group_dim + out_points))
        self.static_mixings = nn.ModuleList(
            self.static_mixing(num_points=num_points, group_dim=group_dim)
            for _ in range(num_reused)
        )
        self.channel_adapter: nn.Module | None = None
        self.spatial_adapter: nn.Module | None = None
        if num_reused:
            sizes = {"embed_dim": embed_dim, "num_groups": num_groups}
            self.channel_adapter = filter_reuse.ChannelFilterAdapter(
                **sizes, group_dim=group_dim, num_reused=num_reused
            )
            self.spatial_adapter = filter_reuse.SpatialFilterAdapter(
                **sizes, num_rows=reused_rows, num_points=num_points
            )
        self.out_proj = nn.Linear(num_groups * out_points * group_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        for layer in (self.filter_generator, self.bias_generator, self.out_proj):
            nn.init.zeros_(layer.weight)  # biases keep torch's default

    def generate_filters(self, content: Tensor) -> DynamicFilters:
        """Content (B, N, D) -> own filters."""
        filters = self.filter_generator(content).view(-1, sum(self.filter_sizes))
        channel, spatial = filters.split(self.filter_sizes, dim=-1)
        return DynamicFilters(
            channel.view(-1, self.group_dim, self.group_dim),
            spatial.view(spatial.shape[0], -1, self.num_points),
        )

    def generate(self, content: Tensor) -> tuple[DynamicFilters, Tensor, Tensor]:
        """Content (B, N, D) -> own filters, channel bias (R, 1, Dc), spatial bias (R, rows, 1)."""
        biases = self.bias_generator(content).view(-1, self.group_dim + self.out_points)
        channel_bias, spatial_bias = biases.split([self.group_dim, self.out_points], dim=-1)
        own = self.generate_filters(content)
        return own, channel_bias[:, None, :], spatial_bias[:, :, None]

    def forward(
        self, features: Tensor, content: Tensor, old: Sequence[DynamicFilters]
    ) -> tuple[Tensor, DynamicFilters]:
        """Mix the sampled features of every query.

        Args:
            features: sampled features (B, N, G, P, Dc).
            content: content vectors (B, N, D).
            old: filters of the ``num_reused`` earlier stages, oldest first.

        Returns:
            content vectors (B, N, D), and the filters that this stage generated.
        """
        own, channel_bias, spatial_bias = self.generate(content)
        features = features.flatten(0, 2)  # (R, P, Dc)
        channel_filters, reused = [(own.channel, channel_bias)], None
        if self.channel_adapter is not None and self.spatial_adapter is not None:
            channel_filters += self.channel_adapter(content, own.channel, [f.channel for f in old])
            reused = self.spatial_adapter(content, own.spatial, old[-1].spatial)
        for static_mixing, channel_filter in zip(self.static_mixings, channel_filters):
            features = recomputed(self.cascade_step, static_mixing, features, *channel_filter)
        update = recomputed(
            self.update, features, *channel_filters[-1], own.spatial, reused, spatial_bias
        )
        return self.norm(content + update.view_as(content)), own

    @staticmethod
    def cascade_step(
        static_mixing: nn.Module,
        features: Tensor,
        channel_filter: Tensor | AdaptedFilter,
        bias: Tensor,
    ) -> Tensor:
        """Mix channels, then apply static mixing: (R, P, Dc) -> (R, P, Dc).

        The input is also the residual: the sampled features in the first step, then the result of
        the step before. The mixed features themselves pass only through the static layers.
        """
        return static_mixing(channel_mixing(features, channel_filter, bias), features)

    def update(
        self,
        features: Tensor,
        channel_filter: Tensor | AdaptedFilter,
        channel_bias: Tensor,
        spatial_filter: Tensor,
        reused: AdaptedFilter | None,
        spatial_bias: Tensor,
    ) -> Tensor:
        """Mix channels a last time, mix points and project: (R, P, Dc) -> (B * N, D)."""
        mixed = channel_mixing(features, channel_filter, channel_bias)
        if reused is not None:
            spatial_filter = torch.cat([spatial_filter, reused.blend()], dim=1)  # (R, rows, P)
        mixed = spatial_mixing(mixed, spatial_filter, spatial_bias)
        return self.out_proj(mixed.view(-1, self.out_proj.in_features))
