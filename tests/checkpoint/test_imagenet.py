"""ImageNet weights: files of every known format fill the backbones, which then compute the same."""

import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.config import LazyConfig, instantiate
from torch import nn

from projects.stageinteractor.modeling.backbones import TimmBackbone
from support.checkpoints import load_into
from support.zoo_names import detectron2_name

CONFIGS = Path(__file__).resolve().parents[2] / "projects/stageinteractor/configs"


def build(config):
    return LazyConfig.load(str(CONFIGS / f"{config}.py"))


def backbone_of(config, depth=None):
    """A detector that is all backbone, as a config describes it."""
    cfg = build(config).model.backbone
    if depth:
        cfg.stages.depth = depth
    return nn.ModuleDict({"backbone": instantiate(cfg)}).eval()


def randomized(classifier):
    """With statistics and norms that differ from layer to layer."""
    for name, value in classifier.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.5, 1.5) if "var" in name or "weight" in name else value.normal_(0, 0.1)
    return classifier.eval()


def lost(incompatible):
    """Weights that did not get into the backbone; counters and Swin's indices are none."""
    computed = ("num_batches_tracked", "relative_position_index")
    return [k for k in incompatible.missing_keys if not k.endswith(computed)]


def assert_alike(actual, wanted):
    """Features of two implementations: rounding in proportion to the largest."""
    assert (actual - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def resnet_features(classifier, images):
    x = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(images))))
    features = []
    for layer in (classifier.layer1, classifier.layer2, classifier.layer3, classifier.layer4):
        features.append(x := layer(x))
    return features


RESNETS = {  # classifier of torchvision, our config, its depth
    "R-50": (torchvision.models.resnet50, "stageinteractor_r50_12ep", 50),
    "R-101": (torchvision.models.resnet101, "stageinteractor_r101_300q_36ep", 101),
    "X-101": (
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4
        ),
        "stageinteractor_x101_dcn_300q_36ep",
        None,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name, suffix", [
    ("R-50", "pth"), ("R-101", "pth"), ("X-101", "pth"), ("R-50", "pkl"), ("R-101", "pkl"),
])
def test_imagenet_resnets_load_and_compute_the_same_features(name, suffix, tmp_path):
    """torchvision's files (.pth; open-mmlab's ResNeXt has its names too), and Detectron2's
    converted ones (.pkl of numpy arrays). Deformable convolutions start as plain ones."""
    make, config, depth = RESNETS[name]
    classifier = randomized(make())
    content = classifier.state_dict()
    if suffix == "pkl":  # the names that Detectron2's converter of torchvision's files writes
        content = {detectron2_name(k): v.numpy() for k, v in content.items()
                   if not k.endswith("num_batches_tracked")}
        content = {"model": content, "__author__": "torchvision", "matching_heuristics": True}
    model = backbone_of(config, depth)
    incompatible = load_into(model, content, tmp_path / f"weights.{suffix}")
    offsets = [k for k in lost(incompatible) if ".offset." in k]
    assert lost(incompatible) == offsets and bool(offsets) == (name == "X-101")
    images = torch.randn(1, 3, 64, 96)
    expected = resnet_features(classifier, images)
    for actual, wanted in zip(model["backbone"](images).values(), expected):
        assert_alike(actual, wanted)




@torch.no_grad()
@pytest.mark.parametrize("author", ["timm", "Microsoft"])
def test_imagenet_swin_loads_and_computes_the_same_features(author, tmp_path, caplog):
    """Where timm merges patches before a stage, Microsoft's file has it after the one before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = randomized(
            # Smaller images differ: a single window is not shifted there, padding comes later.
            timm.create_model("swin_small_patch4_window7_224", img_size=448)
        )
        model = backbone_of("stageinteractor_swin_s_300q_36ep")
    content = classifier.state_dict()
    if author == "Microsoft":
        moved = {k: re.sub(r"^layers\.(\d)\.downsample",
                           lambda m: f"layers.{int(m[1]) - 1}.downsample", k) for k in content}
        content = {moved[k].replace("head.fc.", "head."): v for k, v in content.items()}
        content["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
        indices = {k: v for k, v in model.state_dict().items() if "position_index" in k}
        content |= {k.removeprefix("backbone."): v for k, v in indices.items()}
        content = {"model": content}
    incompatible = load_into(model, content, tmp_path / "swin.pth")
    assert "4 ImageNet entries have no place here" in caplog.text  # last norm, classifier
    # The norms of the outputs are the detector's own.
    assert lost(incompatible) == [f"backbone.norm{i}.{leaf}" for i in range(4)
                                  for leaf in ("weight", "bias")]
    # Rounding grows through 24 blocks, but not with twice the digits.
    classifier, model = classifier.double(), model.double()
    images = torch.randn(1, 3, 448, 448, dtype=torch.float64)
    expected = classifier.forward_intermediates(images, intermediates_only=True)
    for actual, wanted in zip(model["backbone"](images).values(), expected):
        wanted = nn.functional.layer_norm(wanted.movedim(1, -1), wanted.shape[1:2]).movedim(-1, 1)
        assert_alike(actual, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet50"])
def test_imagenet_files_of_timm_load(name, tmp_path, caplog):
    """Into the backbone that wraps timm's models; a ResNet's also into Detectron2's."""
    classifier = randomized(timm.create_model(name))
    model = nn.ModuleDict({"backbone": TimmBackbone(name)}).eval()
    caplog.clear()
    assert not lost(load_into(model, classifier.state_dict(), tmp_path / "timm.pth"))
    left = 7 if "lite0" in name else 2  # the classifier's last layers
    assert f"{left} ImageNet entries have no place here" in caplog.text
    images = torch.randn(1, 3, 64, 96)
    last = classifier.forward_intermediates(images, intermediates_only=True)[-1]
    assert_alike(list(model["backbone"](images).values())[-1], last)
    if name == "resnet50":
        model = backbone_of("stageinteractor_r50_12ep")
        assert not lost(load_into(model, classifier.state_dict(), tmp_path / "timm.pth"))
        assert_alike(model["backbone"](images)["res5"], last)
