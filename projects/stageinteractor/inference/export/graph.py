"""The whole detector as one function of tensors, from pixels to boxes, which can be exported."""

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from ...errors import UserError
from ...modeling import StageInteractor
from ...modeling.sampling import FeatureMaps

INPUTS = ("images", "image_sizes", "output_sizes")
OUTPUTS = ("boxes", "scores", "classes")


class DetectionGraph(nn.Module):
    """Normalisation, model and post-processing of a batch of images.

    Args:
        model: changed in place: it samples plain feature maps from now on, and in half precision
            the weights of its convolutions and linear layers are rounded to it.
        half: compute in float16 what keeps its accuracy there, as training in mixed precision does.
            Positions and scores stay in float32.

    Raises:
        UserError: the model is not one of ours, or its detections need more than its graph has.
    """

    def __init__(self, model: nn.Module, *, half: bool = False):
        super().__init__()
        if not isinstance(model, StageInteractor):
            raise UserError(
                f"{type(model).__name__} cannot be exported: give the config of a StageInteractor "
                "or an AdaMixer"
            )
        if type(model).detect is not StageInteractor.detect:
            raise UserError(
                f"{type(model).__name__} cannot be exported: its detections are not those of the "
                "last stage alone"
            )
        if model.size_divisibility < 1 or model.size_divisibility % max(model.decoder.strides):
            raise UserError(
                f"model.size_divisibility={model.size_divisibility} cannot be exported: it has to "
                f"be a multiple of {max(model.decoder.strides)}"
            )
        self.model, self.half_precision = model.eval(), half
        model.decoder.make_pyramid = FeatureMaps
        for module in model.modules():
            if type(module) is Conv2dSame:
                module.__class__ = FixedSameConv2d
            if half and isinstance(module, (nn.Conv2d, nn.Linear)):
                module.half()
            if half and isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
                module.register_forward_pre_hook(to_float32)  # ONNX has no mixed ones

    def forward(
        self, images: Tensor, image_sizes: Tensor, output_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (B, 3, H, W), uint8, in the model's order of channels, of any H and W. What is
                beyond an image's own size does not matter.
            image_sizes: (B, 2) height and width of each image, pixels, int64.
            output_sizes: (B, 2) height and width in whose pixels boxes are wanted, int64.

        Returns:
            boxes (B, K, 4), corners in pixels of the output size, clipped to it; scores (B, K)
            between 0 and 1, falling; classes (B, K), int64. A detection that does not count, as its
            box is empty or not finite, has 0 for its score and its corners.
        """
        with torch.autocast(images.device.type, torch.float16, enabled=self.half_precision):
            outputs = self.model.decode_padded(self.preprocess(images, image_sizes), image_sizes)
        boxes, scores, classes = self.model.select(outputs.logits[-1], outputs.xyzr[-1])
        scale = (output_sizes / image_sizes).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4)
        limit = output_sizes.float().flip(1).repeat(1, 2)[:, None]
        clipped = torch.minimum((boxes * scale).clamp(min=0), limit)
        counts = (clipped[..., 2:] > clipped[..., :2]).all(-1) & boxes.isfinite().all(-1)
        return clipped.where(counts[..., None], 0), scores * counts, classes

    def preprocess(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Normalise, and pad each image with zeros: (B, 3, H, W) -> (B, 3, H', W').

        H' and W' are the next multiples of ``size_divisibility``.
        """
        normalized = (images.float() - self.model.pixel_mean) / self.model.pixel_std
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < image_sizes[:, :1]  # (B, H)
        columns = torch.arange(width, device=images.device) < image_sizes[:, 1:]  # (B, W)
        normalized = normalized * (rows[:, None, :, None] & columns[:, None, None])
        unit = self.model.size_divisibility
        down, right = ((side + unit - 1) // unit * unit - side for side in (height, width))
        return F.pad(normalized, (0, right, 0, down))


def to_float32(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook that lets a module see its input in float32."""
    return (inputs[0].float(),)


class FixedSameConv2d(Conv2dSame):
    """The same where the input's sides are multiples of the stride, whose padding is then fixed."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation):
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last side
        x = F.pad(x, padding)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, dilation=self.dilation, groups=self.groups
        )
