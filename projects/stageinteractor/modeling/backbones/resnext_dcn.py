"""ResNeXt stages with torchvision's deformable convolutions, which also run on a CPU."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock, CNNBlockBase, ResNet
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(Conv2d):
    """Deformable convolution (Dai et al., ICCV 2017): each kernel element reads at its own offset.

    An offset is (dy, dx) in cells of the input, the same for all channels, and starts at zero.
    There is no modulation.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        num_offsets = 2 * math.prod(self.kernel_size)
        self.offset = nn.Conv2d(
            self.in_channels, num_offsets, self.kernel_size, self.stride, self.padding
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        x = deform_conv2d(x, self.offset(x), self.weight, self.bias, self.stride, self.padding)
        return x if self.norm is None else self.norm(x)


class DeformableBottleneckBlock(BottleneckBlock):
    """Detectron2's bottleneck block with a deformable 3x3 convolution, whatever its stride."""

    conv2: Conv2d

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any):
        super().__init__(in_channels, out_channels, **kwargs)
        plain = self.conv2
        self.conv2 = DeformableConv2d(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,
            plain.stride,
            plain.padding,
            groups=plain.groups,
            bias=False,
            norm=plain.norm,
        )
        weight_init.c2_msra_fill(self.conv2)


def resnext_dcn_stages(
    *,
    blocks_per_stage: Sequence[int],
    num_groups: int,
    width_per_group: int,
    norm: Callable[[int], nn.Module],
) -> list[list[CNNBlockBase]]:
    """Make res2 to res5 of a ResNeXt for Detectron2's ``ResNet``, deformable from res3 on.

    Args:
        blocks_per_stage: (3, 4, 23, 3) for a ResNeXt-101.
        num_groups, width_per_group: 32 and 4 for a ResNeXt 32x4d.
        norm: function that makes the norm for a number of channels.
    """
    return [
        ResNet.make_stage(
            DeformableBottleneckBlock if index else BottleneckBlock,
            num_blocks,
            in_channels=128 << index if index else 64,
            bottleneck_channels=num_groups * width_per_group << index,
            out_channels=256 << index,
            num_groups=num_groups,
            stride_per_block=[2 if index else 1] + [1] * (num_blocks - 1),
            norm=norm,
        )
        for index, num_blocks in enumerate(blocks_per_stage)
    ]
