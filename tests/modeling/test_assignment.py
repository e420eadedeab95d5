"""Matching, cross-stage labels and losses agree with slow oracles, in every corner case."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from projects.stageinteractor.modeling import (
    CrossStageLabelAssigner,
    HungarianMatcher,
    SetCriterion,
)
from projects.stageinteractor.modeling.boxes import (
    box_iou,
    corners_to_xyzr,
    generalized_box_iou,
    pairwise_iof,
    xyzr_to_corners,
)
from projects.stageinteractor.modeling.criterion import log_assignment
from projects.stageinteractor.modeling.decoder import DecoderOutput
from projects.stageinteractor.modeling.targets import gather_targets

SIZE = (100, 120)  # height, width


def make_targets(*images):
    """Each image: [(box, label), ...], boxes in pixels."""
    instances = []
    for objects in images:
        image = Instances(SIZE)
        image.gt_boxes = Boxes(torch.tensor([box for box, _ in objects]).reshape(-1, 4).float())
        image.gt_classes = torch.tensor([label for _, label in objects], dtype=torch.long)
        instances.append(image)
    return gather_targets(instances, [SIZE] * len(images), torch.device("cpu"))


def random_boxes(*shape):
    corner = torch.rand(*shape, 2) * 60
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2) * 40], dim=-1)


def random_targets(counts, num_classes=4):
    return make_targets(
        *(
            [(box, int(torch.randint(num_classes, ()))) for box in random_boxes(count).tolist()]
            for count in counts
        )
    )


# ---- overlaps


def scalar_overlaps(a, b):
    """IoU and generalised IoU of two boxes, in plain Python."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = width * height / union
    return iou, iou - (hull - union) / hull, width * height / areas[0]


def test_overlaps_equal_plain_python():
    a, b = random_boxes(20), random_boxes(20)
    expected = [scalar_overlaps(x, y) for x, y in zip(a.tolist(), b.tolist())]
    iou, giou, _ = torch.tensor(expected).unbind(-1)
    torch.testing.assert_close(box_iou(a, b), iou, atol=1e-5, rtol=0)
    torch.testing.assert_close(generalized_box_iou(a, b), giou, atol=1e-5, rtol=0)
    iof = torch.tensor([[scalar_overlaps(x, y)[2] for y in a.tolist()] for x in a.tolist()])
    torch.testing.assert_close(pairwise_iof(a), iof, atol=1e-5, rtol=0)


def test_boxes_without_area_stay_finite():
    point = torch.tensor([5.0, 5, 5, 5])
    for overlap in (box_iou(point, point), generalized_box_iou(point, point)):
        assert overlap.isfinite()
    assert pairwise_iof(point[None]).isfinite().all()


def test_positional_vectors_and_corners_are_inverse():
    boxes = random_boxes(50)
    torch.testing.assert_close(xyzr_to_corners(corners_to_xyzr(boxes)), boxes, atol=1e-4, rtol=0)


# ---- matching


def slow_cost(logits, box, label, target):
    p = 1 / (1 + np.exp(-logits[label]))
    cls = -0.25 * (1 - p) ** 2 * np.log(p + 1e-12) + 0.75 * p**2 * np.log(1 - p + 1e-12)
    scale = (SIZE[1], SIZE[0], SIZE[1], SIZE[0])
    distance = sum(abs(a - b) / s for a, b, s in zip(box, target, scale))
    return 2 * cls + 5 * distance - 2 * scalar_overlaps(box, target)[1]


def test_matching_is_the_cheapest_of_all_assignments():
    """Against every assignment there is, stage by stage and image by image."""
    targets = random_targets([3, 1, 2])
    logits, boxes = torch.randn(2, 3, 5, 4), random_boxes(2, 3, 5)
    match = HungarianMatcher()(logits, boxes, targets)
    for stage, image in itertools.product(range(2), range(3)):
        count = targets.counts[image]
        cost = np.array(
            [
                [
                    slow_cost(
                        logits[stage, image, n].numpy().astype(float),
                        boxes[stage, image, n].tolist(),
                        targets.labels[image, t],
                        targets.boxes[image, t].tolist(),
                    )
                    for t in range(count)
                ]
                for n in range(5)
            ]
        )
        best = min(
            itertools.permutations(range(5), count),
            key=lambda queries: sum(cost[n, t] for t, n in enumerate(queries)),
        )
        expected = torch.full((5,), -1)
        expected[list(best)] = torch.arange(count)
        assert torch.equal(match[stage, image], expected)


