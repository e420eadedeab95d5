"""Small checkpoints that carry their config."""

import json

import torch
from detectron2.config import instantiate

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.portable_config import portable_config
from support.models import CONFIGS, tiny_config

CLASSES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "a\"ö\n"}]


def small():
    """The configuration of `test_model.tiny_config` with two classes, resizing its images."""
    cfg = load_config(str(next(c for c in CONFIGS if c.stem == "stageinteractor_lite0_bccd")), [])
    cfg.model = tiny_config()
    cfg.model.decoder.num_classes = 2
    return cfg


def save(folder, cfg, text=None, names=("cat", "a\"ö\n")):
    """A checkpoint as training writes it."""
    torch.manual_seed(0)
    text = portable_config(cfg, CLASSES) if text is None else text
    model = instantiate(cfg.model)
    SafeCheckpointer(model, str(folder), class_names=names, config=text).save("model")
    return str(folder / "model.pth")


def changed(key, value):
    """The text of a good config with one value changed."""
    content = json.loads(portable_config(small(), CLASSES))
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        node = node[parent]
    node[last] = value
    return json.dumps(content)
