"""Training losses of all stages: focal classification, L1 and GIoU box losses."""

from typing import Dict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils.comm import get_world_size
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from .boxes import generalized_box_iou, xyzr_to_corners
from .decoder import DecoderOutput
from .label_assigner import Assignment, CrossStageLabelAssigner
from .matcher import HungarianMatcher
from .targets import Targets


def focal_loss(logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> Tensor:
    """Element-wise sigmoid focal loss of logits and 0/1 targets of one shape."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, classes, reduction="none")
    prob = logits.sigmoid()
    miss = prob + classes - 2 * prob * classes  # 1 - p for positives, p for negatives
    weight = alpha * classes + (1 - alpha) * (1 - classes)
    return weight * miss**gamma * cross_entropy


def average_over_ranks(count: Tensor) -> Tensor:
    """Mean of a tensor over all training processes."""
    if get_world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
        count /= get_world_size()
    return count


class SetCriterion(nn.Module):
    """Match, assign labels across stages, and sum weighted losses stage by stage.

    Args:
        matcher: one-to-one matching of each stage.
        label_assigner: classification targets of each stage.
        weight_class, weight_bbox, weight_giou: loss weights.
        alpha, gamma: parameters of the focal loss.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        label_assigner: CrossStageLabelAssigner,
        weight_class: float = 2.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.matcher = matcher
        self.label_assigner = label_assigner
        self.weights = {"cls": weight_class, "bbox": weight_bbox, "giou": weight_giou}
        self.alpha, self.gamma = alpha, gamma

    def forward(self, outputs: DecoderOutput, targets: Targets) -> Dict[str, Tensor]:
        """Losses ``stage{i}_loss_{cls,bbox,giou}``, weighted; their plain sum is the total.

        Always computed in float32, whatever the precision of the decoder.
        """
        with torch.autocast(outputs.logits.device.type, enabled=False):
            logits = outputs.logits.float()  # (L, B, N, C)
            boxes = xyzr_to_corners(outputs.xyzr.float())  # (L, B, N, 4)
            match = self.matcher(logits, boxes, targets)
            assignment = self.label_assigner(logits, boxes, match, targets.boxes, targets.labels)
            losses = self.losses(logits, boxes, assignment, targets)
        log_assignment(assignment)
        return {
            f"stage{stage}_loss_{name}": self.weights[name] * value
            for name, per_stage in losses.items()
            for stage, value in enumerate(per_stage.unbind())
        }

    def losses(
        self, logits: Tensor, boxes: Tensor, assignment: Assignment, targets: Targets
    ) -> Dict[str, Tensor]:
        """Unweighted losses (L,) by name.

        Normalisers are per stage, over the batch of all ranks: the matched queries for boxes, and
        for classes the labels if there are more of them. Only a zero becomes one.
        """
        counts = average_over_ranks(
            torch.stack([assignment.matched.sum((1, 2)), assignment.classes.sum((1, 2, 3))]).float()
        )
        num_matched = counts[0].masked_fill(counts[0] == 0, 1)
        num_labels = torch.maximum(num_matched, counts[1])

        classification = focal_loss(logits, assignment.classes, self.alpha, self.gamma)
        # Unmatched queries take their target as prediction: no loss and no gradient.
        matched = assignment.matched[..., None]
        predicted = torch.where(matched, boxes, assignment.boxes)
        distance = (predicted - assignment.boxes).abs() / targets.scale
        giou = torch.where(
            assignment.matched, generalized_box_iou(predicted, assignment.boxes), 1.0
        )
        return {
            "cls": classification.sum((1, 2, 3)) / num_labels,
            "bbox": distance.sum((1, 2, 3)) / num_matched,
            "giou": (1 - giou).sum((1, 2)) / num_matched,
        }


def log_assignment(assignment: Assignment):
    """Record how the cross-stage labels differ from one-to-one labels, if anyone is listening.

    As shares of the one-to-one matches of all stages: ``labels/kept`` of them reached the
    threshold, ``labels/dropped`` did not, ``labels/gained`` came from other stages on top.
    """
    if not has_event_storage():
        return
    matched = assignment.matched.sum()
    own = assignment.keep.diagonal().sum()
    gained = assignment.classes.sum() - own
    shares = torch.stack([own, matched - own, gained]) / matched.clamp(min=1)
    # Tensors: a storage may put off reading them, which waits for the device.
    for name, share in zip(("kept", "dropped", "gained"), shares):
        get_event_storage().put_scalar(f"labels/{name}", share)