@pytest.mark.parametrize("logit", [-200.0, -30.0, 30.0, 200.0])
def test_costs_of_extreme_scores(logit):
    """1e-12 bounds the logarithms."""
    targets, boxes = random_targets([1]), random_boxes(1, 1, 1)
    logits = torch.full((1, 1, 1, 4), logit)
    cost = HungarianMatcher(cost_bbox=0, cost_giou=0).cost(logits, boxes, targets)
    p = logits.sigmoid()[0, 0, 0, 0].item()
    expected = -0.25 * (1 - p) ** 2 * np.log(p + 1e-12)
    expected += 0.75 * p**2 * np.log(1 - p + 1e-12)
    assert cost.item() == pytest.approx(2 * expected, rel=1e-4)


def test_more_objects_than_queries_leaves_objects_without_a_query():
    targets = random_targets([7, 1])
    match = HungarianMatcher()(torch.randn(2, 2, 3, 4), random_boxes(2, 2, 3), targets)
    for stage in match:
        assert sorted(set(stage[0].tolist())) == sorted(stage[0].tolist())
        assert stage[0].min() >= 0
        assert sorted(stage[1].tolist()) == [-1, -1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_predictions_that_are_not_finite_lose_the_matching(bad):
    targets = random_targets([2])
    logits, boxes = torch.randn(1, 1, 4, 4), random_boxes(1, 1, 4)
    boxes[0, 0, 1] = bad
    logits[0, 0, 2] = float("nan")
    match = HungarianMatcher()(logits, boxes, targets)[0, 0]
    assert match[1] == match[2] == -1
    assert sorted(match.tolist()) == [-1, -1, 0, 1]


def test_all_predictions_nan_still_match_one_to_one():
    nan = torch.full((1, 1, 4, 4), float("nan"))
    match = HungarianMatcher()(nan, nan, random_targets([2]))
    assert sorted(match[0, 0].tolist()) == [-1, -1, 0, 1]


# ---- cross-stage labels


def slow_labels(boxes, match, targets, num_classes, first, last, threshold):
    """Supplement, section J, one query at a time."""
    stages, images, queries = match.shape
    classes = torch.zeros(stages, images, queries, num_classes)
    for i, b, n in itertools.product(range(stages), range(images), range(queries)):
        for j in range(max(0, i + first), min(stages, i + last + 1)):
            won = match[j, b, n]
            if won < 0:
                continue
            iou = scalar_overlaps(boxes[i, b, n].tolist(), targets.boxes[b, won].tolist())[0]
            if iou >= threshold:
                classes[i, b, n, targets.labels[b, won]] = 1
    return classes


def jittered_boxes(targets, stages, queries):
    """Boxes that overlap the objects, so that every threshold decides something."""
    images = len(targets.counts)
    index = torch.randint(targets.boxes.shape[1], (stages, images, queries))
    base = targets.boxes[torch.arange(images)[:, None], index]
    return base + torch.rand(stages, images, queries, 4) * torch.tensor([-9, -9, 9, 9]) + 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scope", [(-1, None), (0, 0), (-2, 1), (None, None), (0, None)])
def test_labels_equal_a_slow_loop(scope, threshold):
    first, last = (-9 if scope[0] is None else scope[0]), (9 if scope[1] is None else scope[1])
    assigner = CrossStageLabelAssigner(scope=scope, iou_threshold=threshold)
    for counts in ([3, 5], [0, 4], [0, 0], [1], [9, 2]):
        targets = random_targets(counts)
        boxes = jittered_boxes(targets, 4, 6)
        logits = torch.randn(4, len(counts), 6, 4)
        match = HungarianMatcher()(logits, boxes, targets)
        assignment = assigner(logits, boxes, match, targets.boxes, targets.labels)
        expected = slow_labels(boxes, match, targets, 4, first, last, threshold)
        assert torch.equal(assignment.classes, expected)
        assert torch.equal(assignment.matched, match >= 0)


@pytest.mark.parametrize("unit", [2**16, 2**-16])
def test_boxes_may_have_any_unit(unit):
    """Such as the width of the image, in which areas of small objects are small numbers."""
    assigner, targets = CrossStageLabelAssigner(), random_targets([3, 5])
    boxes, logits = jittered_boxes(targets, 4, 6), torch.randn(4, 2, 6, 4)
    match = HungarianMatcher()(logits, boxes, targets)
    expected = assigner(logits, boxes, match, targets.boxes, targets.labels)
    found = assigner(logits, boxes * unit, match, targets.boxes * unit, targets.labels)
    assert torch.equal(found.keep, expected.keep) and torch.equal(found.classes, expected.classes)
    assert 0 < expected.keep.sum() < (match >= 0).sum() * 4


@pytest.mark.parametrize("size", [0, float("nan"), float("inf")])
def test_boxes_without_area_and_not_finite_overlap_nothing(size):
    boxes, nothing = [[5, 5, 5 + size, 5 + size]], ([5, 5, 5, 5], 0)
    for objects in ([CAT], [nothing]):
        assert hand_made([0], boxes, objects) == [[]]
        assert hand_made([0], boxes, objects, iou_threshold=0.0) == [[0]]


def assign(assigner, boxes, match, targets):
    """What the assigner gives where there are three classes."""
    logits = torch.zeros(*match.shape, 3)
    return assigner(logits, boxes, match, targets.boxes, targets.labels)


def hand_made(match, boxes, objects, **options):
    """Labels of one query over the stages; `match` and `boxes` by stage."""
    boxes = torch.tensor(boxes).float()[:, None, None]  # (L, 1, 1, 4)
    match = torch.tensor(match)[:, None, None]
    assigner = CrossStageLabelAssigner(**options)
    classes = assign(assigner, boxes, match, make_targets(objects)).classes[:, 0, 0]
    return [row.nonzero().flatten().tolist() for row in classes]


CAT, DOG = ([0, 0, 40, 40], 0), ([0, 0, 40, 44], 1)
ON_CAT, ELSEWHERE = [0, 0, 40, 40], [60, 60, 90, 90]


def test_own_match_below_the_threshold_becomes_background():
    assert hand_made([0, 0], [ELSEWHERE, ON_CAT], [CAT]) == [[], [0]]


def test_a_label_is_gained_from_the_neighbouring_stages():
    assert hand_made([-1, 0], [ON_CAT, ON_CAT], [CAT]) == [[0], [0]]
    assert hand_made([0, -1], [ON_CAT, ON_CAT], [CAT]) == [[0], [0]]


def test_two_labels_on_one_query():
    assert hand_made([0, 1], [ON_CAT, ON_CAT], [CAT, DOG]) == [[0, 1], [0, 1]]


def test_two_objects_of_a_class_are_one_label():
    assert hand_made([0, 1], [ON_CAT, ON_CAT], [CAT, ([0, 0, 40, 44], 0)]) == [[0], [0]]


def test_scope_reaches_one_stage_back_and_to_the_end():
    boxes = [ON_CAT] * 5
    assert hand_made([0, -1, -1, -1, -1], boxes, [CAT]) == [[0], [0], [], [], []]
    assert hand_made([-1, -1, -1, -1, 0], boxes, [CAT]) == [[0]] * 5
    assert hand_made([-1, -1, 0, -1, -1], boxes, [CAT]) == [[0], [0], [0], [0], []]


def test_an_iou_equal_to_the_threshold_keeps_the_label():
    half = ([0, 0, 40, 20], 0)
    assert hand_made([0], [ON_CAT], [half]) == [[0]]
    assert hand_made([0], [ON_CAT], [half], iou_threshold=0.51) == [[]]


def test_own_stage_alone_without_threshold_is_one_to_one_assignment():
    options = {"scope": (0, 0), "iou_threshold": 0.0}
    assert hand_made([0, -1, 1], [ELSEWHERE] * 3, [CAT, DOG], **options) == [[0], [], [1]]


def test_images_without_any_object_have_no_labels():
    match, boxes = torch.full((3, 2, 4), -1), torch.rand(3, 2, 4, 4)
    nothing = torch.empty(2, 0, 4), torch.empty(2, 0, dtype=torch.long)
    assignment = CrossStageLabelAssigner()(torch.rand(3, 2, 4, 5), boxes, match, *nothing)
    assert not assignment.classes.any() and not assignment.keep.any()


# ---- losses


def build_criterion(**options):
    return SetCriterion(
        matcher=HungarianMatcher(), label_assigner=CrossStageLabelAssigner(**options)
    )


def random_outputs(stages, images, queries, num_classes=4):
    logits = torch.randn(stages, images, queries, num_classes)
    xyzr = corners_to_xyzr(random_boxes(stages, images, queries))
    return DecoderOutput(logits.requires_grad_(), xyzr.requires_grad_(), torch.empty(0))


@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [1, 1], [6, 8]])
def test_losses_are_finite_whatever_the_number_of_objects(counts):
    """None at all, none in one image, one, and more than the four queries."""
    outputs = random_outputs(3, 2, 4)
    losses = build_criterion()(outputs, random_targets(counts))
    assert len(losses) == 9
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))
    assert outputs.logits.grad.isfinite().all()
    if sum(counts) == 0:
        assert all(losses[f"stage{i}_loss_{k}"] == 0 for i in range(3) for k in ("bbox", "giou"))
        assert losses["stage0_loss_cls"] > 0
    else:
        assert outputs.xyzr.grad.isfinite().all()


