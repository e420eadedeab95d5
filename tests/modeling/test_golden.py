"""Exact: queries, decoder, matching, labels, losses and steps are those of the released code."""

import copy
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import nn

from projects.stageinteractor.analysis.recorded import (
    SMALL_SIZES,
    load_golden_weights,
    recorded_objects,
    small_pyramid,
)
from projects.stageinteractor.checkpoint.released import project_name
from projects.stageinteractor.modeling import (
    CrossStageLabelAssigner,
    HungarianMatcher,
    QueryGenerator,
    SetCriterion,
    StageInteractor,
    StageInteractorDecoder,
)
from projects.stageinteractor.modeling.boxes import positional_encoding, xyzr_to_corners
from projects.stageinteractor.modeling.fast_sampling.table import FeatureTable
from projects.stageinteractor.modeling.sampling import FeatureMaps, level_weights
from projects.stageinteractor.modeling.stage import DecoderState
from projects.stageinteractor.modeling.targets import gather_targets
from support.forms import KernelForm, needs_triton
from support.golden_figures import (
    GOLDEN,
    RECIPE,
    STAGES,
    assert_close,
    assert_gradients,
    assert_losses,
    load,
)


def build_criterion():
    return SetCriterion(matcher=HungarianMatcher(), label_assigner=CrossStageLabelAssigner())


@pytest.fixture(scope="module")
def small():
    """The small decoder with its queries and pyramid."""
    model = nn.ModuleDict(
        {
            "query_generator": QueryGenerator(num_queries=20, embed_dim=64),
            "decoder": StageInteractorDecoder(
                embed_dim=64, feature_dim=64, ffn_dim=96, out_points=32
            ),
        }
    )
    load_golden_weights(model)
    return model, small_pyramid()


def run_small(small):
    model, pyramid = small
    content, xyzr = model["query_generator"](torch.tensor(SMALL_SIZES))
    return content, xyzr, model["decoder"](content, xyzr, pyramid)


def test_small_decoder_outputs(small):
    figures = load("small")
    content, xyzr, outputs = run_small(small)
    assert_close(content[0], figures["init_content"][0], 1e-6)
    assert_close(xyzr, figures["init_xyzr"], 1e-5)
    for stage in STAGES:
        assert_close(outputs.logits[stage][:, ::3], figures[f"stage{stage}_cls_score"], 1e-5)
        assert_close(outputs.xyzr[stage], figures[f"stage{stage}_xyzr"], 1e-3)
        assert_close(xyzr_to_corners(outputs.xyzr[stage]), figures[f"stage{stage}_boxes"], 1e-3)
        assert_close(outputs.content[stage][:, ::3], figures[f"stage{stage}_object_feats"], 1e-5)


@torch.no_grad()
def test_small_detections(small):
    """Of both images, in one batch."""
    figures = load("small")
    outputs = run_small(small)[2]
    model = SimpleNamespace(detections_per_image=100)
    model.select = functools.partial(StageInteractor.select, model)
    found = StageInteractor.detect(model, outputs.logits[-1], outputs.xyzr[-1], SMALL_SIZES)
    for image, instances in enumerate(found):
        expected = figures[f"det_top100_netscale_img{image}"]
        assert_close(instances.pred_boxes.tensor, expected[:, :4], 1e-3)
        assert_close(instances.scores, expected[:, 4], 1e-5)
        labels = figures[f"det_top100_labels_img{image}"]
        np.testing.assert_array_equal(instances.pred_classes, labels)


