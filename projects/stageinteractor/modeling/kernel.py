"""Feature sampling on CUDA by one kernel, which reads the corners of a point in every level once.

Same samples as those of ``FeatureMaps`` and ``FeatureTable``. Triton compiles the kernels when they
first run. Tables on a CPU work in Triton's interpreter alone, by which the tests run the kernels
where there is no GPU.
"""

from functools import lru_cache
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .pyramid import FeatureTable
from .sampling import level_weights
from .targets import send

POINTS_PER_PROGRAM = 16


@triton.jit
def load_points(points, count, groups, points_of_image, points_of_group, BLOCK: tl.constexpr):
    """Indices of a program's points, which of them exist, image, group, x and y in pixels."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = point < count
    image = (point // points_of_image).to(tl.int64)
    group = point // points_of_group % groups
    x = tl.load(points + 3 * point, mask=exists, other=0.0)
    y = tl.load(points + 3 * point + 1, mask=exists, other=0.0)
    return point, exists, image, group, x, y


@triton.jit
def load_level(levels, level):
    """Width, height, first cell and stride, all integers."""
    entry = levels + 4 * level
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def linear_weight(position, upper: tl.constexpr, size):
    """Of the lower or the upper of the two cells around a position in cells along one axis.

    Returns the cell, its weight, how the weight changes with the position, and whether it exists.
    """
    low = tl.floor(position)
    cell = low + upper
    inside = (cell >= 0) & (cell < size)
    slope = (2 * upper - 1) * inside.to(position.dtype)
    # Outside the weight is 0, but that of a position that is no number stays none.
    weight = (1 - upper) * inside.to(position.dtype) + (position - low) * slope
    return tl.where(inside, cell, 0.0).to(tl.int64), weight, slope, inside


@triton.jit
def sample_kernel(
    rows, points, shares, levels, samples, count, cells, groups, points_of_image, points_of_group,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Every program samples BLOCK points; arguments are those of ``SampleRows``."""
    point, exists, image, group, px, py = load_points(
        points, count, groups, points_of_image, points_of_group, BLOCK
    )
    channel = tl.arange(0, PADDED)[None, :]
    used = exists[:, None] & (channel < CHANNELS)
    sample = tl.zeros([BLOCK, PADDED], rows.dtype.element_ty)
    for level in tl.static_range(LEVELS):
        width, height, first, stride = load_level(levels, level)
        share = tl.load(shares + LEVELS * point + level, mask=exists, other=0.0)
        for upper_y in tl.static_range(2):
            line, y_weight, _, inside_y = linear_weight(py / stride - 0.5, upper_y, height)
            for upper_x in tl.static_range(2):
                column, x_weight, _, inside_x = linear_weight(px / stride - 0.5, upper_x, width)
                row = (image * cells + first + line * width + column) * groups + group
                feature = tl.load(
                    rows + row[:, None] * CHANNELS + channel,
                    mask=used & (inside_x & inside_y)[:, None], other=0.0,
                )
                sample += (share * y_weight * x_weight)[:, None] * feature
    tl.store(samples + point[:, None] * CHANNELS + channel, sample, mask=used)


