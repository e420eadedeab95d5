"""Runs of ``tools/demo.py`` in this process, without a trained model."""

import json

import demo
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

CATEGORIES = [{"id": 7, "name": "$a_ä"}, {"id": 3, "name": "b\n"}]


def detect(boxes, scores, classes, size):
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


class Finder:
    """In place of a trained model: finds the left half, the right half and, barely, everything."""

    categories, class_names = CATEGORIES, [category["name"] for category in CATEGORIES]
    calls = 0

    def __call__(self, image, threshold):
        assert image.dtype == np.uint8 and image.shape[2] == 3
        self.calls += 1
        h, w = image.shape[:2]
        boxes = [[0, 0, w / 2, h], [w / 2, 0, w, h], [0, 0, w, h]]
        found = detect(boxes, [0.9, 0.5, 0.2], [0, 1, 1], (h, w))
        return found[found.scores >= threshold]


def run(output, *inputs, option=("--input",), more=()):
    """The JSON file of the real command."""
    arguments = ["--config-file", "c", "--checkpoint", "f", *option, *inputs, "--output", output]
    demo.main([*map(str, arguments), *more])
    return json.loads((output / "detections.json").read_text())


def fail(output, *inputs, **options):
    """The line that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        run(output, *inputs, **options)
    assert str(ended.value).startswith("error: ")
    return str(ended.value)


def save(path, size=(40, 30), color=(90, 120, 150), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def file_names(coco):
    return [image["file_name"] for image in coco["images"]]
