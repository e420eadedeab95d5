"""The objects of a batch of images, padded to one table."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .transfer import send


class Targets(NamedTuple):
    """Objects of B images; T is the largest number in an image, at least 1."""

    boxes: Tensor  # (B, T, 4) corners in pixels of the network input; padding is zero
    labels: Tensor  # (B, T) class indices; padding is zero
    scale: Tensor  # (B, 1, 4) width, height, width, height of each image before padding, pixels
    counts: tuple[int, ...]  # objects of each image, known without reading from the device


def gather_targets(
    instances: Sequence[Instances], image_sizes: Sequence[tuple[int, int]], device: torch.device
) -> Targets:
    """Pad the ground truth of B images and send it to a device.

    Args:
        instances: ``gt_boxes`` (pixels of the network input) and ``gt_classes`` of each image.
        image_sizes: (height, width) of each image after resizing, before padding, pixels.
    """
    counts = tuple(len(image) for image in instances)
    boxes, labels = pad_objects(
        [image.gt_boxes.tensor for image in instances], [image.gt_classes for image in instances]
    )
    scale = torch.tensor([[(w, h, w, h)] for h, w in image_sizes], dtype=torch.float32)
    return Targets(send(boxes, device), send(labels, device), send(scale, device), counts)


def pad_objects(boxes: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad boxes (T_b, 4) and labels (T_b,) of each image to tables (B, T, 4) and (B, T)."""
    box_table = pad_sequence(boxes, batch_first=True)
    label_table = pad_sequence(labels, batch_first=True)
    if not box_table.shape[1]:  # one entry of padding, so that the tables can be indexed
        return box_table.new_zeros(len(boxes), 1, 4), label_table.new_zeros(len(labels), 1)
    return box_table, label_table
