"""The pyramid as one table of cells, made once and sampled by all stages.

A single gather reads the cells around a point in all levels, where ``FeatureMaps`` takes one
``grid_sample`` per level. On a CPU that is faster.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..backward import apply
from ..sampling import level_weights


class SharedGradient:
    """The gradient of a table: one buffer to which every stage adds its share.

    Autograd alone would fill one table of zeros per stage and add them all up.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._backward_pass = -1  # in which the sum was begun

    def buffer(self, rows: Tensor) -> Tensor:
        """Return the sum of this backward pass, shaped like the rows, to be added to in place."""
        current = torch._C._current_graph_task_id()
        # A backward pass that failed, or did not reach the maps, leaves its sum behind.
        if self._sum is None or self._backward_pass != current:
            self._sum, self._backward_pass = torch.zeros_like(rows), current
        return self._sum

    def take(self) -> Tensor | None:
        """Remove and return the sum of this backward pass; None if nothing was added to it."""
        total, self._sum = self._sum, None
        return total if self._backward_pass == torch._C._current_graph_task_id() else None


class MakeRows(Function):
    """Maps (B, G * Dc, H_l, W_l) -> rows (B * S * G, Dc) of a ``FeatureTable``.

    Whatever samples the rows adds their gradient to ``shared`` and gives None to autograd.
    """

    @staticmethod
    def forward(num_groups: int, shared: SharedGradient, *maps: Tensor) -> Tensor:
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)  # (B, S, D)
        # Positions need full precision, and weights must have the precision of the rows.
        cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
        return cells.view(-1, cells.shape[-1] // num_groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.shared, *maps = inputs
        ctx.set_materialize_grads(False)
        ctx.maps = [(level.shape, level.dtype) for level in maps]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        grad = ctx.shared.take()
        if grad is None:
            return None, None, *(None for _ in ctx.maps)
        found = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.maps]
        cells = grad.view(len(found[0]), -1, found[0].shape[1])  # (B, S, D)
        counts = [shape[2:].numel() for shape, _ in ctx.maps]
        for level, level_cells in zip(found, cells.split(counts, dim=1)):
            # One image at a time: torch transposes a matrix three times as fast as a batch of them.
            for image, image_cells in zip(level.flatten(2), level_cells):
                image.copy_(image_cells.t())
        return None, None, *found


class AddRowGradients(Function):
    """Identity of the samples whose backward pass adds the gradient of the rows to ``shared``."""

    @staticmethod
    def forward(
        ctx: Any,
        samples: Tensor,
        rows: Tensor,
        indices: Tensor,
        weights: Tensor,
        shared: SharedGradient,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, indices, weights)
        ctx.shared = shared
        return samples.view_as(samples)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is not None and ctx.needs_input_grad[1]:
            rows, *corners = ctx.saved_tensors
            rows_grad = ctx.shared.buffer(rows)
            # Corner by corner, so that what is added stays in the processor's cache.
            for index, weight in zip(*(saved.unbind(1) for saved in corners)):
                rows_grad.index_add_(0, index, weight[:, None] * grad)
        return grad, None, None, None, None


# Compiled code may not change a gradient in place.
add_row_gradients = torch.compiler.disable(AddRowGradients.apply)


class FeatureTable(NamedTuple):
    """A table with one row per image, cell and group, in this order.

    The S cells are those of all levels, finest level first, row by row of each map.
    """

    rows: Tensor  # (B * S * G, Dc), at least float32
    sizes: tuple[tuple[int, int], ...]  # H_l, W_l
    strides: tuple[int, ...]  # pixels of the network input per cell
    gradient: SharedGradient

    @classmethod
    def from_maps(
        cls, maps: Sequence[Tensor], strides: Sequence[int], num_groups: int
    ) -> "FeatureTable":
        """Make the table of maps (B, G * Dc, H_l, W_l), finest first."""
        gradient = SharedGradient()
        rows = apply(MakeRows, num_groups, gradient, *maps)
        sizes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        return cls(rows, sizes, tuple(strides), gradient)

    def sample(self, points: Tensor) -> Tensor:
        """Points (B, N, G, P, 3) -> features (B, N, G, P, Dc)."""
        indices, weights = self.corners(points)
        rows = self.rows.detach()
        samples = F.embedding_bag(indices, rows, per_sample_weights=weights, mode="sum")
        if self.rows.requires_grad:
            samples = add_row_gradients(
                samples, self.rows, indices, weights.detach(), self.gradient
            )
        return samples.view(*points.shape[:-1], -1)

    def corners(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Find the rows that make up the feature at each point, and the weight of each.

        Args:
            points: (B, N, G, P, 3), x and y in pixels of the padded network input, scale z.

        Returns:
            indices of rows and their weights, both (B * N * G * P, L * 4): the four corners around
            the point in each level. A weight is the bilinear one times the level's share, and zero
            outside the map.
        """
        batch, _, groups, _, _ = points.shape
        new = points.new_tensor
        stride = new(self.strides)
        xy = points[..., None, :2] / stride[:, None] - 0.5  # cells from the first cell's centre
        low = xy.detach().floor()
        share = xy - low  # (B, N, G, P, L, 2)
        corner = low[..., None] + new([0, 1])  # (B, N, G, P, L, 2, 2): x or y, lower or upper
        extent = new([(width, height) for height, width in self.sizes])[..., None]  # (L, 2, 1)
        inside = (corner >= 0) & (corner < extent)
        weight = torch.stack([1 - share, share], dim=-1) * inside
        x_weight, y_weight = weight.unbind(-2)  # (B, N, G, P, L, 2)
        level = level_weights(points[..., 2], self.strides)  # (B, N, G, P, L)
        weights = (level[..., None] * y_weight)[..., None] * x_weight[..., None, :]

        cell = torch.where(inside, corner, 0).long()
        x, y = cell.unbind(-2)
        cells = [height * width for height, width in self.sizes]
        width = cell.new_tensor([width for _, width in self.sizes])[:, None]
        first = cell.new_tensor([sum(cells[:level]) for level in range(len(cells))])[:, None]
        image = torch.arange(batch, device=cell.device).view(-1, 1, 1, 1, 1, 1) * sum(cells)
        group = torch.arange(groups, device=cell.device).view(-1, 1, 1, 1)
        y = (y * width + (image + first)) * groups + group
        indices = y[..., None] + (x * groups)[..., None, :]  # (B, N, G, P, L, 2, 2)
        return indices.flatten(-3).flatten(0, 3), weights.flatten(-3).flatten(0, 3)
