"""The pyramid as the stages sample it: plain maps, or one table made once for all stages.

Both have ``sample(points)`` with the same results. Maps take one ``grid_sample`` a level: that runs
everywhere, is easy to export, and is what tests compare the table with. The table takes one gather
for all levels, which is faster on a CPU, as all stages share the table; on CUDA, where Triton
works, the kernel of ``kernel.py`` samples it.
"""

import logging
from functools import lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sampling import level_weights, sample_features


class StackCells(torch.autograd.Function):
    """Maps (B, D, H_l, W_l) -> the cells of all levels (B, S, D), level by level, line by line."""

    @staticmethod
    def forward(*maps: Tensor) -> Tensor:
        return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shapes = [level.shape for level in inputs]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        counts = [shape[2:].numel() for shape in ctx.shapes]
        found = [grad.new_empty(shape) for shape in ctx.shapes]
        for level, cells in zip(found, grad.split(counts, dim=1)):
            # One image at a time: torch transposes matrices three times as fast as batches of them.
            for image, image_cells in zip(level.flatten(2), cells):
                image.copy_(image_cells.t())
        return tuple(found)


class FeatureMaps(NamedTuple):
    """The maps (B, G * Dc, H_l, W_l), finest first, and how many pixels of the input a cell has."""

    maps: List[Tensor]
    strides: Sequence[int]
    num_groups: int

    def sample(self, points: Tensor) -> Tuple[Tensor, "FeatureMaps"]:
        """Points (B, N, G, P, 3) -> samples (B, N, G, P, Dc), and these maps again."""
        return sample_features(self.maps, points, self.strides), self


class FeatureTable(NamedTuple):
    """A table with a row for every image, cell and group, in this order.

    The S cells are those of all levels, finest first, line by line.
    """

    rows: Tensor  # (B * S * G, Dc), at least float32
    sizes: Tuple[Tuple[int, int], ...]  # H_l, W_l
    strides: Tuple[int, ...]  # pixels of the network input a cell

    @classmethod
    def from_maps(
        cls, maps: Sequence[Tensor], strides: Sequence[int], num_groups: int
    ) -> "FeatureTable":
        """Of maps (B, G * Dc, H_l, W_l), finest first."""
        stack = StackCells.apply if torch.is_grad_enabled() else StackCells.forward
        cells = stack(*maps)  # (B, S, D)
        # Positions need full precision, and weights must have the precision of the rows.
        cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
        rows = cells.view(-1, cells.shape[-1] // num_groups)
        return cls(rows, tuple(tuple(level.shape[-2:]) for level in maps), tuple(strides))

    def sample(self, points: Tensor) -> Tuple[Tensor, "FeatureTable"]:
        """Points (B, N, G, P, 3) -> samples (B, N, G, P, Dc), and the table for the next stage."""
        indices, weights = self.corners(points)
        rows = self.rows
        sampled = F.embedding_bag(indices, rows.detach(), per_sample_weights=weights, mode="sum")
        if rows.requires_grad:
            sampled, rows = give_gradients(sampled, rows, indices, weights.detach())
        return sampled.view(*points.shape[:-1], -1), self._replace(rows=rows)

    def corners(self, points: Tensor) -> Tuple[Tensor, Tensor]:
        """Which rows make up the feature at each point, and how much of each.

        Args:
            points: (B, N, G, P, 3), x and y in pixels of the padded network input, scale z.

        Returns:
            indices of rows and their weights, both (B * N * G * P, L * 4): the four corners around
            the point in each level. A weight is bilinear times the level's share, zero outside.
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


class RowGradients(torch.autograd.Function):
    """Identity of (sampled, rows) that gives the rows their gradient.

    The rows go on to the next stage, whose gradient comes back in a buffer that each stage adds its
    share to. Else every stage would fill a table of zeros, and these would be summed.
    """

    @staticmethod
    def forward(ctx, sampled: Tensor, rows: Tensor, indices: Tensor, weights: Tensor):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices, weights)
        ctx.shape = rows.shape
        return sampled.view_as(sampled), rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Optional[Tensor], rows_grad: Optional[Tensor]):
        if grad is not None and ctx.needs_input_grad[1]:
            if rows_grad is None:
                rows_grad = grad.new_zeros(ctx.shape)
            # Corner by corner: what is added stays in the processor's cache.
            for index, weight in zip(*(saved.unbind(1) for saved in ctx.saved_tensors)):
                rows_grad.index_add_(0, index, weight[:, None] * grad)
        return grad, rows_grad, None, None


# Compiled code may not change a gradient in place.
give_gradients = torch.compiler.disable(RowGradients.apply)


@lru_cache(maxsize=None)
def working_kernel(device: torch.device) -> Optional[type]:
    """``KernelTable`` if it samples on the device; else None, and a warning says why."""
    try:
        from .kernel import KernelTable

        one_cell = KernelTable.from_maps([torch.zeros(1, 1, 1, 1, device=device)], (1,), 1)
        one_cell.sample(torch.zeros(1, 1, 1, 1, 3, device=device))
    # Triton may be absent, may know nothing of the device, or may find no C compiler.
    except Exception as error:
        logging.getLogger(__name__).warning(
            "Triton does not work on %s, so features are sampled by grid_sample, which is slower: "
            "%s: %s", device, type(error).__name__, str(error).strip().partition("\n")[0],
        )
        return None
    return KernelTable


def make_pyramid(
    maps: List[Tensor], strides: Sequence[int], num_groups: int
) -> Union[FeatureMaps, FeatureTable]:
    """The fastest form on the device of the maps (B, G * Dc, H_l, W_l), finest first."""
    device = maps[0].device
    kind = None
    if device.type == "cpu":
        kind = FeatureTable
    elif device.type == "cuda":
        kind = working_kernel(device)
    if kind is None:
        return FeatureMaps(maps, strides, num_groups)
    return kind.from_maps(maps, strides, num_groups)
