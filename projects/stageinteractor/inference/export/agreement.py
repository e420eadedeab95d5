"""Whether two sets of detections of one picture are the same but for rounding."""

from typing import NamedTuple

import torch
from detectron2.structures import Instances

LEAST_SCORE = 0.05  # of what has to be found in both
BOX_PIXELS = 0.5
SCORE = 1e-3


class Agreement(NamedTuple):
    """How two sets of detections compare."""

    pairs: int  # detections of one class that were found in both
    lone: int  # detections above `LEAST_SCORE` without a partner
    box_pixels: float  # largest difference of a corner's coordinate in a pair
    score: float  # largest difference of the scores in a pair

    @property
    def holds(self) -> bool:
        """Whether the differences are those of rounding alone."""
        return not self.lone and self.box_pixels <= BOX_PIXELS and self.score <= SCORE


def compare(first: Instances, second: Instances) -> Agreement:
    """Pair the detections above `LEAST_SCORE` of one set with all of the other, and vice versa.

    A partner has the same class, and is the nearest in boxes (pixels) and scores, both in units of
    what is allowed. One detection may be the partner of several: equal queries find equal boxes.
    """
    pairs, lone, box_pixels, score = 0, 0, 0.0, 0.0
    for chosen, others in ((first, second), (second, first)):
        chosen = chosen[chosen.scores > LEAST_SCORE]
        boxes, scores = (
            (chosen.pred_boxes.tensor[:, None] - others.pred_boxes.tensor).abs().amax(-1),
            (chosen.scores[:, None] - others.scores).abs(),
        )  # (number chosen, number of others)
        distance = torch.maximum(boxes / BOX_PIXELS, scores / SCORE)
        same_class = chosen.pred_classes[:, None] == others.pred_classes
        distance = distance.masked_fill(~same_class, torch.inf)
        if not distance.numel():
            lone += len(chosen)
            continue
        nearest, partner = distance.min(1)
        paired = nearest.isfinite()
        lone += int((~paired).sum())
        rows = torch.arange(len(chosen))
        if paired.any():
            box_pixels = max(box_pixels, float(boxes[rows, partner][paired].max()))
            score = max(score, float(scores[rows, partner][paired].max()))
        pairs = max(pairs, int(paired.sum()))
    return Agreement(pairs, lone, box_pixels, score)
