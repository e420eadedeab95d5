"""Cross-stage filter reuse: which old filters a stage is offered, and how it adapts them.

Paper section 3.2 and supplement section A. Dynamic filters are expensive to generate, so from the
first reusing stage on (r = 2 as released, counted from 0) a stage also mixes with

- the channel filters of *all* stages r-1 .. i-1, one cascade step each, oldest first;
- the spatial filter of stage i-1 alone, which supplies half of the output rows.

Neither is used as it is: sigmoid gates computed from the content blend an old filter with the
stage's own.
"""

from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DynamicFilters(NamedTuple):
    """What a stage generates from the content, for itself and for later stages.

    R = B * N * G rows: every query and channel group has filters of its own.
    """

    channel: Tensor  # (R, Dc, Dc), input channel x output channel
    spatial: Tensor  # (R, rows, P), output row x sampling point


def reused_stages(stage: int, first_reuse_stage: int) -> range:
    """Indices of the stages whose filters ``stage`` is offered, oldest first."""
    return range(first_reuse_stage - 1, stage) if stage >= first_reuse_stage else range(0)


class Blend(torch.autograd.Function):
    """own + a b^T (old - own), whose gradients take fewer passes over the filters than autograd's.

    Filters (R, rows, columns), gates a (R, rows) and b (R, columns) -> (R, rows, columns).
    """

    @staticmethod
    def forward(own: Tensor, old: Tensor, row_gate: Tensor, column_gate: Tensor) -> Tensor:
        return torch.lerp(own, old, row_gate[:, :, None] * column_gate[:, None, :])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        own, old, row_gate, column_gate = ctx.saved_tensors
        gate_grad = (old - own).mul_(grad)
        row_grad = (gate_grad @ column_gate[:, :, None])[:, :, 0]
        column_grad = (row_gate[:, None, :] @ gate_grad)[:, 0]
        old_grad = (row_gate[:, :, None] * column_gate[:, None, :]).mul_(grad)
        return grad - old_grad, old_grad, row_grad, column_grad


class AdaptedFilter(NamedTuple):
    """An old filter and what blends it with the stage's own.

    It is blended where it is used, as a blended filter is larger than its gates.
    """

    own: Tensor  # (R, rows, columns)
    old: Tensor  # (R, rows, columns)
    row_gate: Tensor  # (R, rows)
    column_gate: Tensor  # (R, columns)

    def blend(self) -> Tensor:
        """Gate ``old`` against ``own`` first row by row, then column by column.

        The two steps X = old a + own (1 - a) and X b + own (1 - b), with gates a for rows and b for
        columns, collapse to own + a b^T (old - own).
        """
        # Without gradients, a trace of the model shows the operations.
        return (Blend.apply if torch.is_grad_enabled() else Blend.forward)(*self)


class ChannelFilterAdapter(nn.Module):
    """Adapt the channel filters of earlier stages, and give each a bias computed from the content.

    Args:
        embed_dim: size D of the content vectors.
        num_groups: channel groups G.
        group_dim: channels Dc a group.
        num_reused: how many earlier stages' filters the stage is offered.
    """

    def __init__(self, *, embed_dim: int, num_groups: int, group_dim: int, num_reused: int):
        super().__init__()
        self.num_groups, self.group_dim, self.num_reused = num_groups, group_dim, num_reused
        self.gates = nn.Linear(embed_dim, num_groups * group_dim * 2 * num_reused)
        self.biases = nn.Linear(embed_dim, num_groups * num_reused * group_dim)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)  # sigmoid(0): a quarter of the old filter
        nn.init.zeros_(self.biases.weight)

    def forward(
        self, content: Tensor, own: Tensor, old: List[Tensor]
    ) -> List[Tuple[AdaptedFilter, Tensor]]:
        """Content (B, N, D), own filter and old filters (R, Dc, Dc) -> [(adapted, bias), ...].

        Adapted filters are (R, Dc, Dc), biases (R, 1, Dc), in the order of ``old``.
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
        num_rows: rows that are reused.
        num_points: sampling points P a group, in this stage and the preceding one.
    """

    def __init__(self, *, embed_dim: int, num_groups: int, num_rows: int, num_points: int):
        super().__init__()
        self.num_rows, self.num_points = num_rows, num_points
        self.row_gate = nn.Linear(embed_dim, num_groups * num_rows)
        self.column_gate = nn.Linear(embed_dim, num_groups * num_points)
        for gate in (self.row_gate, self.column_gate):
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    def forward(self, content: Tensor, own: Tensor, old: Tensor) -> AdaptedFilter:
        """Content (B, N, D), own (R, num_rows, P) and old (R, >= num_rows, P) -> adapted rows."""
        row_gate = self.row_gate(content).sigmoid().view(-1, self.num_rows)
        column_gate = self.column_gate(content).sigmoid().view(-1, self.num_points)
        return AdaptedFilter(own, old[:, : self.num_rows], row_gate, column_gate)