def test_losses_equal_a_loop_over_queries():
    targets, outputs = random_targets([2, 3]), random_outputs(2, 2, 5)
    criterion = build_criterion(iou_threshold=0.2)
    losses = criterion(outputs, targets)
    boxes = xyzr_to_corners(outputs.xyzr).detach()
    assignment = criterion.assign(outputs.logits, boxes, targets)
    classes, match = assignment.classes, assignment.match
    assert torch.equal(match, criterion.matcher(outputs.logits, boxes, targets))
    for stage in range(2):
        cls = bbox = giou = 0.0
        for b, n in itertools.product(range(2), range(5)):
            p = outputs.logits[stage, b, n].sigmoid()
            focal = 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()
            cls += torch.where(classes[stage, b, n] == 1, *focal).sum()
            won = match[stage, b, n]
            if won >= 0:
                box, target = boxes[stage, b, n], targets.boxes[b, won]
                bbox += ((box - target).abs() / targets.scale[b, 0]).sum()
                giou += 1 - scalar_overlaps(box.tolist(), target.tolist())[1]
        labels = max(classes[stage].sum().item(), 5)
        assert losses[f"stage{stage}_loss_cls"].item() == pytest.approx(2 * cls.item() / labels)
        assert losses[f"stage{stage}_loss_bbox"].item() == pytest.approx(bbox.item(), rel=1e-5)
        assert losses[f"stage{stage}_loss_giou"].item() == pytest.approx(2 * giou / 5, rel=1e-4)


