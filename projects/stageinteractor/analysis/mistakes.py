"""What is right and wrong among detections, matched with objects as COCO's evaluation matches them.

pycocotools matches within each class: detections by falling score, each with the object that it
overlaps most and that is not taken. What it leaves over is told apart here, much as in TIDE
(Bolya et al., ECCV 2020).
"""

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from ..data.numbered import NumberedCOCO

LEAST_IOU = 0.1  # with an object of its class, of a detection that is misplaced
# Outcomes. An object is found, confused or missed; a detection is correct, confused or one of
# FALSE. Crowds, and detections of what is in them, are neither right nor wrong.
FOUND, CORRECT, CONFUSED, MISSED, CROWD = "found", "correct", "confused", "missed", "crowd"
DUPLICATE, MISPLACED, BACKGROUND = FALSE = ("duplicate", "misplaced", "background")


class Judged(NamedTuple):
    """An image's objects and detections, each with its outcome; detections by rising score."""

    objects: list[tuple[dict, str]]
    detections: list[tuple[dict, str]]
    confusions: list[tuple[dict, dict]]  # an object, and the detection of another class

    @property
    def num_errors(self) -> int:
        """Objects missed, confusions and false positives."""
        outcomes = Counter(outcome for _, outcome in self.objects + self.detections)
        return len(self.confusions) + sum(outcomes[outcome] for outcome in (MISSED, *FALSE))


def judge(coco: dict, detections: Iterable[dict], iou: float) -> dict[int, Judged]:
    """What becomes of every object and detection, by the id of the image.

    A detection that has no object of its class is confused if it overlaps one of another class
    that nothing has taken; a duplicate if it overlaps an object that is taken; misplaced if its
    overlap with one of its class is `LEAST_IOU` or more, but too little; else background.

    Args:
        coco: ground truth in COCO's instance format.
        detections: in COCO's result format, of these images and categories.
        iou: from which two boxes overlap.
    """
    # Ids as NumberedCOCO has them: results have none.
    objects = [{**item, "id": i, "iscrowd": item.get("iscrowd", 0)}
               for i, item in enumerate(coco["annotations"], start=1)]
    found = [{**item, "id": i} for i, item in enumerate(detections, start=1)]
    pairs, ignored = match(coco, objects, found, iou)
    judged = {image["id"]: ([], []) for image in coco["images"]}
    for place, items in enumerate((objects, found)):
        for item in items:
            judged[item["image_id"]][place].append(item)
    return {key: _judge_image(*parts, pairs, ignored, iou) for key, parts in judged.items()}


def match(
    coco: dict, objects: list[dict], detections: list[dict], iou: float
) -> tuple[dict[int, int], set[int]]:
    """Each detection's object by their ids, and the detections that COCO does not count."""
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        tables = (NumberedCOCO({**coco, "annotations": items}) for items in (objects, detections))
        evaluation = COCOeval(*tables, "bbox")
        options = evaluation.params
        options.iouThrs, options.maxDets = np.array([iou]), [max(len(detections), 1)]
        options.areaRng, options.areaRngLbl = [[0, np.inf]], ["all"]
        evaluation.evaluate()
    pairs, ignored = {}, set()
    for image in filter(None, evaluation.evalImgs):
        for key, other, is_ignored in zip(
            image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0]
        ):
            if is_ignored:
                ignored.add(key)
            elif other:
                pairs[key] = int(other)
    return pairs, ignored


def _judge_image(objects, detections, pairs, ignored, iou) -> Judged:
    detections = sorted(detections, key=lambda item: -item["score"])
    real = [item for item in objects if not item["iscrowd"]]
    overlaps = np.zeros((len(detections), len(real)))
    if overlaps.size:
        boxes = ([item["bbox"] for item in items] for items in (detections, real))
        overlaps = mask.iou(*boxes, [0] * len(real))
    outcome = {item["id"]: MISSED if not item["iscrowd"] else CROWD for item in objects}
    outcome.update({pairs[item["id"]]: FOUND for item in detections if item["id"] in pairs})
    judged, confusions = [], []
    for item, row in zip(detections, overlaps):
        if item["id"] in ignored or item["id"] in pairs:
            judged.append((item, CROWD if item["id"] in ignored else CORRECT))
            continue
        free = [(value, number) for number, value in enumerate(row)
                if value >= iou and outcome[real[number]["id"]] == MISSED]
        if free:  # of another class: those of its own are taken
            other = real[max(free)[1]]
            outcome[other["id"]] = CONFUSED
            confusions.append((other, item))
            judged.append((item, CONFUSED))
            continue
        same = [value for value, other in zip(row, real)
                if other["category_id"] == item["category_id"]]
        if max(row, default=0) >= iou:
            judged.append((item, DUPLICATE))
        else:
            judged.append((item, MISPLACED if max(same, default=0) >= LEAST_IOU else BACKGROUND))
    return Judged([(item, outcome[item["id"]]) for item in objects], judged[::-1], confusions)


def count_outcomes(judged: Iterable[Judged]) -> dict[int, Counter]:
    """How often each outcome is that of an object or of a false positive, by category id."""
    counts: dict[int, Counter] = defaultdict(Counter)
    for image in judged:
        for item, outcome in image.objects:
            counts[item["category_id"]][outcome] += 1
        for item, outcome in image.detections:
            if outcome in FALSE:
                counts[item["category_id"]][outcome] += 1
    return counts