@triton.jit
def gradient_kernel(
    rows, points, shares, levels, grad, rows_grad, points_grad, shares_grad,
    count, cells, groups, points_of_image, points_of_group,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Adds to ``rows_grad``, if that is wanted, and writes the other two gradients."""
    point, exists, image, group, px, py = load_points(
        points, count, groups, points_of_image, points_of_group, BLOCK
    )
    channel = tl.arange(0, PADDED)[None, :]
    used = exists[:, None] & (channel < CHANNELS)
    sample_grad = tl.load(grad + point[:, None] * CHANNELS + channel, mask=used, other=0.0)
    px_grad, py_grad = tl.zeros_like(px), tl.zeros_like(py)
    for level in tl.static_range(LEVELS):
        width, height, first, stride = load_level(levels, level)
        share = tl.load(shares + LEVELS * point + level, mask=exists, other=0.0)
        share_grad = tl.zeros_like(share)
        for upper_y in tl.static_range(2):
            line, y_weight, y_slope, inside_y = linear_weight(py / stride - 0.5, upper_y, height)
            for upper_x in tl.static_range(2):
                column, x_weight, x_slope, inside_x = linear_weight(
                    px / stride - 0.5, upper_x, width
                )
                row = (image * cells + first + line * width + column) * groups + group
                place = row[:, None] * CHANNELS + channel
                mask = used & (inside_x & inside_y)[:, None]
                feature = tl.load(rows + place, mask=mask, other=0.0)
                corner_grad = tl.sum(sample_grad * feature, axis=1)
                share_grad += y_weight * x_weight * corner_grad
                px_grad += share * y_weight * x_slope / stride * corner_grad
                py_grad += share * y_slope * x_weight / stride * corner_grad
                if rows_grad is not None:
                    row_grad = (share * y_weight * x_weight)[:, None] * sample_grad
                    tl.atomic_add(rows_grad + place, row_grad, mask=mask, sem="relaxed")
        tl.store(shares_grad + LEVELS * point + level, share_grad, mask=exists)
    tl.store(points_grad + 3 * point, px_grad, mask=exists)
    tl.store(points_grad + 3 * point + 1, py_grad, mask=exists)


@lru_cache(maxsize=4096)
def level_table(
    sizes: Tuple[Tuple[int, int], ...], strides: Tuple[int, ...], device: torch.device
) -> Tensor:
    """(L, 4): width, height, first cell and stride of each level, in int32."""
    lines, first = [], 0
    for (height, width), stride in zip(sizes, strides):
        lines.append((width, height, first, stride))
        first += height * width
    return send(torch.tensor(lines, dtype=torch.int32), device)


def launch(kernel, table: FeatureTable, points: Tensor, *tensors: Optional[Tensor]):
    """Run a kernel for all points of a table; ``tensors`` are its further ones."""
    batch, queries, groups, points_of_group, _ = points.shape
    channels, count = table.rows.shape[1], points[..., 0].numel()
    levels = level_table(table.sizes, table.strides, points.device)
    with torch.cuda.device_of(points):  # Triton's is the current one
        kernel[(triton.cdiv(count, POINTS_PER_PROGRAM),)](
            table.rows, points, tensors[0], levels, *tensors[1:],
            count, len(table.rows) // (batch * groups), groups,
            queries * groups * points_of_group, points_of_group,
            CHANNELS=channels, PADDED=triton.next_power_of_2(channels), LEVELS=len(levels),
            BLOCK=POINTS_PER_PROGRAM,
        )


class SampleRows(torch.autograd.Function):
    """(rows, points, shares of levels) -> (samples, the rows for the next stage).

    As with ``RowGradients``, all stages add to one gradient of the rows.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, points: Tensor, shares: Tensor, table: FeatureTable):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, points, shares)
        ctx.table = table._replace(rows=None)
        samples = rows.new_empty(*points.shape[:-1], rows.shape[1])
        launch(sample_kernel, table, points, shares, samples)
        return samples, rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Optional[Tensor], rows_grad: Optional[Tensor]):
        if grad is None:
            return rows_grad, None, None, None
        rows, points, shares = ctx.saved_tensors
        if rows_grad is None and ctx.needs_input_grad[0]:
            rows_grad = torch.zeros_like(rows)
        points_grad, shares_grad = torch.zeros_like(points), torch.empty_like(shares)
        launch(
            gradient_kernel, ctx.table._replace(rows=rows), points, shares,
            grad.contiguous(), rows_grad, points_grad, shares_grad,
        )
        return rows_grad, points_grad, shares_grad, None


class KernelTable(FeatureTable):
    """A table that the kernel samples."""

    @torch.compiler.disable  # changes a gradient in place
    def sample(self, points: Tensor) -> Tuple[Tensor, "KernelTable"]:
        """Points (B, N, G, P, 3) -> samples (B, N, G, P, Dc), and the table for the next stage."""
        points = points.contiguous()
        shares = level_weights(points[..., 2], self.strides).contiguous()  # (B, N, G, P, L)
        samples, rows = SampleRows.apply(self.rows, points, shares, self)
        return samples, self._replace(rows=rows)
