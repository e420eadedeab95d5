"""The table of an evaluation has COCO's own figures, for all classes and for each."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.data.numbered import NumberedCOCO, object_area
from projects.stageinteractor.engine import evaluator as module
from projects.stageinteractor.engine.evaluator import (
    METRICS,
    COCOEvaluator,
    Truth,
    begin_evaluation,
)
from support.shapes import CLASSES, make_shapes

COUNTER = itertools.count()


def detections_of(coco, rng):
    """The true boxes, moved a little, some of them with another class."""
    results = []
    for annotation in coco.dataset["annotations"]:
        for _ in range(2):
            box = (np.array(annotation["bbox"]) + rng.normal(0, 2, 4)).clip(1).tolist()
            category = annotation["category_id"] if rng.random() < 0.7 else int(rng.integers(1, 4))
            results.append({
                "image_id": annotation["image_id"], "category_id": category, "bbox": box,
                "score": float(rng.random()),
            })
    return results


def oracle(coco, results, categories, most=100):
    """COCO's own summary of an evaluation of some categories alone, in per cent."""
    evaluation = COCOeval(coco, coco.loadRes([dict(r) for r in results]), "bbox")
    evaluation.params.catIds = categories
    evaluation.params.maxDets = [1, min(10, most), most]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.params.maxDets[2] = 100  # the only limit that the summary looks for
    evaluation.summarize()
    return [100 * value if value >= 0 else float("nan") for value in evaluation.stats[:6]]


def evaluate(annotations, results, names, **options):
    """Our evaluator's figures and messages; class numbers are categories less one."""
    key = f"{annotations}-{next(COUNTER)}"
    metadata = MetadataCatalog.get(key)
    metadata.set(json_file=str(annotations), thing_classes=list(names))
    evaluator = COCOEvaluator(key, distributed=False, **options)
    messages = []
    evaluator.reset()
    evaluator._predictions = [{"image_id": 1, "instances": [dict(r) for r in results]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.LOGGER, "info", messages.append)
        return evaluator.evaluate()["bbox"], messages


def test_the_table_agrees_with_coco(tmp_path, monkeypatch):
    """All classes and each, where sizes or a whole class, here named 1e5, have no objects."""
    annotations = make_shapes(tmp_path, images=8, size=[(64, 96), (300, 400)])
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 4, "name": "1e5"})
    annotations.write_text(json.dumps(content))
    coco, names = COCO(str(annotations)), [*CLASSES, "1e5"]
    results = detections_of(coco, np.random.default_rng(0))
    with monkeypatch.context() as patch:  # the evaluator is the fast one
        patch.delattr(COCOeval, "evaluateImg")
        figures, messages = evaluate(annotations, results, names)
    expected = {"all": oracle(coco, results, [1, 2, 3, 4])}
    expected |= {name: oracle(coco, results, [i]) for i, name in enumerate(names, start=1)}
    assert [figures[metric] for metric in METRICS] == pytest.approx(expected["all"], nan_ok=True)
    for name in names:
        assert figures[f"AP-{name}"] == pytest.approx(expected[name][0], nan_ok=True)
    assert 0 < figures["AP"] < 100 and figures["APm"] > 0

    tables = [message for message in messages if "AP50" in message]
    assert len(tables) == 1
    rows = [re.split(r"\s{2,}", line.strip()) for line in tables[0].splitlines()[1:]]
    assert rows[0] == ["bbox, %", *METRICS] and len(rows) == 2 + len(expected)
    for name, *cells in rows[2:]:
        shown = ["-" if math.isnan(value) else f"{value:.2f}" for value in expected[name]]
        assert cells == shown, name


def test_one_class_is_one_row(tmp_path):
    annotations = make_shapes(tmp_path)
    content = json.loads(annotations.read_text())
    content["categories"] = content["categories"][:1]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    annotations.write_text(json.dumps(content))
    coco = COCO(str(annotations))
    results = [{**r, "category_id": 1} for r in detections_of(coco, np.random.default_rng(0))]
    figures, messages = evaluate(annotations, results, CLASSES[:1])
    assert list(figures) == list(METRICS)
    assert list(figures.values()) == pytest.approx(oracle(coco, results, [1]), nan_ok=True)
    assert len(messages[-1].splitlines()) == 4


