"""Every row of the paper's ablations, as the project's README lists them, trains and evaluates."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from torch import nn

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.modeling import ablations
from projects.stageinteractor.modeling.adamixer import (
    AdaMixerAttention,
    AdaMixerSamplingPoints,
    AdaptiveMixing,
    VanillaSamplingPoints,
    refine_boxes_by_scale,
)
from projects.stageinteractor.modeling.filter_reuse import DynamicFilters
from projects.stageinteractor.modeling.sampling import SamplingPoints, level_weights

PROJECT = Path(__file__).resolve().parents[2] / "projects/stageinteractor"
BASE = str(PROJECT / "configs/stageinteractor_r50_12ep.py")
ADAMIXER = str(PROJECT / "configs/adamixer_r50_12ep.py")
ROW = re.compile(r"^\| ((?:main )?\d) \| ([^|]*) \| ([\d.]+) \| (?:`([^`]*)`|none) \|$", re.M)
# table, row, paper's AP, override
ROWS = ROW.findall((PROJECT / "README.md").read_text().partition("## Ablations")[2])
PUBLISHED = {  # supplement, tables 1 to 5, and main paper, table 6
    "1": [44.1, 43.5, 43.9, 44.8],
    "2": [43.9, 44.0, 43.7, 44.8],
    "3": [43.7, 44.1, 44.8],
    "4": [42.5, 42.6, 44.6, 44.8],
    "5": [44.1, 44.8, 44.8, 44.8],
    "main 6": [42.6, 43.0, 44.1, 44.8],
}


def reduced(config, overrides=()):
    """The model of a config with its real structure: six stages, but small ones."""
    cfg = load_config(config, list(overrides)).model
    lite = LazyConfig.load(str(PROJECT / "configs/models/stageinteractor_lite0.py")).model
    cfg.backbone, cfg.neck = lite.backbone, lite.neck
    cfg.query_generator.num_queries = 12
    cfg.decoder.update(
        num_classes=5, embed_dim=32, feature_dim=16, ffn_dim=32, out_points=8
    )
    cfg.neck.out_channels = 16
    return instantiate(cfg)


def images():
    corner = torch.rand(3, 2) * 40
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.cat([corner, corner + 16], dim=1))
    instances.gt_classes = torch.randint(5, (3,))
    return [{"image": torch.rand(3, 64, 96) * 255, "instances": instances}]


def randomize(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_every_published_row_is_listed_once():
    listed = {}
    for table, _, ap, _ in ROWS:
        listed.setdefault(table, []).append(float(ap))
    assert listed == PUBLISHED
    assert sum(not override for *_, override in ROWS) == 6  # the default


@pytest.mark.parametrize("override", sorted({override for *_, override in ROWS}))
def test_every_row_trains_a_step_and_evaluates(override):
    model = reduced(BASE, override.split())
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    batch = images()
    for _ in range(2):  # what starts at zero blocks most gradients in the first
        losses = model.train()(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert len(losses) == 18 and all(loss.isfinite() for loss in losses.values())
    unmoved = [name for name, value in model.named_parameters()
               if value.requires_grad and torch.equal(value, before[name])]
    # The first boxes are all the same, so that the attention bias of stage 0 is constant.
    assert set(unmoved) <= {"decoder.stages.0.attention.iof_tau"}
    with torch.no_grad():
        found = model.eval()(batch)[0]["instances"]
    assert 0 < len(found) <= 12 and found.scores.isfinite().all()


def test_overrides_do_what_the_table_says():
    def stage(*overrides):
        return reduced(BASE, overrides).decoder.stages[5]

    rows = {(table, row): override.split() for table, row, _, override in ROWS}
    default = stage()
    assert type(default.mixing.channel_adapter).__name__ == "ChannelFilterAdapter"
    assert len(default.mixing.static_mixings) == 4
    for key in (("1", "neither"), ("main 6", "cross-stage labels")):
        mixing = stage(*rows[key]).mixing
        assert not mixing.static_mixings and mixing.spatial_adapter is None
        assert mixing.filter_sizes[1] == 8 * 32  # all rows are generated
    only_static = stage(*rows["1", "static mixing only"]).mixing
    assert len(only_static.static_mixings) == 4 and only_static.spatial_adapter is not None
    assert not list(only_static.channel_adapter.parameters())
    only_dynamic = stage(*rows["1", "reused filters only"]).mixing
    assert not list(only_dynamic.static_mixings.parameters())
    assert only_dynamic.channel_adapter.gates.weight.shape[1] == 32
    baseline = reduced(BASE, rows["4", "baseline, 32 points in the first stage"])
    assert baseline.decoder.stages[0].points.num_first == 4
    assert baseline.criterion.label_assigner.scope == (0, 0)
    assert baseline.criterion.label_assigner.iou_threshold == 0
    assert reduced(BASE, rows["5", "NMS at 0.75"]).nms_threshold == 0.75


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(UserError, match="model.decoder.mixing=Nothing: no class or function"):
        load_config(BASE, ["model.decoder.mixing=Nothing"])
    with pytest.raises(UserError, match="dotted name of a class or function"):
        load_config(BASE, ["model.decoder.mixing=3"])


def test_static_mixing_of_every_kind_starts_at_zero():
    features, residual = torch.randn(5, 8, 3), torch.randn(5, 8, 3)
    for kind in (ablations.ChannelStaticMixing, ablations.SpatialStaticMixing):
        module = kind(num_points=8, group_dim=3)
        assert not any(parameter.any() for parameter in module.parameters())
        torch.testing.assert_close(module(features, residual), residual)


def test_points_that_make_no_groups_are_refused():
    with pytest.raises(ValueError, match="30 .*K = 8"):
        ablations.GroupInitialisedSamplingPoints(num_points=30)
    for points in ([], [0, 0]):
        with pytest.raises(ValueError, match="a number for each stage"):
            reduced(BASE, [f"model.decoder.points_per_stage={points}".replace(" ", "")])


def test_channel_and_spatial_static_mixing_equal_loops():
    features, residual = torch.randn(5, 8, 3), torch.randn(5, 8, 3)  # 2 first-level points, K = 4
    channel = randomize(ablations.ChannelStaticMixing(num_points=8, group_dim=3))
    expected = residual.clone()
    for point in range(8):
        for layer in (channel.across, channel.within):
            expected[:, point] += layer(features[:, point])
    torch.testing.assert_close(channel(features, residual), expected)

    spatial = randomize(ablations.SpatialStaticMixing(num_points=8, group_dim=3))
    assert spatial.across.weight.shape == (2, 2) and spatial.within.weight.shape == (4, 4)
    grid, expected = features.view(5, 2, 4, 3), residual.view(5, 2, 4, 3).clone()
    for c in range(3):
        for k in range(4):
            expected[:, :, k, c] += spatial.across(grid[:, :, k, c])
        for p in range(2):
            expected[:, p, :, c] += spatial.within(grid[:, p, :, c])
    torch.testing.assert_close(spatial(features, residual), expected.view(5, 8, 3))


def test_only_static_and_only_dynamic_cascades():
    """Static only: Y <- ReLU(LN2(U)). Dynamic only: U = Y, without the residual."""
    sizes = {"embed_dim": 8, "feature_dim": 6, "num_groups": 2}
    sizes |= {"num_points": 8, "out_points": 4, "num_reused": 1}
    content, features = torch.randn(1, 3, 8), torch.randn(1, 3, 2, 8, 3)
    old = [DynamicFilters(torch.randn(6, 3, 3), torch.randn(6, 4, 8))]

    def norm_relu(x):
        return nn.functional.layer_norm(x, x.shape[-2:]).relu()

    for kind in (ablations.StaticOnlyMixing, ablations.DynamicOnlyMixing):
        module = randomize(kind(**sizes))
        own, channel_bias, spatial_bias = module.generate(content)
        rows = features.flatten(0, 2)
        y = norm_relu(rows @ own.channel + channel_bias)
        if kind is ablations.StaticOnlyMixing:
            y = norm_relu(module.static_mixings[0](y, rows))
        else:
            [(adapted, bias)] = module.channel_adapter(content, own.channel, [old[0].channel])
            y = norm_relu(y @ adapted.blend() + bias)
        reused = module.spatial_adapter(content, own.spatial, old[0].spatial)
        mixed = norm_relu(torch.cat([own.spatial, reused.blend()], 1) @ y + spatial_bias)
        expected = module.norm(content + module.out_proj(mixed.view(1, 3, -1)))
        result, filters = module(features, content, old)
        torch.testing.assert_close(result, expected)
        assert torch.equal(filters.channel, own.channel)


def test_vanilla_points_equal_the_formula():
    points = randomize(VanillaSamplingPoints(embed_dim=8, num_groups=2, num_points=3))
    content, xyzr = torch.randn(1, 2, 8), torch.randn(1, 2, 4) + torch.tensor([50, 40, 5, 0])
    offsets = points.offsets(content).view(2, 2, 3, 3)
    placed, shifted = points(content, xyzr)[0], randomize(AdaMixerSamplingPoints(
        embed_dim=8, num_groups=2, num_points=3))
    for n, (x, y, z, r) in enumerate(xyzr[0].tolist()):
        for g in range(2):
            for p in range(3):
                dx, dy, dz = offsets[n, g, p].tolist()
                expected = [x + 2 ** (z - r / 2) * dx, y + 2 ** (z + r / 2) * dy, z + dz]
                torch.testing.assert_close(placed[n, g, p], torch.tensor(expected))
    # AdaMixer weighs levels by -(z - log2(stride))^2 / 2; here a 1 is subtracted too.
    shifted.load_state_dict(points.state_dict())
    distance = (placed[..., 2:] - torch.tensor([4, 8, 16, 32]).log2()) ** 2
    weights = level_weights(shifted(content, xyzr)[0, ..., 2], (4, 8, 16, 32))
    torch.testing.assert_close(weights, (-distance / 2).softmax(-1))


def test_group_initialised_points_start_as_ours_do():
    """Offsets of K sub-points around each first-level point, the first of them on it."""
    vanilla = ablations.GroupInitialisedSamplingPoints(num_points=64)
    ours = SamplingPoints(num_points=64)
    content, xyzr = torch.randn(1, 1, 256), torch.tensor([[[50.0, 40, 5, 0]]])
    assert not vanilla.offsets.weight.any()
    offsets = vanilla.offsets.bias.view(4, 8, 8, 3)  # group, first-level point, sub-point
    spread = offsets[:, :, 1:, :2] - offsets[:, :, :1, :2]
    assert not offsets[..., 2].any()
    assert offsets[:, :, 0, :2].abs().max() <= 0.5 and offsets[:, :, 0, :2].std() > 0.25
    assert 0.33 < spread.abs().max() <= 0.5 / 2**0.5
    assert spread[0, 0].ne(spread[1, 0]).all() and spread[0, 0].ne(spread[0, 1]).all()
    # The same range of places as two-level points, at the same scale.
    a, b = vanilla(content, xyzr), ours(content, xyzr)
    assert a.shape == b.shape and torch.equal(a[..., 2], b[..., 2])


def test_nms_keeps_what_a_slow_loop_keeps():
    model = reduced(BASE, ["model._target_=projects.stageinteractor.modeling.ablations."
                           "StageInteractorWithNMS", "model.nms_threshold=0.4"])
    model.detections_per_image = 40
    logits = torch.randn(1, 20, 5)
    xyzr = torch.rand(1, 20, 4) * torch.tensor([10, 10, 0.5, 0.5]) + torch.tensor([20, 20, 4, 0])
    everything = super(ablations.StageInteractorWithNMS, model).detect(logits, xyzr, [(64, 64)])[0]
    kept = []
    for index in range(len(everything)):  # by falling score
        rivals = [k for k in kept if everything.pred_classes[k] == everything.pred_classes[index]]
        boxes = everything.pred_boxes.tensor
        overlaps = [iou(boxes[k].tolist(), boxes[index].tolist()) for k in rivals]
        if all(overlap <= 0.4 for overlap in overlaps):
            kept.append(index)
    found = model.detect(logits, xyzr, [(64, 64)])[0]
    assert 5 < len(kept) < len(everything)
    torch.testing.assert_close(found.scores, everything.scores[kept])
    torch.testing.assert_close(found.pred_boxes.tensor, everything.pred_boxes.tensor[kept])


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return shared / (sum(area) - shared)


def test_adamixer_is_built_of_its_own_parts_and_starts_as_released():
    decoder = instantiate(load_config(ADAMIXER, []).model.decoder)
    for stage in decoder.stages:
        assert type(stage.attention) is AdaMixerAttention
        assert type(stage.mixing) is AdaptiveMixing and stage.refine is refine_boxes_by_scale
        bias, bound = stage.attention.out_proj.bias, 1 / 16
        assert 0.9 * bound < bias.abs().max() <= bound
        offsets = stage.points.offsets.bias.view(4, 32, 3)
        assert (offsets[..., 2] == -1).all()
        assert -0.5 <= offsets[..., :2].min() < -0.45 and 0.45 < offsets[..., :2].max() <= 0.5
        assert not stage.points.offsets.weight.any()
        assert not stage.mixing.filter_generator.weight.any()
        assert 0.9 * bound < stage.mixing.filter_generator.bias.abs().max() <= bound
        xavier = (6 / (32768 + 256)) ** 0.5
        assert 0.99 * xavier < stage.mixing.out_proj.weight.abs().max() <= xavier
    with pytest.raises(ValueError, match="reuses nothing"):
        AdaptiveMixing(num_reused=1)


def test_adamixer_moves_boxes_by_their_scale():
    xyzr, deltas = torch.tensor([10.0, 20, 3, 1]), torch.tensor([0.5, -0.25, 0.1, 0.2])
    expected = torch.tensor([14.0, 18, 3.1, 1.2])
    torch.testing.assert_close(refine_boxes_by_scale(xyzr, deltas), expected)