@pytest.mark.parametrize("form", [
    FeatureMaps,
    FeatureTable.from_maps,
    pytest.param(KernelForm, marks=[needs_triton, pytest.mark.rare]),  # minutes in an interpreter
])
def test_parts_of_every_small_stage(small, form):
    """Encoding, attention bias, points, levels, samples, filters, mixing: each on its own."""
    figures = load("small")
    model, maps = small
    strides = model["decoder"].strides
    pyramid = form(maps, strides, num_groups=4)
    content, xyzr = model["query_generator"](torch.tensor(SMALL_SIZES))
    state = DecoderState(content, xyzr, (), pyramid)

    def check(stage, key, value, atol):
        expected = figures[f"stage{stage}_{key}"]
        value = value.reshape(-1)
        assert_close(value[:: max(1, value.numel() // 300)], expected, atol)

    for index, stage in enumerate(model["decoder"].stages):
        content, xyzr = state.content, state.xyzr
        check(index, "pos_embed", positional_encoding(xyzr, 64), 1e-5)
        check(index, "attn_bias", stage.attention.bias(xyzr), 1e-4)
        attended = stage.attention(content, xyzr)
        check(index, "attn_out", attended, 1e-5)
        points = stage.points(attended, xyzr).transpose(1, 2)  # (B, G, N, P, 3)
        assert_close(points[:, :, ::9, :, :2], figures[f"stage{index}_sample_xy"], 1e-2)
        assert_close(points[:, :, ::9, :, 2], figures[f"stage{index}_sample_z"], 1e-5)
        check(index, "level_weights", level_weights(points[..., 2], strides), 1e-5)
        features = pyramid.sample(points.transpose(1, 2))
        check(index, "sampled_feats", features, 1e-4)
        old = state.filters[1:] if index >= 2 else ()
        mixed, own = stage.mixing(features, attended, old)
        check(index, "M", own.channel, 1e-5)
        spatial = own.spatial
        if old:
            adapted = stage.mixing.spatial_adapter(attended, own.spatial, old[-1].spatial)
            spatial = torch.cat([spatial, adapted.blend()], 1)
        check(index, "S", spatial, 1e-5)
        check(index, "mixing_out", mixed, 1e-5)
        check(index, "ffn_out", stage.ffn(mixed), 1e-5)
        _, state = stage(state._replace(content=content.detach(), xyzr=xyzr.detach()))


@pytest.mark.parametrize("case", ["case_a_train", "case_a_train_zero_img1"])
def test_small_training_step(small, case):
    """Matching, targets, normalisers, losses and gradients; once with an image without objects."""
    figures, prefix = load("small_train"), f"{case}:"
    model, pyramid = small
    model.zero_grad()
    for features in pyramid:
        features.requires_grad_().grad = None
    _, _, outputs = run_small(small)
    targets = gather_targets(
        recorded_objects(figures, prefix, SMALL_SIZES), SMALL_SIZES, torch.device("cpu")
    )
    criterion = build_criterion()

    boxes = xyzr_to_corners(outputs.xyzr).detach()
    cost = criterion.matcher.cost(outputs.logits, boxes, targets)
    match = criterion.matcher(outputs.logits, boxes, targets)
    assignment = criterion.label_assigner(
        outputs.logits, boxes, match, targets.boxes, targets.labels
    )
    for stage in STAGES:
        for image, count in enumerate(targets.counts):
            if count:
                expected = figures[f"{prefix}stage{stage}_img{image}_cost"]
                assert_close(cost[stage, image, :, :count], expected, 1e-4)
        np.testing.assert_array_equal(match[stage], figures[f"{prefix}stage{stage}_matched_gt"])
        np.testing.assert_array_equal(
            np.argwhere(assignment.classes[stage].reshape(40, 80).numpy()),
            figures[f"{prefix}stage{stage}_cls_target"],
        )
        labels, matches = assignment.classes[stage].sum(), assignment.matched[stage].sum()
        assert max(labels, matches) == figures[f"{prefix}stage{stage}_avg_factor_cls"]
        assert matches == figures[f"{prefix}stage{stage}_avg_factor_reg"]

    losses = criterion(outputs, targets)
    assert_losses(losses, figures, prefix)
    sum(losses.values()).backward()
    assert_gradients(model, figures, prefix, rel=1e-4, rel_of_points=1e-4)
    for level, features in enumerate(pyramid):
        expected = float(figures[f"{prefix}grad_feat{level}_norm"])
        assert features.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_small_optimizer_steps(small):
    """The recipe's AdamW and clipping; a step moves a weight by 2.5e-5."""
    figures, steps = load("small_train"), load("small_optimizer")
    model, pyramid = copy.deepcopy(small[0]), [features.detach() for features in small[1]]
    cfg = LazyConfig.load(str(RECIPE))
    cfg.optimizer.params.model = model
    optimizer, clip = instantiate(cfg.optimizer), cfg.train.clip_grad
    instances = recorded_objects(figures, "case_a_train:", SMALL_SIZES)
    targets = gather_targets(instances, SMALL_SIZES, torch.device("cpu"))
    for step in range(2):
        optimizer.zero_grad()
        losses = build_criterion()(run_small((model, pyramid))[2], targets)
        total = sum(losses.values())
        total.backward()
        assert clip.enabled
        norm = nn.utils.clip_grad_norm_(model.parameters(), **clip.params)
        assert total.item() == pytest.approx(steps[f"step{step}_loss_before"].item(), rel=1e-5)
        expected = steps[f"step{step}_total_grad_norm_before_clip"].item()
        assert norm.item() == pytest.approx(expected, rel=1e-4)
        optimizer.step()
        parameters = dict(model.named_parameters())
        for key, value in steps.items():
            name = project_name(key.removeprefix(f"step{step}_after/"))
            if key.startswith(f"step{step}_after/") and name is not None:
                assert_close(parameters[name], value, 1e-6)


def test_initial_values_are_those_of_the_reference():
    """Mean and spread of every weight of neck, queries and decoder; exactly, where constant."""
    torch.manual_seed(1)
    cfg = LazyConfig.load(str(RECIPE)).model
    cfg.backbone = None
    parameters = dict(instantiate(cfg).named_parameters())
    expected = json.loads((GOLDEN / "r50_initial.json").read_text())
    names = {project_name(released): released for released in expected} | {None: None}
    assert names.keys() - {None} == parameters.keys()
    for name, value in parameters.items():
        mean, std, low, high = expected[names[name]]
        if std < 1e-6:
            np.testing.assert_allclose(value.detach(), mean, rtol=1e-5, err_msg=name)
            continue
        spread = (high - low) / 2
        # The mean of n draws scatters by std / sqrt(n), their spread by a little more.
        scatter = 6 * std / value.numel() ** 0.5
        assert value.mean().item() == pytest.approx(mean, abs=2 * scatter), name
        assert value.std().item() == pytest.approx(std, rel=0.02, abs=2 * scatter), name
        if value.numel() > 1000:
            assert value.abs().max().item() == pytest.approx(spread, rel=0.15), name
