"""Predictions and objects as DETR-like detectors of detrex have them, and slow losses of them."""

import math

import torch

from projects.stageinteractor.modeling import CrossStageLabelAssigner
from projects.stageinteractor.plugins.cross_stage_criterion import CrossStageCriterion
from tests.support.small_detr.ordinary import Matcher

CLASSES, LAYERS, QUERIES = 3, 4, 6
NAMES = ("loss_class", "loss_bbox", "loss_giou")
ORDINARY = {
    "num_classes": CLASSES, "weight_dict": {}, "losses": ["class", "boxes"],
    "loss_class_type": "focal_loss",
    "alpha": 0.25, "gamma": 2.0,
}
COUNTS = [[3, 5], [0, 0], [0, 4], [9, 2], [1]]  # objects of each image; one has 9 for 6 queries
ONE_TO_ONE = {"scope": (0, 0), "iou_threshold": 0.0}


def build(weight_dict=None, two_stage_binary_cls=False, matcher=None, **options):
    """Our criterion; options are the assigner's."""
    return CrossStageCriterion(**{
        **ORDINARY,
        "matcher": matcher or Matcher(),
        "label_assigner": CrossStageLabelAssigner(**options),
        "weight_dict": weight_dict or {},
        "two_stage_binary_cls": two_stage_binary_cls,
    })


def make_targets(counts):
    """Objects of three classes, so that some share one."""
    return [
        {
            "labels": torch.randint(CLASSES, (count,)),
            "boxes": torch.rand(count, 4) * 0.4 + torch.tensor([0.3, 0.3, 0.1, 0.1]),
        }
        for count in counts
    ]


def make_outputs(targets, layers=LAYERS, queries=QUERIES, grad=True):
    """Predictions near the objects, so that a threshold decides something."""
    outputs = []
    for _ in range(layers):
        boxes = torch.rand(len(targets), queries, 4) * 0.4 + 0.2
        for image, objects in zip(boxes, targets):
            for query in range(queries if len(objects["boxes"]) else 0):
                image[query] = objects["boxes"][torch.randint(len(objects["boxes"]), ())]
        boxes = boxes * (1 + torch.rand_like(boxes) / 4)
        outputs.append({
            "pred_logits": torch.randn(len(targets), queries, CLASSES).requires_grad_(grad),
            "pred_boxes": boxes.requires_grad_(grad),
        })
    return {**outputs[-1], "aux_outputs": outputs[:-1]}


def with_gradients(criterion, outputs, targets, *arguments):
    """Losses, and gradients of all predictions by their sum."""
    losses = criterion(outputs, targets, *arguments)
    leaves = [
        layer[name] for layer in (*outputs["aux_outputs"], outputs)
        for name in ("pred_logits", "pred_boxes")
    ]
    return losses, torch.autograd.grad(sum(losses.values()), leaves)


def slow_iou(a, b):
    """Of two boxes (cx, cy, w, h), in plain Python."""
    shared = 1
    for axis in range(2):
        low = max(box[axis] - box[axis + 2] / 2 for box in (a, b))
        high = min(box[axis] + box[axis + 2] / 2 for box in (a, b))
        shared *= max(high - low, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def slow_focal(logits, labels):
    """Of one query (C,), which has the labels of a set."""
    total = 0
    for index, logit in enumerate(logits.tolist()):
        p = 1 / (1 + math.exp(-logit))
        total += 0.25 * (1 - p) ** 2 * -math.log(p) if index in labels else (
            0.75 * p**2 * -math.log(1 - p)
        )
    return total


def slow_giou(a, b):
    iou, hull = slow_iou(a, b), 1
    for axis in range(2):
        low = min(box[axis] - box[axis + 2] / 2 for box in (a, b))
        high = max(box[axis] + box[axis + 2] / 2 for box in (a, b))
        hull *= high - low
    union = (a[2] * a[3] + b[2] * b[3]) / (1 + iou)
    return iou - (hull - union) / hull
