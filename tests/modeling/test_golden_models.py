"""Exact: the complete models, as their configurations build them, compute what was released."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes

from projects.stageinteractor.analysis.recorded import (
    full_image,
    load_golden_weights,
    recorded_objects,
)
from projects.stageinteractor.modeling.boxes import xyzr_to_corners
from support.golden_figures import (
    CONFIGS,
    STAGES,
    assert_close,
    assert_gradients,
    assert_losses,
    assert_same_detections,
    load,
)

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def build_golden(config):
    """A complete model as a configuration builds it, with golden weights."""
    model = instantiate(LazyConfig.load(str(CONFIGS / f"{config}.py")).model)
    load_golden_weights(model)
    return model


@pytest.fixture(scope="module")
def full():
    """The complete R50 model, as the configuration builds it."""
    return build_golden("stageinteractor_r50_12ep")


def unnormalized(model):
    """The image of the full cases as it comes from a file: RGB, 0 to 255, without padding."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (RGB_MEAN, RGB_STD))
    return full_image()[0, :, :250, :310] * std + mean


@torch.no_grad()
def test_full_model_forward(full):
    figures = load("full")
    full.eval()
    features = full.backbone(full_image())
    pyramid = full.neck(features)
    for level, (name, neck_map) in enumerate(zip(full.neck.in_features, pyramid)):
        feature = features[name][0]
        expected = figures[f"backbone{level}_meanstd"]
        spread = [feature.mean(), feature.std(), feature.abs().max()]
        np.testing.assert_allclose(spread, expected, rtol=1e-4, atol=1e-5)
        assert_close(feature[:8, :6, :6], figures[f"backbone{level}_slice"], 1e-4)
        assert_close(neck_map[:, :8, :6, :6], figures[f"neck{level}_slice"], 1e-4)
    queries = full.query_generator(torch.tensor([[250, 310]]))
    outputs = full.decoder(*queries, pyramid)
    for stage in STAGES:
        assert_close(outputs.logits[stage][:, ::5], figures[f"stage{stage}_cls_score"], 1e-5)
        assert_close(xyzr_to_corners(outputs.xyzr[stage]), figures[f"stage{stage}_boxes"], 1e-3)


@torch.no_grad()
def test_full_model_detections(full):
    """Before clipping and at the network's scale; then through Detectron2's protocol."""
    figures = load("full")
    full.eval()
    image = unnormalized(full)
    padded = full.preprocess([{"image": image}]).tensor
    assert_close(padded, full_image(), 1e-5)
    pyramid = full.neck(full.backbone(padded))
    outputs = full.decoder(*full.query_generator(torch.tensor([[250, 310]])), pyramid)
    found = full.detect(outputs.logits[-1], outputs.xyzr[-1], [(250, 310)])[0]
    expected = figures["det_top100_netscale_img0"]
    assert_close(found.pred_boxes.tensor, expected[:, :4], 1e-3)
    assert_close(found.scores, expected[:, 4], 1e-5)
    np.testing.assert_array_equal(found.pred_classes, figures["det_top100_labels_img0"])

    scale_x, scale_y = figures["scale_factor"][:2]
    height, width = round(250 / scale_y), round(310 / scale_x)
    output = full([{"image": image, "height": height, "width": width}])[0]["instances"]
    boxes = Boxes(torch.from_numpy(figures["det_top100_rescaled_img0"][:, :4]).clone())
    boxes.clip((height, width))
    inside = boxes.nonempty()
    assert_close(output.pred_boxes.tensor, boxes.tensor[inside], 2e-3)
    assert output.image_size == (height, width)