def random_coco(rng, images=40):
    """COCO data of classes 1 to 5, with crowds, images without objects, and none of class 5."""
    def boxes(count):
        return rng.uniform(0, 200, (count, 4)).round(rng.integers(0, 3)) * [1, 1, *rng.choice(
            [0, 0.05, 0.3, 1], 2, p=[0.1, 0.2, 0.3, 0.4])]

    annotations, results = [], []
    for image in range(1, images + 1):
        truth = boxes(rng.integers(1, 12)) if image % 5 else np.empty((0, 4))
        for box in truth.tolist():
            annotations.append({
                "id": len(annotations) + 1, "image_id": image,
                "category_id": int(rng.integers(1, 5)),
                "bbox": box, "area": box[2] * box[3] * 0.7, "iscrowd": int(rng.random() < 0.1),
            })
        if image % 7:  # the others have no detections
            near = truth[rng.integers(0, len(truth), 100)] if len(truth) else truth
            near = near + rng.normal(0, 2, near.shape) * (rng.random((len(near), 1)) < 0.8)
            for box in np.concatenate([near, boxes(100)]).clip(0).tolist():
                results.append({
                    "image_id": image, "bbox": box,
                    # Of class 1 more than the 100 that count.
                    "category_id": int(rng.choice(5, p=[0.6, 0.1, 0.1, 0.1, 0.1])) + 1,
                    "score": float(rng.integers(0, 8) / 8),  # many ties, within images and between
                })
    coco = COCO()
    coco.dataset = {
        "info": {}, "annotations": annotations,
        "images": [{"id": i, "width": 400, "height": 400} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 6)],
    }
    coco.createIndex()
    return coco, results


@pytest.mark.parametrize("seed", range(2))
def test_the_fast_evaluation_has_all_figures_of_pycocotools(seed):
    """Precision, recall and scores of each threshold, class, area and limit, and the summary."""
    coco, results = random_coco(np.random.default_rng(seed))
    evaluations, truth = [], Truth(coco.dataset)
    for evaluation in (
        COCOeval(coco, coco.loadRes([dict(r) for r in results]), "bbox"),
        begin_evaluation(truth, truth.loadRes(results), "bbox"),
    ):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        evaluations.append(evaluation)
    slow, fast = evaluations
    assert (slow.eval["precision"][:, :, 4] == -1).all() and slow.eval["precision"].max() > 0.1
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(fast.eval[name], slow.eval[name])
    np.testing.assert_allclose(fast.stats[:12], slow.stats, rtol=0, atol=1e-6)


def test_without_hotcoco_the_figures_are_the_same(tmp_path, monkeypatch):
    coco, results = random_coco(np.random.default_rng(3), images=10)
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(coco.dataset))
    fast, _ = evaluate(file, results, "12345")
    monkeypatch.setattr(module, "hotcoco", None)
    slow, _ = evaluate(file, results, "12345")
    assert slow == pytest.approx(fast, nan_ok=True) and fast["AP"] > 0


def renamed(coco, results, rename):
    """Both with other ids; annotation and category ids, too."""
    keys = ("id", "image_id", "category_id")

    def each(entries):
        return [{**e, **{key: rename(e[key]) for key in keys if key in e}} for e in entries]

    tables = {name: each(coco[name]) for name in ("images", "annotations", "categories")}
    return {**coco, **tables}, [
        {**r, "image_id": rename(r["image_id"]), "category_id": rename(r["category_id"])}
        for r in results
    ]


HOSTILE = {
    "zero": lambda i: i - 1,
    "negative": lambda i: -i,
    "above 2**53": lambda i: 2**53 + i,
    "above 2**63": lambda i: 2**63 + i,
    "above 2**64": lambda i: 2**127 + i,
    "endless": lambda i: 10**400 + i,
    "whole floats": float,
    "fractions": lambda i: i + 0.25,
    "text": lambda i: f"{i:04}",
    "text of any kind": lambda i: chr(0xD800 + i) + "\n",
    "mixed": lambda i: (i, str(i), -i, i + 0.5)[i % 4],
}


