"""What a DETR-like detector of detrex trains with: a matcher and a criterion, layer by layer.

`Matcher` and `OrdinaryCriterion` are detrex's own if tests/support/detrex.py finds a checkout.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

from projects.stageinteractor.modeling import HungarianMatcher
from projects.stageinteractor.modeling.targets import Targets, pad_objects
from tests.support import detrex


def corners(boxes):
    return box_convert(boxes, "cxcywh", "xyxy")


class StandInMatcher(nn.Module):
    """One layer and the targets to the matched queries and objects of each image."""

    def __init__(self):
        super().__init__()
        self.hungarian = HungarianMatcher()

    def forward(self, outputs, targets):
        boxes, labels = pad_objects([t["boxes"] for t in targets], [t["labels"] for t in targets])
        objects = Targets(
            corners(boxes), labels, boxes.new_ones(len(boxes), 1, 4),
            tuple(len(t["labels"]) for t in targets),
        )
        predicted = corners(outputs["pred_boxes"])
        match = self.hungarian(outputs["pred_logits"][None], predicted[None], objects)[0].cpu()
        queries = [image.ge(0).nonzero().flatten() for image in match]
        return [(chosen, image[chosen]) for chosen, image in zip(queries, match)]


class StandInCriterion(nn.Module):
    """One-to-one labels of every layer, with detrex's arithmetic and detrex's names."""

    def __init__(self, *, num_classes, matcher, weight_dict, losses, loss_class_type, alpha, gamma):
        super().__init__()
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.alpha, self.gamma = alpha, gamma

    def forward(self, outputs, targets):
        number = max(sum(len(image["labels"]) for image in targets), 1)
        losses = self.of_layer(outputs, targets, self.matcher(outputs, targets), number)
        for index, layer in enumerate(outputs.get("aux_outputs", [])):
            own = self.of_layer(layer, targets, self.matcher(layer, targets), number)
            losses.update({f"{name}_{index}": value for name, value in own.items()})
        return losses

    def of_layer(self, layer, targets, indices, number):
        logits, classes = layer["pred_logits"], torch.zeros_like(layer["pred_logits"])
        predicted, wanted = [], []
        for image, (queries, objects) in enumerate(indices):
            classes[image, queries, targets[image]["labels"][objects]] = 1
            predicted.append(layer["pred_boxes"][image, queries])
            wanted.append(targets[image]["boxes"][objects])
        predicted, wanted = torch.cat(predicted), torch.cat(wanted)
        return {
            "loss_class": self.focal(logits, classes).mean(1).sum() / number * logits.shape[1],
            "loss_bbox": F.l1_loss(predicted, wanted, reduction="none").sum() / number,
            "loss_giou": (1 - giou(corners(predicted), corners(wanted))).sum() / number,
        }

    def focal(self, logits, classes):
        p = logits.sigmoid()
        right = p * classes + (1 - p) * (1 - classes)
        balance = self.alpha * classes + (1 - self.alpha) * (1 - classes)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, classes, reduction="none")
        return balance * (cross_entropy * (1 - right) ** self.gamma)


def giou(a, b):
    """Of boxes (M, 4) and (M, 4), pair by pair."""
    def area(low, high):
        width, height = (high - low).clamp(min=0).unbind(-1)
        return width * height

    shared = area(torch.max(a[:, :2], b[:, :2]), torch.min(a[:, 2:], b[:, 2:]))
    union = area(a[:, :2], a[:, 2:]) + area(b[:, :2], b[:, 2:]) - shared
    hull = area(torch.min(a[:, :2], b[:, :2]), torch.max(a[:, 2:], b[:, 2:]))
    return shared / (union + 1e-6) - (hull - union) / (hull + 1e-6)


if detrex.CHECKOUT:
    from detrex.modeling import HungarianMatcher as DetrexMatcher
    from detrex.modeling import SetCriterion as OrdinaryCriterion

    class Matcher(DetrexMatcher):
        """With the weights of all its projects."""

        def __init__(self):
            super().__init__(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0)
else:
    Matcher, OrdinaryCriterion = StandInMatcher, StandInCriterion
