"""Cross-stage labels in detectors of detrex change the class targets of decoder layers, no more."""

import itertools
import math
import re

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn
from torchvision.ops import box_convert

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.modeling import CrossStageLabelAssigner
from projects.stageinteractor.plugins import cross_stage_criterion
from projects.stageinteractor.plugins.cross_stage_criterion import CrossStageCriterion
from support.pages import ROOT, read
from support.runs import metrics, overrides, run
from support.shapes import make_shapes
from tests.support.small_detr.ordinary import Matcher, OrdinaryCriterion

PAGE = "docs/cross_stage_labels_elsewhere.md"
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


def with_gradients(criterion, outputs, targets):
    """Losses, and gradients of all predictions by their sum."""
    losses = criterion(outputs, targets)
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


def slow_giou(a, b):
    iou, hull = slow_iou(a, b), 1
    for axis in range(2):
        low = min(box[axis] - box[axis + 2] / 2 for box in (a, b))
        high = max(box[axis] + box[axis + 2] / 2 for box in (a, b))
        hull *= high - low
    union = (a[2] * a[3] + b[2] * b[3]) / (1 + iou)
    return iou - (hull - union) / hull


# ---- it stands where a criterion of detrex stood

DINO = dict.fromkeys((*NAMES, *(f"{name}_dn" for name in NAMES)), 1.0)
DINO.update({
    f"{name}{suffix}": 1.0 for name in list(DINO) for suffix in ("_enc", "_0", "_1", "_2")
})


@pytest.mark.parametrize("denoising", [True, False])
def test_every_loss_of_dino_has_its_weight_and_can_be_weighted_in_place(denoising):
    """Without denoising queries, as where a batch has no object, their losses are zeros."""
    targets = make_targets([2, 1])
    outputs = make_outputs(targets)
    outputs["enc_outputs"] = make_outputs(targets, layers=1)
    known = make_outputs(targets, queries=4)
    dn_metas = {"output_known_lbs_bboxes": known, "dn_num": 1, "single_padding": 4}
    losses = build(DINO)(outputs, targets, dn_metas if denoising else None)
    assert set(losses) == {name for name in DINO if not name.endswith("_dn_enc")}
    for name in losses:
        losses[name] *= DINO[name]
    sum(losses.values()).backward()
    assert all(bool(loss) == (denoising or "_dn" not in name) for name, loss in losses.items())


def test_without_denoising_in_the_weights_there_are_no_losses_of_it():
    targets = make_targets([2, 1])
    losses = build()(make_outputs(targets, layers=1), targets)
    assert set(losses) == set(NAMES)


# What the configs of detrex pass to their criterions, from projects/dino/configs/models/dino_r50.py
# and projects/deformable_detr/configs/models/deformable_detr_r50.py.
DETREX = {
    "dino": {
        "num_classes": CLASSES, "matcher": {"_target_": Matcher}, "weight_dict": DINO,
        "losses": ["class", "boxes"], "loss_class_type": "focal_loss", "alpha": 0.25, "gamma": 2.0,
        "two_stage_binary_cls": False,
    },
    "deformable_detr": {
        "num_classes": CLASSES, "matcher": {"_target_": Matcher},
        "weight_dict": dict.fromkeys(NAMES, 1.0),
        "losses": ["class", "boxes"], "loss_class_type": "focal_loss", "alpha": 0.25, "gamma": 2.0,
    },
}


BLOCKS = re.findall(r"```python\n(.*?)```", read(PAGE), re.S)
LINES = [line for line in BLOCKS[0].splitlines() if line]  # the change to a config


@pytest.mark.parametrize("project", DETREX)
def test_the_lines_of_the_page_change_a_config(project):
    assert len(LINES) == 4
    arguments = {"_target_": "projects.dino.modeling.DINOCriterion", **DETREX[project]}
    model = OmegaConf.create({"criterion": arguments}, flags={"allow_objects": True})
    exec("\n".join(LINES), {"model": model})
    criterion = instantiate(model.criterion)
    assert isinstance(criterion, CrossStageCriterion)
    assert criterion.label_assigner.scope == (-1, None)
    assert criterion.label_assigner.iou_threshold == 0.5
    assert criterion.weight_dict == DETREX[project]["weight_dict"]
    targets = make_targets([2, 1])
    losses = criterion(make_outputs(targets), targets)
    assert set(NAMES) < set(losses)


def test_the_assigner_of_the_page_runs():
    names = {
        "logits": torch.zeros(2, 1, 1, CLASSES),
        "boxes": torch.tensor([[[[0, 0, 0.4, 0.4]]], [[[0, 0, 0.2, 0.4]]]]),
        "match": torch.tensor([[[0]], [[-1]]]),
        "object_boxes": torch.tensor([[[0, 0, 0.4, 0.5]]]),
        "object_labels": torch.tensor([[2]]),
    }
    exec(BLOCKS[1], names)
    assert names["assignment"].classes.flatten(1).tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "options", [{"losses": ["class", "boxes", "masks"]}, {"loss_class_type": "ce_loss"}]
)
def test_other_losses_are_refused(options):
    with pytest.raises(ValueError, match="focal_loss"):
        CrossStageCriterion(matcher=None, label_assigner=None, **{**ORDINARY, **options})


