"""Cross-stage label assignment: classification targets gathered from neighbouring stages.

Paper section 3.3 and supplement section J. One-to-one matching is unstable: an object may be won by
one query in one stage and by another query in the next, although both boxes fit it. Therefore stage
i offers query n every object that n won in any of the stages i-1 .. L, and keeps those whose IoU
with the query's *current* box reaches a threshold. This applies to the stage's own match too, so
that a query may get several labels or none.

Box targets do not change: they are the stage's own one-to-one matches.

Nothing here is specific to StageInteractor: a stage can be any decoder layer with its own matching.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import area, intersection


class Assignment(NamedTuple):
    """Targets of L stages, B images, N queries and C classes, and how they were found."""

    classes: Tensor  # (L, B, N, C) 0 or 1
    boxes: Tensor  # (L, B, N, 4) corners of the object that the query won in the stage itself
    match: Tensor  # (L, B, N) index of this object, or -1
    iou: Tensor  # (L, L, B, N) of the query's box in stage i and the object that it won in stage j
    keep: Tensor  # (L, L, B, N) whether stage i kept the object that the query won in stage j

    @property
    def matched(self) -> Tensor:
        """Whether the query won an object in the stage itself (L, B, N)."""
        return self.match >= 0


class CrossStageLabelAssigner(nn.Module):
    """Select labels for each stage from the matches of the stages in scope.

    Args:
        scope: first and last stage whose matches are offered to stage i, relative to i; None means
            no limit. (-1, None) is the released [i-1, L]; (0, 0) is one-to-one assignment.
        iou_threshold: least IoU between the query's box in stage i and the object. With 0, every
            match in scope is kept.

    Raises:
        ValueError: if the scope is not an ordered pair or the threshold is not between 0 and 1.
    """

    def __init__(
        self,
        *,
        scope: tuple[int | None, int | None] = (-1, None),
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
        """Return whether stage i is offered the matches of stage j: (L, L)."""
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
            logits: (L, B, N, C); only their shape and precision matter.
            boxes: predicted corners (L, B, N, 4), in any unit.
            match: (L, B, N) index of the object that the query won in the stage, or -1.
            object_boxes: corners (B, T, 4) in the same unit; padding is ignored, T may be 0.
            object_labels: (B, T) class indices.
        """
        # One more object, for queries that have won none to point at.
        object_boxes = F.pad(object_boxes, (0, 0, 0, 1))
        object_labels = F.pad(object_labels, (0, 1))
        image = torch.arange(match.shape[1], device=match.device)[:, None]  # (B, 1)
        won_box = object_boxes[image, match.clamp(min=0)]  # (L, B, N, 4)
        won_class = object_labels[image, match.clamp(min=0)]  # (L, B, N)

        shared = intersection(boxes[:, None], won_box)  # (L, L, B, N): box of i, object won in j
        union = area(boxes)[:, None] + area(won_box) - shared
        iou = (shared / union).nan_to_num()  # 0 for two boxes without area, or if one is NaN
        scope = self.in_scope(len(match), match.device)[:, :, None, None]
        keep = (iou >= self.iou_threshold) & (match >= 0) & scope

        classes = logits.new_zeros(logits.shape)
        offered = won_class.movedim(0, -1).expand(*match.shape, -1)  # (L, B, N, L)
        classes.scatter_add_(-1, offered, keep.movedim(1, -1).to(classes.dtype))
        return Assignment(classes.clamp_(max=1), won_box, match, iou, keep)
