"""Cross-stage filter reuse: which old filters a stage gets, and how it adapts them.

Paper section 3.2 and supplement section A. Dynamic filters are expensive to generate, so from the
first reusing stage on (r = 2 as released, counted from 0), stage i also mixes with

- the channel filters of *all* stages r-1 .. i-1, one cascade step each, oldest first;
- the spatial filter of stage i-1 alone, which supplies half of the output rows.

Neither is used unchanged: sigmoid gates computed from the content blend an old filter with the
stage's own.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .backward import Blend, apply


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Make a linear layer whose weight and bias start at zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DynamicFilters(NamedTuple):
    """The filters that a stage generates from the content, for itself and for later stages.

    There are R = B * N * G of each kind: every query has its own for each channel group.
    """

    channel: Tensor  # (R, Dc, Dc), input channel x output channel
    spatial: Tensor  # (R, rows, P), output row x sampling point


def reused_stages(stage: int, first_reuse_stage: int) -> range:
    """Return the indices of the stages whose filters ``stage`` reuses, oldest first."""
    return range(first_reuse_stage - 1, stage)  # empty before the first reusing stage


class AdaptedFilter(NamedTuple):
    """An old filter, and the gates that blend it with the stage's own.

    Blending waits until the filter is used, because a blended filter takes more memory than gates.
    """

    own: Tensor  # (R, rows, columns)
    old: Tensor  # (R, rows, columns)
    row_gate: Tensor  # (R, rows)
    column_gate: Tensor  # (R, columns)

    def blend(self) -> Tensor:
        """Gate ``old`` against ``own``, first row by row, then column by column.

        With gates a for rows and b for columns, the two steps X = old a + own (1 - a) and
        X b + own (1 - b) collapse to own + a b^T (old - own).
        """
        return apply(Blend, *self)


class ChannelFilterAdapter(nn.Module):
    """Adapt the channel filters of earlier stages, and compute a bias for each from the content.

    Args:
        embed_dim: size D of the content vectors.
        num_groups: channel groups G.
        group_dim: channels Dc per group.
        num_reused: number of earlier stages whose filters are reused.
    """

    def __init__(self, *, embed_dim: int, num_groups: int, group_dim: int, num_reused: int):
        super().__init__()
        self.num_groups, self.group_dim, self.num_reused = num_groups, group_dim, num_reused
        # sigmoid(0): a quarter of the old filter
        self.gates = zero_linear(embed_dim, num_groups * group_dim * 2 * num_reused)
        self.biases = nn.Linear(embed_dim, num_groups * num_reused * group_dim)
        nn.init.zeros_(self.biases.weight)

    def forward(
        self, content: Tensor, own: Tensor, old: Sequence[Tensor]
    ) -> list[tuple[AdaptedFilter, Tensor]]:
        """Adapt each old filter to the content.

        Args:
            content: (B, N, D).
            own: the stage's own filters (R, Dc, Dc).
            old: filters (R, Dc, Dc) of earlier stages, oldest first.

        Returns:
            for each of ``old`` the adapted filters (R, Dc, Dc) and their biases (R, 1, Dc).
        """
        gates = self.gates(content).sigmoid().view(-1, self.group_dim, 2, self.num_reused)
        biases = self.biases(content).view(-1, self.num_reused, 1, self.group_dim)
        return [
            (AdaptedFilter(own, old_filter, gates[:, :, 1, t], gates[:, :, 0, t]), biases[:, t])
            for t, old_filter in enumerate(old)
        ]


class SpatialFilterAdapter(nn.Module):
    """Adapt the first rows of the preceding stage's spatial filter.

    Args:
        embed_dim: size D of the content vectors.
        num_groups: channel groups G.
        num_rows: number of rows that are reused.
        num_points: sampling points P per group, in this stage and the preceding one.
    """

    def __init__(self, *, embed_dim: int, num_groups: int, num_rows: int, num_points: int):
        super().__init__()
        self.num_rows, self.num_points = num_rows, num_points
        self.row_gate = zero_linear(embed_dim, num_groups * num_rows)
        self.column_gate = zero_linear(embed_dim, num_groups * num_points)

    def forward(self, content: Tensor, own: Tensor, old: Tensor) -> AdaptedFilter:
        """Adapt the first rows of the old filters to the content.

        Args:
            content: (B, N, D).
            own: rows (R, num_rows, P) that the stage generated itself.
            old: filters of the preceding stage, (R, num_rows or more, P).
        """
        row_gate = self.row_gate(content).sigmoid().view(-1, self.num_rows)
        column_gate = self.column_gate(content).sigmoid().view(-1, self.num_points)
        return AdaptedFilter(own, old[:, : self.num_rows], row_gate, column_gate)
