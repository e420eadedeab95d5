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

from projects.stageinteractor.engine.evaluator import METRICS, COCOEvaluator, FastCOCOeval


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
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image, category_id=int(rng.integers(1, 5)),
                bbox=box, area=box[2] * box[3] * 0.7, iscrowd=int(rng.random() < 0.1),
            ))
        if image % 7:  # the others have no detections
            near = truth[rng.integers(0, len(truth), 100)] if len(truth) else truth
            near = near + rng.normal(0, 2, near.shape) * (rng.random((len(near), 1)) < 0.8)
            for box in np.concatenate([near, boxes(100)]).clip(0).tolist():
                results.append(dict(
                    image_id=image, bbox=box,
                    # Of class 1 more than the 100 that count.
                    category_id=int(rng.choice(5, p=[0.6, 0.1, 0.1, 0.1, 0.1])) + 1,
                    score=float(rng.integers(0, 8) / 8),  # many ties, within images and between
                ))
    coco = COCO()
    coco.dataset = dict(
        info={}, annotations=annotations,
        images=[dict(id=i, width=400, height=400) for i in range(1, images + 1)],
        categories=[dict(id=i, name=str(i)) for i in range(1, 6)],
    )
    coco.createIndex()
    return coco, results


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_evaluation_has_all_figures_of_pycocotools(seed):
    """Precision, recall and scores of each threshold, class, area and limit, and the summary."""
    coco, results = random_coco(np.random.default_rng(seed))
    evaluations = []
    for kind in (COCOeval, FastCOCOeval):
        evaluation = kind(coco, coco.loadRes([dict(r) for r in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        evaluations.append(evaluation)
    slow, fast = evaluations
    assert (slow.eval["precision"][:, :, 4] == -1).all() and slow.eval["precision"].max() > 0.1
    for name in ("precision", "recall", "scores"):
        np.testing.assert_allclose(fast.eval[name], slow.eval[name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fast.stats[:12], slow.stats, rtol=0, atol=1e-6)
