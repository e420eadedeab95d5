"""Checkpoints of small models, saved as a run saves them."""

import functools
import json

import pytest
import torch
from detectron2.config import instantiate

from projects.stageinteractor.config.overrides import load_config
from support.runs import ROOT, overrides
from support.shapes import make_shapes

RESIZE = "{_target_:detectron2.data.transforms.Resize,shape:[128,192]}"


IDS = [30, 10, 20]  # of the classes in the test set, in the order of their names there


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    annotations = make_shapes(folder, images=3, size=[(64, 96), (90, 70)])
    coco = json.loads(annotations.read_text())
    for entry, key in zip(coco["categories"], IDS):
        entry["id"] = key
    for entry in coco["annotations"]:
        entry["category_id"] = IDS[entry["category_id"] - 1]
    annotations.write_text(json.dumps(coco))
    return annotations


@pytest.fixture
def options(shapes, tmp_path):
    augmentations = {"dataloader.test.mapper.augmentations": f"[{RESIZE}]"}
    return overrides(shapes, tmp_path / "run", **augmentations)


@functools.cache
def random_weights(config, options):
    """Those that start at zero, too, without which no picture would matter."""
    torch.manual_seed(1)
    model = instantiate(load_config(str(ROOT / config), [*options]).model)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return model.state_dict()


def save_model(path, config, options, names=None):
    """Write a checkpoint of random weights, with the names of classes if there are any."""
    of_model = tuple(text for text in options if text.startswith("model."))
    content = {"model": random_weights(config, of_model)}
    torch.save({**content, "class_names": names} if names else content, path)
    return str(path)
