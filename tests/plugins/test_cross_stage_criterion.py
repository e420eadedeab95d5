"""Cross-stage labels in detectors of detrex change the class targets of decoder layers, no more."""

import itertools
import math

import pytest
import torch
from detectron2.utils.events import EventStorage

from projects.stageinteractor.plugins import cross_stage_criterion
from support.detr_outputs import (
    CLASSES,
    COUNTS,
    LAYERS,
    NAMES,
    ONE_TO_ONE,
    ORDINARY,
    QUERIES,
    build,
    make_outputs,
    make_targets,
    slow_focal,
    slow_giou,
    slow_iou,
    with_gradients,
)
from tests.support.small_detr.ordinary import Matcher, OrdinaryCriterion, StandInMatcher

# ---- one-to-one labels are those of the ordinary criterion


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_own_layer_without_threshold_is_the_ordinary_criterion_to_the_bit(counts, layers):
    """Losses and gradients."""
    targets = make_targets(counts)
    outputs = make_outputs(targets, layers)
    ordinary = OrdinaryCriterion(matcher=Matcher(), **ORDINARY)
    expected, expected_gradients = with_gradients(ordinary, outputs, targets)
    losses, gradients = with_gradients(build(**ONE_TO_ONE), outputs, targets)
    assert list(losses) == list(expected) and len(losses) == 3 * layers  # the order of the sum
    for name, loss in losses.items():
        assert torch.equal(loss, expected[name]), name
    assert all(map(torch.equal, gradients, expected_gradients))
    assert (losses["loss_class"] > 0) and (losses["loss_bbox"] > 0) == (sum(counts) > 0)


# ---- class targets come from all layers


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_class_losses_equal_a_slow_loop(counts):
    """One query at a time: what it won from one layer back to the last one, if its box fits."""
    targets = make_targets(counts)
    outputs = make_outputs(targets, grad=False)
    layers = [*outputs["aux_outputs"], outputs]
    won = [
        [dict(zip(*map(torch.Tensor.tolist, pair))) for pair in Matcher()(layer, targets)]
        for layer in layers
    ]
    losses, differs = build()(outputs, targets), False
    for index, layer in enumerate(layers):
        total = number = 0
        for image, query in itertools.product(range(len(targets)), range(QUERIES)):
            offers = {won[j][image].get(query) for j in range(max(index - 1, 0), LAYERS)} - {None}
            box, objects = layer["pred_boxes"][image, query].tolist(), targets[image]
            labels = {
                objects["labels"][offer].item() for offer in offers
                if slow_iou(box, objects["boxes"][offer].tolist()) >= 0.5
            }
            own = won[index][image].get(query)
            differs |= labels != (set() if own is None else {objects["labels"][own].item()})
            total += slow_focal(layer["pred_logits"][image, query], labels)
            number += len(labels)
        name = "loss_class" if index == LAYERS - 1 else f"loss_class_{index}"
        expected = total / max(number, sum(counts), 1)
        assert losses[name].item() == pytest.approx(expected, rel=1e-5), name
    assert differs == (sum(counts) > 0), "or the labels were one-to-one anyway"