def test_another_number_of_classes_is_refused():
    targets = make_targets([1])
    outputs = make_outputs(targets)
    outputs["pred_logits"] = torch.zeros(1, QUERIES, CLASSES + 1)
    with pytest.raises(ValueError, match="num_classes=3, but the model predicts 4"):
        build()(outputs, targets)


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
    losses = build()(outputs, targets)
    assert not losses["loss_class_1"].isfinite()
    assert all(loss.isfinite() for name, loss in losses.items() if not name.endswith("_1"))


# ---- a small DETR


class TinyBackbone(nn.Module):
    """A few strided convolutions, which learn from random weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 5, 4, 2), nn.GroupNorm(4, 32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU(),
        )

    def forward(self, images):
        return {"stride8": self.stem(images)}


def load(name):
    """The config, made tiny, of 3 classes."""
    cfg = LazyConfig.load(str(ROOT / f"tests/support/small_detr/{name}.py"))
    for helper in ("lite0", "WEIGHTS", "NUM_LAYERS"):
        cfg.pop(helper, None)
    cfg.model.backbone = {"_target_": TinyBackbone}
    cfg.model.update(
        in_features=["stride8"], in_channels=[32], num_classes=3, num_queries=12, dim=32, heads=4
    )
    return cfg


def load_batch(folder, cfg):
    """Two images of different sizes."""
    annotations = make_shapes(folder, images=2, size=[(64, 96), (80, 64)], seed=3)
    mapper = instantiate({**cfg.dataloader.train.mapper, "augmentations": []})
    dataset = coco_dataset(json_file=str(annotations), image_root=str(folder / "images"))
    return [mapper(image) for image in dataset]


def train(cfg, batch, steps):
    """The model after some steps, and the sum of losses at each."""
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    totals = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = sum(model(batch).values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    return model, totals


def test_the_two_configs_differ_in_the_lines_of_the_page():
    """Those of the page."""
    text = (ROOT / "tests/support/small_detr/cross_stage.py").read_text()
    assert all(line in text.splitlines() for line in LINES)
    one_to_one, cross_stage = (OmegaConf.to_container(load(name)) for name in (
        "one_to_one", "cross_stage"
    ))
    assert cross_stage["model"]["criterion"].pop("label_assigner")
    for cfg in (one_to_one, cross_stage):
        del cfg["model"]["criterion"]["_target_"], cfg["train"]["output_dir"]
    assert one_to_one == cross_stage


def test_one_to_one_labels_train_the_detector_as_the_ordinary_criterion_to_the_bit(tmp_path):
    ordinary, ours = load("one_to_one"), load("cross_stage")
    batch = load_batch(tmp_path, ordinary)
    ours.model.criterion.label_assigner.update(scope=[0, 0], iou_threshold=0.0)
    expected, expected_totals = train(ordinary, batch, 3)
    model, totals = train(ours, batch, 3)
    assert totals == expected_totals
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    ours.model.criterion.label_assigner.update(scope=[-1, None], iou_threshold=0.5)
    assert train(ours, batch, 1)[1] != totals[:1]


def test_the_detector_learns_two_images_by_heart(tmp_path):
    cfg = load("cross_stage")
    batch = load_batch(tmp_path, cfg)
    model, totals = train(cfg, batch, 100)
    assert totals[-1] < totals[0] / 4
    model.eval()
    with torch.no_grad():
        detections = [found["instances"] for found in model(batch)]
    for image, found in zip(batch, detections):
        objects = image["instances"]
        best = found[: len(objects)]
        assert sorted(best.pred_classes.tolist()) == sorted(objects.gt_classes.tolist())
        for box in objects.gt_boxes.tensor.tolist():
            overlap = max(
                slow_iou(*box_convert(torch.tensor([box, other]), "xyxy", "cxcywh").tolist())
                for other in best.pred_boxes.tensor.tolist()
            )
            assert overlap > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_to_one", "cross_stage"])
def test_the_tool_trains_and_evaluates_it(name, tmp_path):
    """From a config, as any other detector; here the whole one, on drawn shapes."""
    options = overrides(
        make_shapes(tmp_path), tmp_path / "run", **{"model.num_classes": 3, "train.max_iter": 4}
    )
    options = [text for text in options if not re.match(r"model\.(decoder|query)", text)]
    run("--config-file", f"tests/support/small_detr/{name}.py", *options)
    written = {key for line in metrics(tmp_path / "run") for key in line}
    assert {"loss_class", "loss_giou_2", "bbox/AP50"} <= written
    assert ("labels/kept" in written) == (name == "cross_stage")
