"""The objects of a batch of images, padded to one table."""

from typing import List, NamedTuple, Sequence, Tuple

import torch
from detectron2.structures import Instances
from torch import Tensor


class Targets(NamedTuple):
    """T is the largest number of objects in an image of the batch, at least 1."""

    boxes: Tensor  # (B, T, 4) corners in pixels of the network input; padding is zero
    labels: Tensor  # (B, T) class indices; padding is zero
    valid: Tensor  # (B, T) which entries are objects
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
    size = (len(counts), max(1, *counts))
    boxes, labels = torch.zeros(*size, 4), torch.zeros(size, dtype=torch.long)
    for row, image in enumerate(instances):
        boxes[row, : counts[row]] = image.gt_boxes.tensor.cpu()
        labels[row, : counts[row]] = image.gt_classes.cpu()
    valid = torch.arange(size[1]) < torch.tensor(counts)[:, None]
    scale = torch.tensor([[(w, h, w, h)] for h, w in image_sizes], dtype=torch.float32)
    on_device: List[Tensor] = [t.to(device) for t in (boxes, labels, valid, scale)]
    return Targets(*on_device, counts)
