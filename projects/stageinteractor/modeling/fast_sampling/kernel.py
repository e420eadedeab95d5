"""Triton kernels that sample a ``FeatureTable`` on CUDA and compute its gradients.

One program of a kernel reads the corners of its points in every level once. The samples equal those
of ``FeatureMaps`` and ``FeatureTable``. Triton compiles a kernel when it first runs. On a CPU the
kernels work only in Triton's interpreter, which the tests use where there is no GPU.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..sampling import level_weights
from ..transfer import send
from .table import FeatureTable, SharedGradient

POINTS_PER_PROGRAM = 16


@triton.jit
def load_points(points, count, groups, points_of_image, points_of_group, BLOCK: tl.constexpr):
    """Load a program's points: index, whether it exists, image, group, x and y in pixels."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = point < count
    image = (point // points_of_image).to(tl.int64)
    group = point // points_of_group % groups
    x = tl.load(points + 3 * point, mask=exists, other=0.0)
    y = tl.load(points + 3 * point + 1, mask=exists, other=0.0)
    return point, exists, image, group, x, y


@triton.jit
def load_level(levels, level):
    """Load width, height, first cell and stride of a level, all integers."""
    entry = levels + 4 * level
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def linear_weight(position, upper: tl.constexpr, size):
    """Interpolate along one axis: the lower or the upper of the two cells around a position.

    Returns the cell, its weight, the derivative of the weight by the position, and whether the cell
    exists.
    """
    low = tl.floor(position)
    cell = low + upper
    inside = (cell >= 0) & (cell < size)
    slope = (2 * upper - 1) * inside.to(position.dtype)
    # The weight is 0 outside the map, but NaN where the position is NaN.
    weight = (1 - upper) * inside.to(position.dtype) + (position - low) * slope
    return tl.where(inside, cell, 0.0).to(tl.int64), weight, slope, inside


@triton.jit
def sample_kernel(
    rows, points, shares, levels, samples, count, cells, groups, points_of_image, points_of_group,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sample BLOCK points per program."""
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
    """Add to ``rows_grad`` unless it is None, and write the other two gradients."""
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
    sizes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return width, height, first cell and stride of each level: (L, 4), int32."""
    lines, first = [], 0
    for (height, width), stride in zip(sizes, strides):
        lines.append((width, height, first, stride))
        first += height * width
    return send(torch.tensor(lines, dtype=torch.int32), device)


def launch(
    kernel: Any, rows: Tensor, points: Tensor, shares: Tensor, levels: Tensor,
    *tensors: Tensor | None,
) -> None:
    """Run a kernel for all points; ``tensors`` are its own further arguments."""
    batch, queries, groups, points_of_group, _ = points.shape
    channels, count = rows.shape[1], points[..., 0].numel()
    with torch.cuda.device_of(points):  # Triton launches on the current device
        kernel[(triton.cdiv(count, POINTS_PER_PROGRAM),)](
            rows, points, shares, levels, *tensors,
            count, len(rows) // (batch * groups), groups,
            queries * groups * points_of_group, points_of_group,
            CHANNELS=channels, PADDED=triton.next_power_of_2(channels), LEVELS=len(levels),
            BLOCK=POINTS_PER_PROGRAM,
        )


class SampleRows(Function):
    """Rows of a table, points and shares of levels -> samples.

    As with ``AddRowGradients``, the gradient of the rows is added to ``shared``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        points: Tensor,
        shares: Tensor,
        levels: Tensor,
        shared: SharedGradient,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, points, shares, levels)
        ctx.shared = shared
        samples = rows.new_empty(*points.shape[:-1], rows.shape[1])
        launch(sample_kernel, rows, points, shares, levels, samples)
        return samples

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        rows, points, shares, levels = ctx.saved_tensors
        rows_grad = ctx.shared.buffer(rows) if ctx.needs_input_grad[0] else None
        points_grad, shares_grad = torch.zeros_like(points), torch.empty_like(shares)
        launch(
            gradient_kernel, rows, points, shares, levels,
            grad.contiguous(), rows_grad, points_grad, shares_grad,
        )
        return None, points_grad, shares_grad, None, None


class KernelTable(FeatureTable):
    """A table that ``sample_kernel`` samples."""

    @torch.compiler.disable  # changes a gradient in place
    def sample(self, points: Tensor) -> Tensor:
        """Points (B, N, G, P, 3) -> features (B, N, G, P, Dc)."""
        points = points.contiguous()
        shares = level_weights(points[..., 2], self.strides).contiguous()  # (B, N, G, P, L)
        levels = level_table(self.sizes, self.strides, points.device)
        return SampleRows.apply(self.rows, points, shares, levels, self.gradient)