@pytest.fixture(scope="module")
def example():
    """Random data, with pycocotools's figures of all classes and of each."""
    coco, results = random_coco(np.random.default_rng(7), images=15)
    every = [1, 2, 3, 4, 5]
    return coco, results, [oracle(coco, results, chosen) for chosen in (every, *zip(every))]


@pytest.mark.parametrize("kind", HOSTILE)
def test_ids_of_any_kind_give_the_figures_of_ids_from_one(example, tmp_path, kind):
    """Equal scores of different images included, which count in the order of the file."""
    coco, results, (expected, *of_classes) = example
    hostile, found = renamed(coco.dataset, results, HOSTILE[kind])
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(hostile))
    classes = sorted(hostile["categories"], key=lambda c: (isinstance(c["id"], str), c["id"]))
    figures, _ = evaluate(file, found, [category["name"] for category in classes])
    assert [figures[metric] for metric in METRICS] == pytest.approx(expected, nan_ok=True)
    for name, expected in zip("12345", of_classes):
        assert figures[f"AP-{name}"] == pytest.approx(expected[0], nan_ok=True)


def test_equal_scores_count_in_the_order_of_coco_s_ids(example, tmp_path):
    """As COCO's own evaluation sorts them, whatever the order of the file."""
    coco, results, (expected, *_) = example
    content = {**coco.dataset, "images": coco.dataset["images"][::-1]}
    file = tmp_path / "reversed.json"
    file.write_text(json.dumps(content))
    figures, _ = evaluate(file, results, "12345")
    assert [figures[metric] for metric in METRICS] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("kind", ["text", "mixed", "negative"])