def test_an_unmatched_query_that_is_not_finite_leaves_the_box_losses_finite():
    outputs = random_outputs(1, 1, 4)
    with torch.no_grad():
        outputs.xyzr[0, 0, 3] = float("nan")
    losses = build_criterion()(outputs, random_targets([2]))
    assert losses["stage0_loss_bbox"].isfinite() and losses["stage0_loss_giou"].isfinite()


def test_losses_are_float32_under_autocast():
    outputs = random_outputs(1, 1, 4)
    targets = random_targets([2])
    expected = build_criterion()(outputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = build_criterion()(outputs, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and torch.equal(loss, expected[name])
    half = DecoderOutput(outputs.logits.bfloat16(), outputs.xyzr, outputs.content)
    assert {loss.dtype for loss in build_criterion()(half, targets).values()} == {torch.float32}


def test_shares_of_labels_are_logged():
    """Two stages: the cat is matched in both and fits in the second, which lends it to nobody."""
    boxes = torch.tensor([[[ELSEWHERE, ON_CAT]], [[ON_CAT, ELSEWHERE]]]).float()  # (2, 1, 2, 4)
    match = torch.tensor([[[0, -1]], [[0, -1]]])
    targets = make_targets([CAT])
    with EventStorage() as storage:
        log_assignment(assign(CrossStageLabelAssigner(), boxes, match, targets))
        shares = {name: value for name, (value, _) in storage.latest().items()}
    assert shares == {"labels/kept": 0.5, "labels/dropped": 0.5, "labels/gained": 0.0}
    boxes = torch.tensor([[[ON_CAT]], [[ON_CAT]]]).float()
    with EventStorage() as storage:
        log_assignment(
            assign(CrossStageLabelAssigner(), boxes, torch.tensor([[[0]], [[-1]]]), targets)
        )
        assert storage.latest()["labels/gained"][0] == 1
        nothing = torch.tensor([[[-1]], [[-1]]])
        log_assignment(assign(CrossStageLabelAssigner(), boxes, nothing, make_targets([])))
        assert storage.latest()["labels/kept"][0] == 0


@pytest.mark.parametrize("arguments", [
    {"scope": (0,)}, {"scope": ()}, {"scope": (0.5, None)}, {"scope": ("a", "b")},
    {"scope": (1, -1)}, {"iou_threshold": 50},
])
def test_scopes_and_thresholds_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match="scope|no IoU"):
        CrossStageLabelAssigner(**arguments)
