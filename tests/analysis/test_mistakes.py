"""Promises of analysis/mistakes.py: what is right and wrong in detections, and its table."""

import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.analysis.mistakes import FALSE, judge
from projects.stageinteractor.analysis.result_pictures import describe_results

BOXES = {  # of a 100 x 100 image; IoU of a and near 1/3, of both with the others 0
    "a": [0, 0, 20, 20], "near": [10, 0, 20, 20], "b": [40, 40, 20, 20], "c": [70, 70, 20, 20],
    "half of b": [40, 40, 20, 10],
}


def picture(objects, found, crowds=()):
    """COCO files of an image from (class, box) and, by falling score, (class, box)."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": key, "bbox": BOXES[box],
         "iscrowd": (key, box) in crowds}
        for i, (key, box) in enumerate(objects)
    ]
    coco = {
        "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 100}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return coco, [
        {"image_id": 1, "category_id": c, "bbox": BOXES[box], "score": 0.9 - i / 10}
        for i, (c, box) in enumerate(found)
    ]


CASES = {
    "right": ([(1, "a")], [(1, "a")], ["found"], ["correct"]),
    "a second one": ([(1, "a")], [(1, "a")] * 2, ["found"], ["correct", "duplicate"]),
    "the best score wins": ([(1, "a"), (1, "b")], [(1, "half of b"), (1, "b")],
                            ["missed", "found"], ["correct", "duplicate"]),
    "another class": ([(1, "a")], [(2, "a")], ["confused"], ["confused"]),
    "another class, twice": ([(1, "a")], [(2, "a")] * 2, ["confused"], ["confused", "duplicate"]),
    "another class too, though better": ([(1, "a")], [(2, "a"), (1, "a")],
                                         ["found"], ["duplicate", "correct"]),
    "its own class comes first": ([(1, "a"), (2, "a")], [(2, "a"), (1, "a")],
                                  ["found"] * 2, ["correct"] * 2),
    "misplaced": ([(1, "a")], [(1, "near")], ["missed"], ["misplaced"]),
    "misplaced and of another class": ([(1, "a")], [(2, "near")], ["missed"], ["background"]),
    "nothing there": ([(1, "a")], [(1, "c")], ["missed"], ["background"]),
    "nothing found": ([(1, "a"), (2, "b")], [], ["missed"] * 2, []),
    "nothing to find": ([], [(1, "a")], [], ["background"]),
}


@pytest.mark.parametrize("objects, found, of_objects, of_found", CASES.values(), ids=CASES)
def test_what_is_wrong_is_told_apart(objects, found, of_objects, of_found):
    judged = judge(*picture(objects, found), 0.5)[1]
    assert [outcome for _, outcome in judged.objects] == of_objects
    assert [outcome for _, outcome in judged.detections[::-1]] == of_found
    pairs = [(truth["category_id"], item["category_id"]) for truth, item in judged.confusions]
    assert pairs == [(1, 2)] * of_found.count("confused")
    wrong = sum(outcome in FALSE for outcome in of_found)
    assert judged.num_errors == of_objects.count("missed") + len(pairs) + wrong


def test_crowds_are_neither_right_nor_wrong():
    """What is in a crowd of its class does not count; a crowd confuses nothing."""
    crowd = [(1, "a")]
    judged = judge(*picture([(1, "a"), (1, "b")], [(1, "a"), (1, "a"), (2, "a")], crowd), 0.5)[1]
    assert [outcome for _, outcome in judged.objects] == ["crowd", "missed"]
    assert [outcome for _, outcome in judged.detections[::-1]] == ["crowd", "crowd", "background"]
    assert judged.num_errors == 2


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_annotations_of_nothing_known_change_nothing(key):
    """They come first, so that ids counted with them would be others."""
    coco, detections = picture([(1, "a"), (2, "b")], [(1, "a"), (2, "b")])
    expected = judge(coco, detections, 0.5)
    orphan = {**coco["annotations"][0], "id": 99, key: 7}
    assert judge({**coco, "annotations": [orphan, *coco["annotations"]]}, detections, 0.5)[
        1].num_errors == expected[1].num_errors == 0


def random_results(seed, classes=3, images=12):
    """Objects, crowds among them, and detections near and far, in COCO's formats."""
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 9)):
            box = np.concatenate([rng.uniform(0, 60, 2), rng.uniform(5, 40, 2)])
            category = int(rng.integers(1, classes + 1))
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": category,
                "bbox": box.tolist(), "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.15),
            })
            for _ in range(rng.integers(0, 4)):
                moved = box + rng.normal(0, 3, 4) * rng.integers(0, 3)
                detections.append({
                    "image_id": image, "bbox": np.maximum(moved, 1).tolist(),
                    "category_id": category if rng.random() < 0.7 else int(rng.integers(1, 4)),
                    "score": float(rng.random()),
                })
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100}
                   for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)],
    }, detections


