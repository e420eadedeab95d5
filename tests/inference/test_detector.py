"""Promises of the detector: an evaluation's detections, of any pictures, with a model's classes."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_net
from detectron2.config import LazyConfig
from detectron2.data.detection_utils import read_image

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector, load_detector
from projects.stageinteractor.inference.opening import fold_norms
from support.runs import CONFIG, ROOT
from support.saved_models import save_model
from support.shapes import CLASSES

BCCD = "projects/stageinteractor/configs/{}_lite0_bccd.py"










def load(checkpoint, options=(), config=CONFIG):
    return load_detector(checkpoint, str(ROOT / config), options)


# ---- Detections


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_detections_are_those_of_an_evaluation(shapes, tmp_path, options, image_format):
    """Of the real command, with a picture that is always given as BGR."""
    checkpoint = save_model(tmp_path / "model.pth", CONFIG, options)
    options += [
        f"train.init_checkpoint={checkpoint}",
        f"dataloader.test.mapper.image_format={image_format}",
    ]
    train_net.evaluate_only(load_config(str(ROOT / CONFIG), options))
    expected = json.loads((tmp_path / "run/coco_instances_results.json").read_text())
    detector, found = load(checkpoint, options), []
    for number in (1, 2, 3):
        path = shapes.parent / f"images/{number:04}.png"
        image = read_image(str(path), "BGR")
        instances = detector(image)
        other = detector(image[:, :, ::-1])
        assert (instances.scores - other.scores).abs().max() > 1e-3
        boxes = instances.pred_boxes.tensor
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        for box, score, index in zip(boxes, instances.scores, instances.pred_classes):
            key = detector.categories[index]["id"]
            found.append({"image_id": number, "category_id": key, "bbox": box, "score": score})
    assert len(found) == len(expected) > 10
    for here, there in zip(found, expected):
        assert {key: pytest.approx(value) for key, value in here.items()} == there


def test_folding_norms_changes_rounding_alone(tmp_path, options, monkeypatch):
    config = "projects/stageinteractor/configs/adamixer_r50_12ep.py"
    options = [text for text in options if ".dataset." not in text]
    options.append("model.decoder.feature_dim=32")
    checkpoint, before = save_model(tmp_path / "model.pth", config, options), []

    def fold(model):
        before.append(copy.deepcopy(model))
        return fold_norms(model)

    monkeypatch.setattr("projects.stageinteractor.inference.opening.fold_norms", fold)
    folded = load(checkpoint, options, config)
    plain = Detector(*before, [], "RGB", [])
    folded.augmentations = plain.augmentations
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    assert len([*plain.model.buffers()]) > len([*folded.model.buffers()])
    here, there = (detector(image) for detector in (folded, plain))
    assert len(here) == len(there) > 5
    assert torch.allclose(here.scores, there.scores, atol=1e-4)


@pytest.mark.parametrize("model", ["retinanet", "faster_rcnn"])
def test_detectrons_own_models_predict_without_a_data_set(tmp_path, monkeypatch, model):
    """From their configs alone; those find no data in this folder."""
    names = ["some", "other", "names", "äöü"]
    number = {"retinanet": "model.num_classes", "faster_rcnn": "model.roi_heads.num_classes"}[model]
    options = ["train.device=cpu"]
    config = BCCD.format(model)
    checkpoint = save_model(tmp_path / "model.pth", config, [*options, f"{number}=4"], names)
    monkeypatch.chdir(tmp_path)
    detector = load(checkpoint, options, config)
    if model == "retinanet":
        detector.model.test_score_thresh = 0
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    found = detector(image)
    assert detector.class_names == names and detector.metadata.thing_classes == names
    assert found.image_size == (50, 90) and len(found) > 10
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and (boxes <= torch.tensor([90, 50, 90, 50])).all()


@pytest.mark.parametrize("image", [
    np.zeros((8, 8, 3)),
    np.zeros((8, 8), np.uint8),
    np.zeros((8, 8, 4), np.uint8),
    np.zeros((3, 8, 8), np.uint8),
    np.zeros((0, 8, 3), np.uint8),
], ids=["float", "grey", "alpha", "channels first", "empty"])
def test_an_array_that_is_no_picture_is_refused(tmp_path, options, image):
    detector = load(save_model(tmp_path / "model.pth", CONFIG, options), options)
    with pytest.raises(ValueError) as raised:
        detector(image)
    assert f"{image.shape}, {image.dtype}" in str(raised.value)


# ---- Classes


IN_ORDER = [CLASSES[1], CLASSES[2], CLASSES[0]]  # of their ids in the test set


@pytest.mark.parametrize("names, is_there, expected", [
    (None, True, [*zip((10, 20, 30), IN_ORDER)]),
    (IN_ORDER, True, [*zip((10, 20, 30), IN_ORDER)]),
    (["a", "b", "c"], True, [(1, "a"), (2, "b"), (3, "c")]),
    (["a", "b", "c"], False, [(1, "a"), (2, "b"), (3, "c")]),
    (None, False, [(1, "0"), (2, "1"), (3, "2")]),
], ids=["of the data", "in both", "of the checkpoint", "without data", "unknown"])
def test_classes_are_those_of_the_checkpoint_or_the_data(
    tmp_path, options, names, is_there, expected
):
    checkpoint = save_model(tmp_path / "model.pth", CONFIG, options, names)
    if not is_there:
        options.append(f"dataloader.test.dataset.json_file={tmp_path / 'no.json'}")
    found = load(checkpoint, options).categories
    assert [(category["id"], category["name"]) for category in found] == expected


def test_the_number_of_classes_is_that_of_the_checkpoint(tmp_path, options):
    checkpoint = save_model(
        tmp_path / "model.pth", CONFIG, [*options, "model.decoder.num_classes=2"], ["a", "b"]
    )
    others = [text for text in options if "num_classes" not in text]
    assert load(checkpoint, others).class_names == ["a", "b"]
    with pytest.raises(UserError, match="has 2 classes, the config 3"):  # an override is obeyed
        load(checkpoint, options)


# ---- The first stages


@pytest.mark.parametrize("average", [False, True])
@torch.no_grad()
def test_the_first_stages_are_a_detector(shapes, tmp_path, options, caplog, average):
    checkpoint = save_model(tmp_path / "model.pth", CONFIG, options)
    options.append(f"train.model_ema.enabled={average}")
    if average:
        content = torch.load(checkpoint)
        content["model_ema"] = {"n_averaged": torch.tensor(1)} | {
            f"module.{name}": value for name, value in content["model"].items()
        }
        torch.save(content, checkpoint)
    whole = load(checkpoint, options)
    assert not caplog.messages
    given = whole.prepare(picture := read_image(str(shapes.parent / "images/0001.png"), "BGR"))
    images = whole.model.preprocess([given])
    outputs = whole.model.decode(images)
    for stage, of_stage in enumerate(zip(outputs.logits, outputs.xyzr, strict=True)):
        detections = whole.model.detect(*of_stage, images.image_sizes)
        expected = whole.model.postprocess(detections, [given])[0]["instances"]
        found = load(checkpoint, [*options, f"model.decoder.num_stages={stage + 1}"])(picture)
        assert len(found) and torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.pred_classes, expected.pred_classes)
    assert "have no place in this model: decoder.stages.1" in caplog.messages[0]
    for number in (0, 4, "two"):
        with pytest.raises(UserError, match=f"num_stages='?{number}'?: 1 to 3") as caught:
            load(checkpoint, [*options, f"model.decoder.num_stages={number}"])
        assert "\n" not in str(caught.value)
    more = [*options, "model.decoder.points_per_stage=[8,8,8,8]", "model.decoder.num_stages=4"]
    with pytest.raises(UserError, match="weights, decoder.stages.3.* are missing"):
        load(checkpoint, more)


# ---- Configs


def test_the_config_of_a_run_is_a_config(tmp_path, options):
    checkpoint = save_model(tmp_path / "model.pth", CONFIG, options)
    LazyConfig.save(load_config(str(ROOT / CONFIG), options), str(tmp_path / "config.yaml"))
    image = np.full((40, 60, 3), 99, np.uint8)
    here, there = (
        detector(image).scores
        for detector in (load(checkpoint, options), load(checkpoint, [], tmp_path / "config.yaml"))
    )
    assert len(here) and torch.equal(here, there)


def test_pictures_are_resized_as_the_overrides_say(tmp_path, options):
    detector = load(save_model(tmp_path / "model.pth", CONFIG, options), options)
    given = detector.prepare(np.zeros((40, 60, 3), np.uint8))
    assert given["image"].shape == (3, 128, 192)
    assert (given["height"], given["width"]) == (40, 60)


@pytest.mark.parametrize("checkpoint, override, message", [
    ("no.pth", "", "no checkpoint no.pth"),
    ("other.pth", "", "does not fit the config"),
    ("text.pth", "", "it is not a whole checkpoint"),
    ("model.pth", "train.divice=cpu", "unknown config key train.divice"),
    ("model.pth", "model.decoder.num_heads=3", "model: embed_dim=32"),
    ("model.pth", "train.device=tpu", "train.device=tpu is not available"),
])
def test_a_mistake_is_named(tmp_path, monkeypatch, options, checkpoint, override, message):
    monkeypatch.chdir(tmp_path)
    save_model("model.pth", CONFIG, options)
    torch.save({"model": {"weight": torch.zeros(3)}}, "other.pth")
    Path("text.pth").write_text("no weights")
    with pytest.raises(UserError, match=message):
        load(checkpoint, [*options, override] if override else options)


def test_a_model_whose_run_has_diverged_is_refused(tmp_path, options):
    path = save_model(tmp_path / "model.pth", CONFIG, options)
    checkpoint = torch.load(path)
    checkpoint["model"]["decoder.stages.0.ffn.norm.weight"][3] = float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="model.pth has weights that are not finite"):
        load(path, options)