def test_full_model_training_step(full):
    """Losses in float32. Gradients in float64: that of a sampling point jumps where the point
    crosses from cell to cell, so that in float32 rounding decides now and then, differently with
    every torch; the recordings themselves are up to 6e-4 off there."""
    figures = load("full")
    instances = recorded_objects(figures, "train:", [(250, 310)])[0]
    batch = [{"image": unnormalized(full), "instances": instances}]
    with torch.no_grad():
        assert_losses(full.train()(batch), figures, "train:")
    precise = copy.deepcopy(full).double()
    sum(precise(batch).values()).backward()
    assert_gradients(precise, figures, "train:", rel=2e-4, rel_of_points=1e-3)


@torch.no_grad()
def test_swin_forward_and_detections():
    figures = load("swin_s")
    model = build_golden("stageinteractor_swin_s_300q_36ep").eval()
    features = model.backbone(full_image())
    pyramid = model.neck(features)
    for level, (name, neck_map) in enumerate(zip(model.neck.in_features, pyramid)):
        feature = features[name][0]
        spread = [feature.mean(), feature.std(), feature.abs().max()]
        np.testing.assert_allclose(
            spread, figures[f"backbone{level}_meanstd"], rtol=1e-4, atol=1e-5
        )
        assert_close(feature[:8, :6, :6], figures[f"backbone{level}_slice"], 1e-4)
        assert_close(neck_map[:, :8, :6, :6], figures[f"neck{level}_slice"], 1e-4)
    outputs = model.decoder(*model.query_generator(torch.tensor([[250, 310]])), pyramid)
    for stage in STAGES:
        boxes = xyzr_to_corners(outputs.xyzr[stage])
        assert_close(outputs.logits[stage][:, ::10], figures[f"stage{stage}_cls_score"], 1e-4)
        assert_close(boxes[:, ::10], figures[f"stage{stage}_boxes"], 1e-2)
    found = model.detect(outputs.logits[-1], outputs.xyzr[-1], [(250, 310)])[0]
    expected, classes = figures["det_top300_netscale_img0"], figures["det_top300_labels_img0"]
    assert_same_detections(found, expected, classes, 1e-2)


@pytest.fixture(scope="module")
def adamixer():
    return build_golden("adamixer_r50_12ep")


@torch.no_grad()
def test_adamixer_forward_and_detections(adamixer):
    """Rounding grows from stage to stage in this case: against float64, the recorded logits are
    1.5e-4 off in the last one, so that a few of 8000 may differ by a little more than 1e-4."""
    figures = load("adamixer_r50")
    pyramid = adamixer.neck(adamixer.eval().backbone(full_image()))
    queries = adamixer.query_generator(torch.tensor([[250, 310]]))
    outputs = adamixer.decoder(*queries, pyramid)
    for stage in STAGES:
        logits = outputs.logits[stage][:, ::5]
        expected = torch.from_numpy(figures[f"stage{stage}_cls_score"])
        assert ((logits - expected).abs() > 1e-4).sum() <= (0 if stage < 3 else 4)
        assert_close(logits, expected, 2e-4)
        boxes = xyzr_to_corners(outputs.xyzr[stage])
        assert_close(boxes, figures[f"stage{stage}_boxes"], 1e-2)
    found = adamixer.detect(outputs.logits[-1], outputs.xyzr[-1], [(250, 310)])[0]
    expected, classes = figures["det_top100_netscale_img0"], figures["det_top100_labels_img0"]
    assert_same_detections(found, expected, classes, 1e-2)


def test_adamixer_training_step(adamixer):
    """Several points lie at the border of a cell here, where rounding decides about their gradient:
    upstream of them, our own float32 and float64 are as far apart as either and the recordings."""
    figures = load("adamixer_r50")
    instances = recorded_objects(figures, "train:", [(250, 310)])[0]
    batch = [{"image": unnormalized(adamixer), "instances": instances}]
    with torch.no_grad():
        assert_losses(adamixer.train()(batch), figures, "train:")
    precise = copy.deepcopy(adamixer).double()
    sum(precise(batch).values()).backward()
    assert_gradients(precise, figures, "train:", rel=2e-3, rel_of_points=2e-3)
