"""What COCO's server gets for a test set without annotations."""

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.engine.evaluator import COCOEvaluator
from support.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"


def write_image_info(annotations, path, categories):
    """What COCO publishes of a test set: `annotations` without annotations, other categories."""
    coco = json.loads(annotations.read_text())
    del coco["annotations"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**coco, "categories": categories}))
    return path


def read_submission(path):
    """The detections in a zip file that holds one JSON file of the same name."""
    with zipfile.ZipFile(path) as file:
        assert file.namelist() == [f"{path.stem}.json"]
        return json.loads(file.read(file.namelist()[0]))


def load_with_pycocotools(image_info, rows):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(image_info)).loadRes(copy.deepcopy(rows))  # it adds to the rows


def make_instances(number):
    """Random detections of three classes, in no order of their scores."""
    rng = np.random.default_rng(number)
    corners = np.sort(rng.uniform(0, 64, (number, 2, 2)), axis=1).reshape(number, 4)
    instances = Instances((64, 96))
    instances.pred_boxes = Boxes(torch.tensor(corners))
    instances.scores = torch.tensor(rng.uniform(0, 1, number))
    instances.pred_classes = torch.tensor(rng.integers(0, 3, number))
    return instances


@pytest.fixture
def evaluate(tmp_path):
    """Gives an evaluator detections for the images 1, 2 and 3, and returns its figures."""
    annotations = make_shapes(tmp_path, images=3, size=(64, 96))

    def evaluate(name, json_file, numbers):
        register_coco_instances(name, {}, str(json_file), str(tmp_path / "images"))
        DatasetCatalog.get(name)  # the classes become known as the images are loaded
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
        evaluator.reset()
        given = {image_id: make_instances(n) for image_id, n in enumerate(numbers, start=1)}
        for image_id, instances in given.items():
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        return given, evaluator.evaluate()

    evaluate.annotations = annotations
    return evaluate


def test_the_file_holds_the_best_detections(tmp_path, evaluate):
    ids = [2, 5, 90]
    categories = [{"id": i, "name": str(i)} for i in ids]
    image_info = write_image_info(
        evaluate.annotations, tmp_path / "image_info_test-dev2017.json", categories
    )
    given, figures = evaluate(str(tmp_path / "test"), image_info, [150, 7, 0])
    assert figures == {}
    rows = read_submission(tmp_path / "out/detections_test-dev2017_stageinteractor_results.zip")
    load_with_pycocotools(image_info, rows)
    assert [row["image_id"] for row in rows] == [1] * 100 + [2] * 7
    for image_id, kept in ((1, 100), (2, 7)):
        best = given[image_id].scores.argsort(descending=True)[:kept]
        found = [row for row in rows if row["image_id"] == image_id]
        for row, index in zip(found, best.tolist()):
            x1, y1, x2, y2 = given[image_id].pred_boxes.tensor[index].tolist()
            assert row == {
                "image_id": image_id,
                "category_id": ids[given[image_id].pred_classes[index]],
                "bbox": [pytest.approx(v, abs=0.0051) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": pytest.approx(given[image_id].scores[index].item(), abs=5.1e-6),
            }
    assert len(json.dumps(rows)) / len(rows) < 110  # numbers are rounded


def test_a_data_set_with_annotations_gets_figures_and_no_submission(tmp_path, evaluate):
    _, figures = evaluate(str(tmp_path / "val"), evaluate.annotations, [150, 7, 0])
    assert figures["bbox"]["AP"] >= 0
    assert not list((tmp_path / "out").glob("*.zip"))


@pytest.mark.slow
def test_the_command_for_test_dev(tmp_path):
    """COCO's own layout, names and ids, with every image in one of two processes."""
    annotations = make_shapes(tmp_path / "coco", images=5, size=[(64, 96), (80, 64)])
    (tmp_path / "coco/images").rename(tmp_path / "coco/test2017")
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    image_info = write_image_info(
        annotations, tmp_path / "coco/annotations/image_info_test-dev2017.json", things
    )
    options = [
        "train.device=cpu",
        f"train.init_checkpoint={tmp_path}/model.pth",
        f"train.output_dir={tmp_path}/out",
        "model.decoder.points_per_stage=[8,8,8]",
        "model.decoder.embed_dim=32",
        "model.decoder.feature_dim=32",
        "model.query_generator.num_queries=120",
        "dataloader.test.dataset.names=coco_2017_test-dev",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "dataloader.test.num_workers=0",
        "dataloader.evaluator._target_=projects.stageinteractor.engine.evaluator.COCOEvaluator",
    ]
    model = instantiate(load_config(str(ROOT / CONFIG), options).model)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    done = subprocess.run(
        [sys.executable, "tools/train_net.py", "--config-file", CONFIG,
         "--eval-only", "--num-gpus", "2", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
            "DETECTRON2_DATASETS": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path = tmp_path / "out/eval/detections_test-dev2017_stageinteractor_results.zip"
    assert f"Submission: {path}" in done.stdout + done.stderr
    rows = read_submission(path)
    results = load_with_pycocotools(image_info, rows)
    assert [len(results.getAnnIds(imgIds=[i])) for i in range(1, 6)] == [100] * 5
    ids = {thing["id"] for thing in things}
    assert {row["category_id"] for row in rows} <= ids
