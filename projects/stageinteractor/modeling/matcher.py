"""One-to-one matching between queries and objects, as in DETR.

Each stage matches its own predictions to the objects so that the total cost is minimal.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .boxes import generalized_box_iou
from .targets import Targets
from .transfer import send

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # of the cost, and of the loss
# Replaces costs that are not finite, which the solver refuses. It exceeds the cost of any box near
# the image, but not that of a box millions of image sizes away, whose L1 cost may be greater.
UNUSABLE_COST = 1e8


class HungarianMatcher(nn.Module):
    """Match by the weighted sum of focal, L1 and GIoU costs.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the three costs.
    """

    def __init__(
        self, *, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0
    ):
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Compute the cost of matching each query to each object.

        Args:
            logits: (L, B, N, C) of every stage.
            boxes: corners (L, B, N, 4) in pixels.

        Returns:
            (L, B, N, T); columns of padding have no meaning.
        """
        labels = targets.labels[:, None, :].expand(*logits.shape[:-1], -1)  # (L, B, N, T)
        prob = logits.gather(-1, labels).sigmoid()
        positive = FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * -(prob + 1e-12).log()
        negative = (1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * -(1 - prob + 1e-12).log()

        boxes = boxes[..., :, None, :]  # (L, B, N, 1, 4)
        objects = targets.boxes[:, None]  # (B, 1, T, 4)
        distance = ((boxes - objects).abs() / targets.scale[:, None]).sum(-1)
        giou = generalized_box_iou(boxes, objects)
        return (
            self.cost_class * (positive - negative)
            + self.cost_bbox * distance
            - self.cost_giou * giou
        )

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Find the object that each query wins in each stage.

        Args:
            logits: (L, B, N, C).
            boxes: corners (L, B, N, 4) in pixels.

        Returns:
            (L, B, N) index of the object, or -1. If there are more objects than queries, some
            objects are won by none. NaN predictions are matched too, as if their cost was high.
        """
        cost = self.cost(logits, boxes, targets)
        cost.nan_to_num_(nan=UNUSABLE_COST, posinf=UNUSABLE_COST, neginf=UNUSABLE_COST)
        match = np.full(cost.shape[:-1], -1, dtype=np.int64)
        for stage_cost, stage_match in zip(cost.cpu().numpy(), match):
            for image, count in enumerate(targets.counts):
                queries, objects = linear_sum_assignment(stage_cost[image, :, :count])
                stage_match[image, queries] = objects
        return send(torch.from_numpy(match), logits.device)
