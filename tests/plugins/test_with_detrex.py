"""Losses, gradients and boxes equal those of detrex itself to the bit, with one-to-one labels."""

import importlib

import pytest
import torch

from projects.stageinteractor.modeling import HungarianMatcher, boxes
from projects.stageinteractor.modeling.targets import Targets, pad_objects
from projects.stageinteractor.plugins.cross_stage_criterion import to_corners
from support.detr_outputs import (
    CLASSES,
    COUNTS,
    LAYERS,
    ONE_TO_ONE,
    build,
    make_outputs,
    make_targets,
    with_gradients,
)
from support.detrex import needs_detrex
from tests.support.small_detr.ordinary import Matcher

pytestmark = needs_detrex


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    """DINO's criterion sends its indices to CUDA."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


def theirs(path, **options):
    """A criterion of a project of detrex."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"projects.{module}"), name)(
        num_classes=CLASSES, matcher=Matcher(), weight_dict={}, **options
    )


def check_equal(ours, theirs, outputs, targets, *arguments):
    expected, expected_gradients = with_gradients(theirs, outputs, targets, *arguments)
    losses, gradients = with_gradients(ours, outputs, targets, *arguments)
    assert {*losses} == {*expected}
    for name, loss in losses.items():
        assert torch.equal(loss, expected[name]), name
    assert all(map(torch.equal, gradients, expected_gradients))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("path, binary", [
    ("deformable_detr.modeling.deformable_criterion.DeformableCriterion", True),
    ("dab_deformable_detr.modeling.two_stage_criterion.TwoStageCriterion", False),
])
def test_two_stages(path, binary, counts):
    targets = make_targets(counts)
    outputs = make_outputs(targets)
    outputs["enc_outputs"] = make_outputs(targets, layers=1, queries=12)
    del outputs["enc_outputs"]["aux_outputs"]
    ours = build(two_stage_binary_cls=binary, **ONE_TO_ONE)
    check_equal(ours, theirs(path), outputs, targets)


@pytest.mark.parametrize("counts", [[2, 3], [0, 1], [1]], ids=str)
def test_denoising_of_dino(counts):
    targets, groups, size = make_targets(counts), 2, 2 * max(counts)
    outputs = make_outputs(targets)
    outputs["enc_outputs"] = make_outputs(targets, layers=1)
    known = make_outputs(targets, queries=groups * size, grad=False)
    metas = {"output_known_lbs_bboxes": known, "dn_num": groups, "single_padding": size}
    ours = build({"loss_class_dn": 1.0}, **ONE_TO_ONE)
    criterion = theirs("dino.modeling.dn_criterion.DINOCriterion")
    check_equal(ours, criterion, outputs, targets, metas)


def test_functions_of_boxes():
    from detrex.layers import box_ops

    a = torch.rand(40, 4) / 2 + 0.1
    b = a[torch.randperm(40)] * (1 + torch.rand(40, 4) / 9)
    assert torch.equal(to_corners(a), box_ops.box_cxcywh_to_xyxy(a))
    corners = to_corners(a), to_corners(b)
    pairs = corners[0][:, None], corners[1][None]
    expected = box_ops.generalized_box_iou(*corners)
    torch.testing.assert_close(boxes.generalized_box_iou(*pairs), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        boxes.box_iou(*pairs), box_ops.box_iou(*corners)[0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("weight, equal", [(0.0, True), (5.0, False)])
def test_the_matcher_differs_in_the_distance_of_boxes_alone(weight, equal):
    """Ours is of corners, detrex's of centre and size."""
    from detrex.modeling import HungarianMatcher as DetrexMatcher

    matchers = (matcher(cost_class=2.0, cost_bbox=weight, cost_giou=2.0)
                for matcher in (HungarianMatcher, DetrexMatcher))
    ours, detrex = matchers
    same = total = 0
    for _ in range(20):
        targets = make_targets([3, 5])
        outputs = make_outputs(targets, LAYERS, queries=20, grad=False)
        objects, labels = pad_objects(
            [t["boxes"] for t in targets], [t["labels"] for t in targets]
        )
        table = Targets(to_corners(objects), labels, torch.ones(2, 1, 4), (3, 5))
        logits, predicted = outputs["pred_logits"], to_corners(outputs["pred_boxes"])
        match = ours(logits[None], predicted[None], table)[0]
        for image, (queries, numbers) in enumerate(detrex(outputs, targets)):
            same += (match[image, queries] == numbers).sum().item()
            total += len(numbers)
    assert (same == total) == equal and same > total / 2
