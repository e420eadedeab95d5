"""The table of an evaluation has COCO's own figures, for all classes and for each."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shapes import CLASSES, make_shapes

from projects.stageinteractor.engine.evaluator import METRICS, COCOEvaluator


def detections_of(coco, rng):
    """The true boxes, moved a little, some of them with another class."""
    results = []
    for annotation in coco.dataset["annotations"]:
        for _ in range(2):
            box = (np.array(annotation["bbox"]) + rng.normal(0, 2, 4)).clip(1).tolist()
            category = annotation["category_id"] if rng.random() < 0.7 else int(rng.integers(1, 4))
            results.append(dict(
                image_id=annotation["image_id"], category_id=category, bbox=box,
                score=float(rng.random()),
            ))
    return results


def oracle(coco, results, categories):
    """COCO's own summary of an evaluation of some categories alone, in per cent."""
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.params.catIds = categories
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [100 * value if value >= 0 else float("nan") for value in evaluation.stats[:6]]


def evaluate(annotations, results, names):
    """Our evaluator's figures and messages; class numbers are categories less one."""
    key = f"{annotations}-{len(names)}"
    metadata = MetadataCatalog.get(key)
    metadata.set(json_file=str(annotations), thing_classes=list(names))
    evaluator = COCOEvaluator(key, distributed=False)
    messages = []
    evaluator._logger = SimpleNamespace(info=messages.append, warn=messages.append)
    evaluator.reset()
    evaluator._predictions = [{"image_id": 1, "instances": [dict(r) for r in results]}]
    return evaluator.evaluate()["bbox"], messages


def test_the_table_agrees_with_coco(tmp_path):
    """All classes and each, where sizes or a whole class, here named 1e5, have no objects."""
    annotations = make_shapes(tmp_path, images=8, size=[(64, 96), (300, 400)])
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 4, "name": "1e5"})
    annotations.write_text(json.dumps(content))
    coco, names = COCO(str(annotations)), [*CLASSES, "1e5"]
    results = detections_of(coco, np.random.default_rng(0))
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
