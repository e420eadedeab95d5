"""Cross-stage label assignment: classification targets gathered from neighbouring stages.

Paper section 3.3 and supplement section J. One-to-one matching flips between stages: an object may
be won by a query in one stage and by another in the next, although both boxes fit it. So stage i
offers query n every object that n won in the stages i-1 .. L, and keeps those whose IoU with the
query's *current* box reaches a threshold. That holds for its own match too, and a query may get
several labels or none.

Box targets are not touched: they stay the stage's own one-to-one matches.

Nothing here belongs to StageInteractor: a stage is any decoder layer that is matched by itself.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import area, intersection


class Assignment(NamedTuple):
    """Targets of every stage, L stages, B images, N queries, C classes."""

    classes: Tensor  # (L, B, N, C) 0 or 1
    boxes: Tensor  # (L, B, N, 4) corners of the object matched in the stage itself
    matched: Tensor  # (L, B, N) whether there is one
    keep: Tensor  # (L, L, B, N): stage i kept the object that the query won in stage j


class CrossStageLabelAssigner(nn.Module):
    """Select, for each stage, among the matches of the stages in scope.

    Args:
        scope: first and last stage offered to stage i, relative to i; None means without end.
            (-1, None) is the released [i-1, L]; (0, 0) is one-to-one assignment.
        iou_threshold: least IoU between the query's box in stage i and the object. With 0 every
            match in scope is kept.

    Raises:
        ValueError: a scope that is no pair, or a threshold that no IoU can have.
    """

    def __init__(
        self,
        *,
        scope: Tuple[Optional[int], Optional[int]] = (-1, None),
        iou_threshold: float = 0.5,
    ):
        super().__init__()
        ends = [end for end in scope if end is not None]
        if len(scope) != 2 or not all(isinstance(end, int) for end in ends):
            raise ValueError(f"scope={list(scope)}: the first and the last stage, relative to i")
        if ends != sorted(ends):
            raise ValueError(f"scope={list(scope)}: the first stage comes after the last")
        if not 0 <= iou_threshold <= 1:
            raise ValueError(f"{iou_threshold=} is no IoU")
        self.scope = tuple(scope)
        self.iou_threshold = iou_threshold

    def in_scope(self, num_stages: int, device: torch.device) -> Tensor:
        """(L, L) table: whether stage i is offered the matches of stage j."""
        first, last = self.scope
        first = -num_stages if first is None else first
        last = num_stages if last is None else last
        table = torch.ones(num_stages, num_stages, dtype=torch.bool, device=device)
        return table.triu(first).tril(last)  # first <= j - i <= last

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        match: Tensor,
        object_boxes: Tensor,
        object_labels: Tensor,
    ) -> Assignment:
        """Assign classes and boxes to every query of every stage.

        Args:
            logits: (L, B, N, C), for their shape and precision.
            boxes: predicted corners (L, B, N, 4), in any unit.
            match: (L, B, N) index of the object that the query won in the stage, or -1.
            object_boxes: corners (B, T, 4) in the same unit; padding is unused, T may be 0.
            object_labels: (B, T) class indices.
        """
        # One more, so that a query without an object has one to point at.
        object_boxes = F.pad(object_boxes, (0, 0, 0, 1))
        object_labels = F.pad(object_labels, (0, 1))
        matched = match >= 0
        image = torch.arange(match.shape[1], device=match.device)[:, None]  # (B, 1)
        won_box = object_boxes[image, match.clamp(min=0)]  # (L, B, N, 4)
        won_class = object_labels[image, match.clamp(min=0)]  # (L, B, N)

        shared = intersection(boxes[:, None], won_box)  # (L, L, B, N): box of i, object won in j
        union = area(boxes)[:, None] + area(won_box) - shared
        iou = (shared / union).nan_to_num()  # two boxes without area, or one of NaN: no overlap
        scope = self.in_scope(len(match), match.device)[:, :, None, None]
        keep = (iou >= self.iou_threshold) & matched & scope

        classes = logits.new_zeros(logits.shape)
        offered = won_class.movedim(0, -1).expand(*match.shape, -1)  # (L, B, N, L)
        classes.scatter_add_(-1, offered, keep.movedim(1, -1).to(classes.dtype))
        return Assignment(classes.clamp_(max=1), won_box, matched, keep)
