"""The objects of a batch of images, padded to one table."""

from typing import NamedTuple, Sequence, Tuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Targets(NamedTuple):
    """T is the largest number of objects in an image of the batch, at least 1."""

    boxes: Tensor  # (B, T, 4) corners in pixels of the network input; padding is zero
    labels: Tensor  # (B, T) class indices; padding is zero
    scale: Tensor  # (B, 1, 4) width, height, width, height of each image before padding, pixels
    counts: Tuple[int, ...]  # objects of each image, known on the host


def gather_targets(
    instances: Sequence[Instances], image_sizes: Sequence[Tuple[int, int]], device: torch.device
) -> Targets:
    """Pad the ground truth of B images.

    Args:
        instances: ``gt_boxes`` (pixels of the network input) and ``gt_classes`` of each image.
        image_sizes: (height, width) of each image after resizing, before padding.
        device: where the targets go.
    """
    counts = tuple(len(image) for image in instances)
    boxes, labels = pad_objects(
        [image.gt_boxes.tensor for image in instances], [image.gt_classes for image in instances]
    )
    scale = torch.tensor([[(w, h, w, h)] for h, w in image_sizes], dtype=torch.float32)
    return Targets(send(boxes, device), send(labels, device), send(scale, device), counts)


def pad_objects(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
    """Boxes (T_b, 4) and labels (T_b,) of each image to tables (B, T, 4) and (B, T)."""
    boxes, labels = pad_sequence(boxes, batch_first=True), pad_sequence(labels, batch_first=True)
    if not boxes.shape[1]:  # one entry of padding, for what indexes the tables
        boxes, labels = boxes.new_zeros(len(boxes), 1, 4), labels.new_zeros(len(labels), 1)
    return boxes, labels


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy what is on the host to a device; where that is CUDA, without waiting for it."""
    # Elsewhere such a copy may lose values: https://github.com/pytorch/pytorch/issues/139550
    return tensor.to(device, non_blocking=device.type == "cuda")
