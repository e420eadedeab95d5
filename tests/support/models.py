"""Small models, and images for them."""

from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances

ROOT = Path(__file__).resolve().parents[2]


CONFIGS = sorted((ROOT / "projects/stageinteractor/configs").glob("*.py"))


TREES = ROOT / "projects/stageinteractor/configs/stageinteractor_lite0_trees.py"


def tiny_config():
    """The small configuration, smaller still."""
    cfg = LazyConfig.load(str(TREES)).model
    cfg.query_generator.num_queries = 12
    cfg.decoder.update(embed_dim=32, feature_dim=16, ffn_dim=32, num_classes=5)
    cfg.backbone.frozen_modules = []
    return cfg


def build(seed=0):
    torch.manual_seed(seed)
    return instantiate(tiny_config())


def wake(model):
    """Give the layers that start at zero random weights: they block most gradients otherwise."""
    for parameter in model.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_image(height, width, objects=2):
    corner = torch.rand(objects, 2) * torch.tensor([width, height]) / 2
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corner, corner + 12], dim=1))
    instances.gt_classes = torch.randint(5, (objects,))
    return {"image": torch.rand(3, height, width) * 255, "instances": instances}
