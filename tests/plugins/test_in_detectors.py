"""The criterion with cross-stage labels takes the place of a detector's own, or refuses to."""

import re

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn
from torchvision.ops import box_convert

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.plugins.cross_stage_criterion import CrossStageCriterion
from support.detr_outputs import (
    CLASSES,
    NAMES,
    ORDINARY,
    QUERIES,
    build,
    make_outputs,
    make_targets,
    slow_iou,
)
from support.pages import ROOT, read
from support.runs import metrics, overrides, run
from support.shapes import make_shapes
from tests.support.small_detr.ordinary import Matcher

PAGE = "docs/cross_stage_labels_elsewhere.md"


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


def test_arguments_of_another_criterion_are_refused_by_name():
    """Those of Align-DETR and DETA among them."""
    unknown = {"eos_coef": 0.1, "assign_second_stage": True}
    with pytest.raises(ValueError, match="eos_coef, assign_second_stage"):
        CrossStageCriterion(matcher=None, label_assigner=None, **ORDINARY, **unknown)


@pytest.mark.parametrize("keys", [
    ("denoising_groups", "denoising_output", "max_gt_num_per_image"),  # DN-DETR
    ("srcs", "temp_backbone_mask_prediction"),  # Focus-DETR
])
def test_outputs_that_another_criterion_needs_are_refused_by_name(keys):
    targets = make_targets([1])
    outputs = {**dict.fromkeys(keys), **make_outputs(targets)}
    with pytest.raises(ValueError, match=", ".join(keys)):
        build()(outputs, targets)


def test_the_two_calls_of_h_detr_log_under_two_names():
    """The first gets all outputs, the second those that end in _one2many."""
    targets, criterion = make_targets([2, 1]), build()
    many = make_outputs(targets)
    outputs = make_outputs(targets) | {f"{name}_one2many": many[name] for name in many}
    with EventStorage() as storage:
        losses = criterion(outputs, targets)
        shares = dict(storage.latest())
        criterion(many, targets)
    assert all(torch.equal(losses[name], loss) for name, loss in
               build()({k: outputs[k] for k in many}, targets).items())
    assert {f"labels_one2one/{name}" for name in ("kept", "dropped", "gained")} == {*shares}
    logged = storage.latest()
    assert len(logged) == 6 and all(logged[name] == shares[name] for name in shares)


def test_another_number_of_classes_is_refused():
    targets = make_targets([1])
    outputs = make_outputs(targets)
    outputs["pred_logits"] = torch.zeros(1, QUERIES, CLASSES + 1)
    with pytest.raises(ValueError, match="num_classes=3, but the model predicts 4"):
        build()(outputs, targets)


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