def coco_counts(coco, detections, threshold_index):
    """True and false positives, false negatives and uncounted detections of each class."""
    truth = COCO()
    truth.dataset = {"info": {}, **coco}
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    counts = {}
    for one in filter(None, evaluation.evalImgs):
        if one["aRng"] != [0, 1e10]:
            continue
        matches, ignored = one["dtMatches"][threshold_index], one["dtIgnore"][threshold_index]
        is_real = one["gtIgnore"] == 0
        taken = one["gtMatches"][threshold_index][is_real] > 0
        new = [(matches > 0) & ~ignored.astype(bool), (matches == 0) & ~ignored.astype(bool),
               ~taken, ignored]
        old = counts.setdefault(one["category_id"], np.zeros(4, int))
        old += [int(values.sum()) for values in new]
    return counts


def slow_iou(a, b):
    sides = [max(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1)]
    return math.prod(sides) / (a[2] * a[3] + b[2] * b[3] - math.prod(sides))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou, index", [(0.5, 0), (0.75, 5)])
def test_counts_are_those_of_pycocotools(seed, iou, index):
    coco, detections = random_results(seed)
    judged = judge(coco, detections, iou)
    for key, expected in coco_counts(coco, detections, index).items():
        objects = [o for one in judged.values() for a, o in one.objects if a["category_id"] == key]
        found = [o for one in judged.values() for a, o in one.detections if a["category_id"] == key]
        false = sum(outcome in ("confused", *FALSE) for outcome in found)
        missed = sum(outcome in ("missed", "confused") for outcome in objects)
        assert [found.count("correct"), false, missed, found.count("crowd")] == expected.tolist()
        assert objects.count("found") == found.count("correct")
    shifted = [{**item, "id": item["id"] - 1} for item in coco["annotations"]]
    again = judge({**coco, "annotations": shifted}, detections, iou)
    outcomes = [[[o for _, o in one.objects + one.detections] for one in each.values()]
                for each in (judged, again)]
    assert outcomes[0] == outcomes[1]  # id 0 is an object as any other


@pytest.mark.parametrize("seed", range(6))
def test_reasons_are_those_of_a_slow_count(seed):
    coco, detections = random_results(seed)
    seen = set()
    for one in judge(coco, detections, 0.5).values():
        real = [(item, outcome) for item, outcome in one.objects if outcome != "crowd"]
        for truth, item in one.confusions:
            assert slow_iou(truth["bbox"], item["bbox"]) >= 0.5
            assert truth["category_id"] != item["category_id"]
            assert (truth, "confused") in real and (item, "confused") in one.detections
        assert len({truth["id"] for truth, _ in one.confusions}) == len(one.confusions)
        for item, outcome in one.detections:
            overlaps = [(slow_iou(item["bbox"], t["bbox"]), t, o) for t, o in real]
            near = [o for value, _, o in overlaps if value >= 0.5]
            same = [v for v, t, _ in overlaps if t["category_id"] == item["category_id"]]
            if outcome == "duplicate":
                assert near and "missed" not in near
            elif outcome in ("misplaced", "background"):
                assert not near and (max(same, default=0) >= 0.1) == (outcome == "misplaced")
            seen.add(outcome)
        scores = [item["score"] for item, _ in one.detections]
        assert scores == sorted(scores)
    assert seen == {"correct", "confused", "duplicate", "misplaced", "background", "crowd"}


def test_the_table_has_every_class_and_confusion():
    coco, detections = picture(
        [(1, "a"), (2, "b"), (1, "c")], [(1, "a"), (1, "a"), (1, "b"), (1, "near"), (2, "c")]
    )
    coco["categories"].append({"id": 3, "name": "never"})
    text = describe_results(coco, judge(coco, detections, 0.5), 0.5)
    # class, objects, found, confused, missed, duplicate, misplaced, background
    assert [line.split() for line in text.split("\n\n")[0].splitlines()[2:]] == [
        ["cat", "2", "1", "1", "0", "1", "1", "0"],
        ["dog", "1", "0", "1", "0", "0", "0", "0"],
        ["all", "3", "1", "2", "0", "1", "1", "0"],
    ]
    pairs = text[text.index("truth"):].splitlines()[2:]
    assert [line.split() for line in pairs] == [["dog", "cat", "1"], ["cat", "dog", "1"]]
