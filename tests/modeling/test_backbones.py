"""Backbones: deformable convolutions equal a loop over taps; who is deformable, who is trained."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import swin
from torch import nn

from projects.stageinteractor.inference.opening import fold_norms
from projects.stageinteractor.modeling.backbones import SwinTransformer, TimmBackbone
from projects.stageinteractor.modeling.backbones.resnext_dcn import DeformableConv2d

MODELS = Path(__file__).resolve().parents[2] / "projects/stageinteractor/configs/models"


def backbone(name, **changes):
    cfg = LazyConfig.load(str(MODELS / f"{name}.py")).model.backbone
    cfg.update(changes)
    return instantiate(cfg)


def pixel(image, y, x):
    """Channels (C,) of an image (C, H, W) between pixel centres at integers, zero outside."""
    top, left = math.floor(y), math.floor(x)
    value = torch.zeros(len(image))
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return value


@pytest.mark.parametrize("stride, groups", [(1, 1), (1, 2), (2, 2)])
def test_deformable_convolution_equals_a_loop_over_taps(stride, groups):
    """Offsets are (dy, dx) a tap; all channels of a grouped convolution share them."""
    conv = DeformableConv2d(
        4, 6, 3, stride, 1, groups=groups, bias=False, norm=nn.BatchNorm2d(6).eval()
    )
    nn.init.normal_(conv.offset.weight, std=0.2)
    nn.init.normal_(conv.offset.bias, std=0.7)
    image = torch.randn(1, 4, 6, 7)
    offsets = conv.offset(image)[0].view(9, 2, 6 // stride, -1)
    expected = torch.zeros(6, *offsets.shape[2:])
    for y in range(expected.shape[1]):
        for x in range(expected.shape[2]):
            for tap in range(9):
                dy, dx = offsets[tap, :, y, x].tolist()
                row, column = y * stride - 1 + tap // 3 + dy, x * stride - 1 + tap % 3 + dx
                seen = pixel(image[0], row, column).view(groups, -1)
                weight = conv.weight[:, :, tap // 3, tap % 3].view(groups, 6 // groups, -1)
                expected[:, y, x] += torch.einsum("goc,gc->go", weight, seen).flatten()
    expected = expected / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(conv(image)[0], expected, atol=1e-5, rtol=1e-4)


def test_resnext_is_deformable_from_res3_on_in_strided_blocks_too():
    model = backbone("stageinteractor_x101_dcn")
    for name, blocks, deformable in (
        ("res2", 3, False), ("res3", 4, True), ("res4", 23, True), ("res5", 3, True)
    ):
        stage = getattr(model, name)
        assert len(stage) == blocks
        for block in stage:
            assert type(block.conv2) is (DeformableConv2d if deformable else Conv2d)
            assert block.conv2.groups == 32
        assert [block.conv2.stride[0] for block in stage] == [1 + deformable] + [1] * (blocks - 1)
    assert model.res3[0].conv2.weight.shape == (256, 8, 3, 3)


def test_offsets_start_at_zero_and_learn():
    conv = DeformableConv2d(4, 4, 3, 1, 1, bias=False, norm=nn.Identity())
    image = torch.randn(1, 4, 6, 6)
    plain = nn.functional.conv2d(image, conv.weight, padding=1)
    torch.testing.assert_close(conv(image), plain)
    conv(image).square().sum().backward()
    assert conv.offset.weight.grad.any() and conv.offset.bias.grad.any()


@pytest.mark.parametrize("name", ["stageinteractor_r101", "stageinteractor_x101_dcn"])
def test_stem_and_res2_are_frozen_and_statistics_stay(name):
    model = backbone(name).train()
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}
    assert model.res3[0].conv2.norm.weight.requires_grad
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_swin_has_no_stochastic_depth_unless_asked():
    """As released; all of it is trained, and its maps have the widths that the neck expects."""
    image = torch.randn(1, 3, 64, 96)
    model = backbone("stageinteractor_swin_s").train()
    assert all(p.requires_grad for p in model.parameters())
    maps = model(image)
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)
    ]
    torch.testing.assert_close(maps["p3"], model(image)["p3"])
    dropping = backbone("stageinteractor_swin_s", drop_path_rate=0.9).train()
    assert not torch.allclose(dropping(image)["p3"], dropping(image)["p3"])


@pytest.mark.parametrize(
    "name", ["stageinteractor_r50", "stageinteractor_x101_dcn", "faster_rcnn_lite0"]
)
def test_folded_norms_give_the_same_features(name):
    """Those of deformable convolutions and of timm's EfficientNets, too."""
    model = backbone(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                nn.init.normal_(values, std=0.2)
            for values in (module.running_var, module.weight.data):
                nn.init.uniform_(values, 0.7, 1.3)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        found = fold_norms(model)(image)
    kinds = nn.BatchNorm2d, FrozenBatchNorm2d
    assert not any(isinstance(module, kinds) for module in model.modules())
    for level, value in found.items():
        scale = expected[level].abs().max()
        torch.testing.assert_close(value / scale, expected[level] / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ape", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (224, 256), (97, 131)])
def test_swin_is_detectrons(size, ape):
    """Forward and backward, also where maps are no multiples of a window or of a patch."""
    options = {
        "embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4], "window_size": 7,
        "drop_path_rate": 0.0, "ape": ape, "pretrain_img_size": 64,
    }
    theirs, ours = (kind(**options).eval() for kind in (swin.SwinTransformer, SwinTransformer))
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    images = torch.randn(2, 3, *size)
    maps = [backbone(images) for backbone in (theirs, ours)]
    for backbone, found in zip((theirs, ours), maps):
        sum((level * level.detach().sign()).sum() for level in found.values()).backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
    assert maps[0].keys() == maps[1].keys()
    for name, expected in maps[0].items():
        assert torch.allclose(maps[1][name], expected, rtol=1e-4, atol=1e-4), name
    for name, expected in gradients[0].items():
        difference = (gradients[1][name] - expected).abs().max()
        assert difference <= 1e-3 * expected.abs().max() + 1e-6, name


def test_swin_keeps_out_features():
    few = SwinTransformer(
        embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 4], out_indices=(1, 3)
    )
    assert [*few(torch.randn(1, 3, 64, 64))] == ["p1", "p3"]


def test_names_of_timm_models_are_its_own():
    with pytest.raises(ValueError, match="hf-hub:a/b"):
        TimmBackbone("hf-hub:a/b")
