"""Training losses of all stages: focal classification, L1 and GIoU box losses."""

import torch
import torch.distributed as dist
from detectron2.utils.comm import get_world_size
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .boxes import generalized_box_iou, xyzr_to_corners
from .decoder import DecoderOutput
from .label_assigner import Assignment, CrossStageLabelAssigner
from .matcher import FOCAL_ALPHA, FOCAL_GAMMA, HungarianMatcher
from .targets import Targets


def average_over_ranks(count: Tensor) -> Tensor:
    """Return the mean of a tensor over all training processes."""
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
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        label_assigner: CrossStageLabelAssigner,
        weight_class: float = 2.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
    ):
        super().__init__()
        self.matcher = matcher
        self.label_assigner = label_assigner
        self.weights = {"cls": weight_class, "bbox": weight_bbox, "giou": weight_giou}

    def forward(self, outputs: DecoderOutput, targets: Targets) -> dict[str, Tensor]:
        """Compute the weighted losses ``stage{i}_loss_{cls,bbox,giou}``; the total is their sum.

        They are computed in float32, whatever the precision of the decoder.
        """
        with torch.autocast(outputs.logits.device.type, enabled=False):
            logits = outputs.logits.float()  # (L, B, N, C)
            boxes = xyzr_to_corners(outputs.xyzr.float())  # (L, B, N, 4)
            assignment = self.assign(logits, boxes, targets)
            losses = self.losses(logits, boxes, assignment, targets)
        log_assignment(assignment)
        return {
            f"stage{stage}_loss_{name}": self.weights[name] * value
            for name, per_stage in losses.items()
            for stage, value in enumerate(per_stage.unbind())
        }

    def assign(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Assignment:
        """Match each stage to the objects, then gather class labels across stages.

        Args:
            logits: (L, B, N, C).
            boxes: predicted corners (L, B, N, 4) in pixels of the network input.
        """
        match = self.matcher(logits, boxes, targets)
        return self.label_assigner(logits, boxes, match, targets.boxes, targets.labels)

    def losses(
        self, logits: Tensor, boxes: Tensor, assignment: Assignment, targets: Targets
    ) -> dict[str, Tensor]:
        """Compute the unweighted losses of all stages, (L,) each, by name.

        The losses of a stage are divided by counts over the batch, averaged over all ranks: those
        of boxes by the number of matched queries, that of classes by the number of labels if that
        is greater. A count of zero becomes one.
        """
        counts = average_over_ranks(
            torch.stack([assignment.matched.sum((1, 2)), assignment.classes.sum((1, 2, 3))]).float()
        )
        num_matched = counts[0].masked_fill(counts[0] == 0, 1)
        num_labels = torch.maximum(num_matched, counts[1])

        classification = sigmoid_focal_loss(logits, assignment.classes, FOCAL_ALPHA, FOCAL_GAMMA)
        # The prediction of an unmatched query is replaced by its target: no loss, no gradient.
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


def log_assignment(assignment: Assignment, prefix: str = "labels") -> None:
    """Record how cross-stage labels differ from one-to-one labels, if there is an event storage.

    The numbers are shares of the one-to-one matches of all stages: ``labels/kept`` reached the IoU
    threshold, ``labels/dropped`` did not, ``labels/gained`` were added from other stages.
    """
    if not has_event_storage():
        return
    matched = assignment.matched.sum()
    own = assignment.keep.diagonal().sum()
    gained = assignment.classes.sum() - own
    shares = torch.stack([own, matched - own, gained]) / matched.clamp(min=1)
    # As tensors, so that the storage can delay reading them, which waits for the device.
    for name, share in zip(("kept", "dropped", "gained"), shares):
        get_event_storage().put_scalar(f"{prefix}/{name}", share)