def test_detections_are_written_with_the_ids_of_the_file(tmp_path, kind):
    """From Detectron2's dictionaries on, through the model's class numbers."""
    annotations = make_shapes(tmp_path)
    coco = json.loads(annotations.read_text())
    rename = HOSTILE[kind]
    hostile, _ = renamed(coco, [], rename)
    annotations.write_text(json.dumps(hostile))
    records = coco_dataset(json_file=str(annotations), image_root=str(tmp_path / "images"))
    assert {r["image_id"] for r in records} == {image["id"] for image in hostile["images"]}
    evaluator = COCOEvaluator(str(annotations), distributed=False, output_dir=str(tmp_path))
    evaluator.reset()
    for record in records:
        boxes = torch.tensor([item["bbox"] for item in record["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([item["category_id"] for item in record["annotations"]])
        evaluator.process([record], [{"instances": Instances(
            (record["height"], record["width"]), pred_boxes=Boxes(boxes),
            scores=torch.ones(len(boxes)), pred_classes=classes,
        )}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())

    def described(rows):
        return sorted(repr((r["image_id"], r["category_id"], *map(float, r["bbox"]))) for r in rows)

    assert described(written) == described(hostile["annotations"])


def test_an_area_that_cannot_be_right_is_that_of_the_box(example, tmp_path):
    """All kinds of wrong areas in turn, and none at all."""
    coco, results, _ = example
    wrong = itertools.cycle([-5, 0, 1, 1e9, float("nan"), float("inf"), None, "9", ...])
    right, spoiled = COCO(), []
    right.dataset = {**coco.dataset, "annotations": []}
    for annotation in coco.dataset["annotations"]:
        _, _, w, h = annotation["bbox"]
        right.dataset["annotations"].append({**annotation, "area": w * h})
        area = {"area": next(wrong)}
        spoiled.append({**annotation, **area})
        if area["area"] is ...:
            del spoiled[-1]["area"]
    right.createIndex()
    file = tmp_path / "areas.json"
    file.write_text(json.dumps({**coco.dataset, "annotations": spoiled}))
    figures, _ = evaluate(file, results, "12345")
    expected = oracle(right, results, [1, 2, 3, 4, 5])
    assert [figures[metric] for metric in METRICS] == pytest.approx(expected, nan_ok=True)
    assert figures["APs"] > 0 and figures["APm"] > 0 and figures["APl"] > 0


@pytest.mark.parametrize("area, box, more, expected", [
    (400, [0, 0, 30, 40], {}, 400),  # a mask's
    (40, [0, 0, 30, 40], {}, 40),  # a thin line's
    (39, [0, 0, 30, 40], {}, 1200),
    (39, [0, 0, 30, 40], {"segmentation": []}, 1200),
    (3, [0, 0, 30, 40], {"segmentation": [[0, 0, 1, 0, 1, 1], [29, 39, 30, 39, 30, 40]]}, 3),
    (1, [0, 0, 30, 40], {"segmentation": [[0, 0, 30, 0, 30, 40, 0, 40]]}, 1200),
    (700, [0, 0, 30, 40], {"segmentation": [[0, 0, 30, 0, 30, 40, 0, 40]]}, 700),
    (1, [0, 0, 30, 40], {"segmentation": {"size": [40, 30], "counts": [0, 1200]}}, 1200),
    (31, [0, 0, 30, 40], {"segmentation": [[]]}, 1200),
    (31, [0, 0, 30, 40], {"segmentation": [[1, 2]]}, 1200),
    (31, [0, 0, 30, 40], {"segmentation": "a mask"}, 1200),
    (1300, [0, 0, 30, 40], {}, 1300),  # the rim of a mask
    (1345, [0, 0, 30, 40], {}, 1200),
    (9, [0, 0, -3, 40], {}, 0),
])
def test_the_bounds_of_an_area(area, box, more, expected):
    assert object_area({"area": area, "bbox": box, **more}) == expected


def test_a_compressed_mask_has_the_area_that_pycocotools_counts():
    pixels = np.zeros((40, 30), np.uint8, order="F")
    pixels[5:35, 3:27] = 1
    encoded = mask.encode(pixels)
    encoded["counts"] = encoded["counts"].decode()
    given = {"bbox": [0, 0, 30, 40], "segmentation": encoded}
    assert object_area({**given, "area": 720}) == 720
    assert object_area({**given, "area": 100}) == 1200


def test_annotations_of_nothing_known_are_not_evaluated():
    coco = {
        "images": [{"id": "a"}], "categories": [{"id": "b", "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": image, "category_id": category, "bbox": [0, 0, 9, 9]}
            for image, category in (("a", "b"), ("a", 7), (7, "b"))
        ],
    }
    numbered = NumberedCOCO(coco)
    assert [a["id"] for a in numbered.dataset["annotations"]] == [1]
    for image, category in (("a", 7), (7, "b")):
        result = {"image_id": image, "category_id": category, "bbox": [0, 0, 9, 9], "score": 1}
        with pytest.raises(ValueError, match="_id 7 is not in the ground truth"):
            numbered.loadRes([result])


@pytest.mark.parametrize("most", [5, 150])
def test_more_or_fewer_detections_can_count(tmp_path, most):
    """Against pycocotools; 150 objects of one class, all of them found."""
    boxes = [[20 * (i % 15), 20 * (i // 15), 10, 10] for i in range(150)]
    coco = COCO()
    coco.dataset = {
        "info": {}, "images": [{"id": 1}], "categories": [{"id": 1, "name": "dot"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
    }
    coco.createIndex()
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    file = tmp_path / "dots.json"
    file.write_text(json.dumps(coco.dataset))
    figures, messages = evaluate(file, results, ["dot"], max_dets_per_image=most)
    expected = oracle(coco, results, [1], most)
    assert [figures[metric] for metric in METRICS] == pytest.approx(expected, nan_ok=True)
    assert figures["AP"] == pytest.approx(100 * most / 150, abs=1)
    assert f"maxDets={most}" in messages[-1]
    figures, messages = evaluate(file, results, ["dot"])
    assert figures["AP"] < 70 and "maxDets" not in messages[-1]