def test_many_labels_divide_the_class_loss():
    """Two queries have the only object in turn: three layers, four labels in the last two."""
    box, away = [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([box])}]
    logits = torch.zeros(1, 2, CLASSES)
    places = ([box, away], [away, box], [box, box])
    layers = [{"pred_logits": logits, "pred_boxes": torch.tensor([rows])} for rows in places]
    matches = iter([0, 1, 0])

    def matcher(layer, targets):
        return [(torch.tensor([next(matches)]), torch.tensor([0]))]

    losses = build(matcher=matcher)({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    positive, negative = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)
    assert losses["loss_class_0"].item() == pytest.approx(positive + 5 * negative)
    assert losses["loss_class"].item() == pytest.approx((2 * positive + 4 * negative) / 2)
    assert losses["loss_giou"].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_boxes_are_taught_as_ever(counts):
    targets = make_targets(counts)
    outputs = make_outputs(targets)
    expected = OrdinaryCriterion(matcher=Matcher(), **ORDINARY)(outputs, targets)
    losses = build()(outputs, targets)
    boxes = [name for name in losses if "class" not in name]
    assert len(boxes) == 2 * LAYERS
    assert all(torch.equal(losses[name], expected[name]) for name in boxes)
    losses["loss_class"].backward()
    assert outputs["pred_boxes"].grad is None, "no gradient through the assignment"


def test_shares_of_labels_are_logged():
    targets = make_targets([4, 4])
    outputs = make_outputs(targets)
    with EventStorage() as storage:
        build(**ONE_TO_ONE)(outputs, targets)
        shares = {name: value for name, (value, _) in storage.latest().items()}
    assert shares == {"labels/kept": 1, "labels/dropped": 0, "labels/gained": 0}
    with EventStorage() as storage:
        build()(outputs, targets)
        shares = {name: value for name, (value, _) in storage.latest().items()}
    assert shares["labels/kept"] + shares["labels/dropped"] == 1 and shares["labels/gained"] > 0


# ---- encoder outputs and denoising queries are left alone


@pytest.mark.parametrize("binary", [False, True])
def test_proposals_of_the_encoder_are_taught_one_to_one(binary):
    """By the ordinary criterion of a detector that had no other layer."""
    targets = make_targets([3, 2])
    outputs = make_outputs(targets)
    proposals = make_outputs(targets, layers=1, queries=12)
    outputs["enc_outputs"] = {name: proposals[name] for name in ("pred_logits", "pred_boxes")}
    labels = [image["labels"].clone() for image in targets]
    losses = build(two_stage_binary_cls=binary)(outputs, targets)
    assert all(map(torch.equal, labels, (image["labels"] for image in targets)))
    objects = [
        {**image, "labels": image["labels"] * (not binary)} for image in targets
    ]
    expected = OrdinaryCriterion(matcher=Matcher(), **ORDINARY)(proposals, objects)
    for name in NAMES:
        assert torch.equal(losses[f"{name}_enc"], expected[name])


@pytest.mark.parametrize("counts", [[2, 3], [0, 1], [1]], ids=str)
def test_denoising_queries_equal_a_slow_loop(counts):
    """DINO's: in each group, first a query for each object, then as many that hold none."""
    targets, groups, size = make_targets(counts), 2, 2 * max(counts)
    outputs = make_outputs(targets)
    known = make_outputs(targets, queries=groups * size, grad=False)
    dn_metas = {"output_known_lbs_bboxes": known, "dn_num": groups, "single_padding": size}
    losses = build({"loss_class_dn": 1})(outputs, targets, dn_metas)
    assert len(losses) == 6 * LAYERS
    for index, layer in enumerate([*known["aux_outputs"], known]):
        suffix = "_dn" if index == LAYERS - 1 else f"_dn_{index}"
        total = dict.fromkeys(NAMES, 0)
        for image, query in itertools.product(range(len(counts)), range(groups * size)):
            labels, number = set(), query % size
            if number < counts[image]:
                wanted = targets[image]["boxes"][number]
                predicted = layer["pred_boxes"][image, query]
                labels = {targets[image]["labels"][number].item()}
                total["loss_bbox"] += (wanted - predicted).abs().sum().item()
                total["loss_giou"] += 1 - slow_giou(predicted.tolist(), wanted.tolist())
            total["loss_class"] += slow_focal(layer["pred_logits"][image, query], labels)
        for name in NAMES:
            expected = total[name] / (groups * sum(counts))
            assert losses[name + suffix].item() == pytest.approx(expected, rel=1e-4), name + suffix
    other = build({"loss_class_dn": 1}, **ONE_TO_ONE)(outputs, targets, dn_metas)
    assert all(torch.equal(losses[name], other[name]) for name in losses if "_dn" in name)


# ---- precision, processes, numbers that are not finite


def test_losses_are_float32_under_autocast():
    targets = make_targets([2, 3])
    outputs = make_outputs(targets)
    expected = build()(outputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = build()(outputs, targets)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    for layer in (outputs, *outputs["aux_outputs"]):
        layer["pred_logits"] = layer["pred_logits"].bfloat16()
    assert {loss.dtype for loss in build()(outputs, targets).values()} == {torch.float32}


def test_normalisers_are_means_over_processes(monkeypatch):
    """Another process without objects halves them."""
    targets = make_targets([3, 5])
    outputs = make_outputs(targets)
    expected = build()(outputs, targets)
    monkeypatch.setattr(cross_stage_criterion, "average_over_ranks", lambda count: count / 2)
    for name, loss in build()(outputs, targets).items():
        assert torch.equal(loss, 2 * expected[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_crash_nothing(bad):
    """And reach only the losses of their own layer."""
    targets = make_targets([2, 3])
    outputs = make_outputs(targets, grad=False)
    outputs["aux_outputs"][1]["pred_boxes"][0, 2] = bad
    outputs["aux_outputs"][1]["pred_logits"][1] = float("nan")
    losses = build(matcher=StandInMatcher())(outputs, targets)  # detrex's own ends in an error
    assert not losses["loss_class_1"].isfinite()
    assert all(loss.isfinite() for name, loss in losses.items() if not name.endswith("_1"))
