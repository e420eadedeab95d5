"""Which detections are right and wrong, matched with objects as COCO's evaluation matches them.

pycocotools matches within each class. It takes detections in descending order of score, and gives
each the free object that it overlaps most. This module classifies what remains, much as TIDE does
(Bolya et al., ECCV 2020).
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from ..data.numbered import NumberedCOCO

LEAST_IOU = 0.1  # of a misplaced detection with an object of its class
# An object is found, confused or missed; a detection is correct, confused or one of FALSE. Crowds,
# and detections inside them, are neither right nor wrong.
FOUND, CORRECT, CONFUSED, MISSED, CROWD = "found", "correct", "confused", "missed", "crowd"
DUPLICATE, MISPLACED, BACKGROUND = FALSE = ("duplicate", "misplaced", "background")


class Judged(NamedTuple):
    """An image's objects and detections, each with its outcome; detections by ascending score."""

    objects: list[tuple[dict, str]]
    detections: list[tuple[dict, str]]
    confusions: list[tuple[dict, dict]]  # an object, and a detection of another class

    @property
    def num_errors(self) -> int:
        """The number of missed objects, confusions and false positives."""
        outcomes = Counter(outcome for _, outcome in self.objects + self.detections)
        return len(self.confusions) + sum(outcomes[outcome] for outcome in (MISSED, *FALSE))


def judge(coco: dict, detections: Iterable[dict], iou: float) -> dict[int, Judged]:
    """Give every object and detection its outcome, by the id of the image.

    A detection that is not matched is confused if it overlaps a missed object of another class, a
    duplicate if it overlaps an object that is found or confused already, misplaced if its IoU with
    an object of its class is at least `LEAST_IOU`, and background otherwise.

    Args:
        coco: ground truth in COCO's instance format.
        detections: in COCO's result format, of these images and categories.
        iou: from this IoU on, two boxes overlap.
    """
    # Results have no ids, and those of objects may be anything. NumberedCOCO gives these.
    images, categories = ({e["id"] for e in coco[t]} for t in ("images", "categories"))
    known = (item for item in coco["annotations"]  # COCO's evaluation disregards the others
             if item["image_id"] in images and item["category_id"] in categories)
    objects = [{**item, "id": i} for i, item in enumerate(known, start=1)]
    found = [{**item, "id": i} for i, item in enumerate(detections, start=1)]
    pairs, ignored = match(coco, objects, found, iou)
    of_image = {key: ([], []) for key in images}
    for place, items in enumerate((objects, found)):
        for item in items:
            of_image[item["image_id"]][place].append(item)
    return {key: judge_image(*items, pairs, ignored, iou) for key, items in of_image.items()}


def match(
    coco: dict, objects: list[dict], detections: list[dict], iou: float
) -> tuple[dict[int, int], set[int]]:
    """Find the ids of each matched detection's object, and of detections that COCO ignores."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        tables = (NumberedCOCO({**coco, "annotations": items}) for items in (objects, detections))
        evaluation = COCOeval(*tables, "bbox")
        options = evaluation.params
        options.iouThrs, options.maxDets = np.array([iou]), [max(len(detections), 1)]
        options.areaRng, options.areaRngLbl = [[0, np.inf]], ["all"]
        evaluation.evaluate()
    pairs, ignored = {}, set()
    for image in filter(None, evaluation.evalImgs):
        keys = np.array(image["dtIds"], dtype=int)
        others, is_ignored = image["dtMatches"][0], image["dtIgnore"][0].astype(bool)
        ignored.update(keys[is_ignored].tolist())
        counts = ~is_ignored & (others > 0)
        pairs.update(zip(keys[counts].tolist(), others[counts].astype(int).tolist()))
    return pairs, ignored


def judge_image(
    objects: list[dict],
    detections: list[dict],
    pairs: dict[int, int],
    ignored: set[int],
    iou: float,
) -> Judged:
    """Give the objects and detections of one image their outcomes; see `judge` and `match`."""
    detections = sorted(detections, key=lambda item: -item["score"])
    outcome = {item["id"]: CROWD if item.get("iscrowd") else MISSED for item in objects}
    outcome.update({pairs[item["id"]]: FOUND for item in detections if item["id"] in pairs})
    real = [item for item in objects if outcome[item["id"]] != CROWD]
    boxes = ([item["bbox"] for item in items] for items in (detections, real))
    shape = len(detections), len(real)
    judged, confusions = [], []
    for item, overlaps in zip(detections, np.reshape(mask.iou(*boxes, [0] * len(real)), shape)):
        free = [(value, number) for number, value in enumerate(overlaps)
                if value >= iou and outcome[real[number]["id"]] == MISSED]
        same = [value for value, other in zip(overlaps, real)
                if other["category_id"] == item["category_id"]]
        if item["id"] in ignored:
            verdict = CROWD
        elif item["id"] in pairs:
            verdict = CORRECT
        elif free:  # of another class, because its own class's are taken
            other, verdict = real[max(free)[1]], CONFUSED
            outcome[other["id"]] = CONFUSED
            confusions.append((other, item))
        elif max(overlaps, default=0) >= iou:
            verdict = DUPLICATE
        else:
            verdict = MISPLACED if max(same, default=0) >= LEAST_IOU else BACKGROUND
        judged.append((item, verdict))
    return Judged([(item, outcome[item["id"]]) for item in objects], judged[::-1], confusions)


def count_outcomes(judged: Iterable[Judged]) -> Counter:
    """Count the outcomes of objects and of false positives, by category id and outcome."""
    return Counter(
        (item["category_id"], outcome) for image in judged
        for item, outcome in image.objects + [p for p in image.detections if p[1] in FALSE]
    )
