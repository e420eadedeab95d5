"""Checkpoints: nothing in them is executed, released ones load, broken ones are named."""

import os
import pickle
import re
import warnings
from collections import OrderedDict
from http.client import RemoteDisconnected
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.config import LazyConfig, instantiate
from golden_weights import released_entry, released_shapes
from torch import nn

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.checkpoint.released import convert_released, project_name
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.modeling.backbones import TimmBackbone

CONFIGS = Path(__file__).resolve().parents[1] / "projects/stageinteractor/configs"


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def new_model():
    return nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.Linear(3, 1)))


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth"])
def test_a_malicious_file_does_not_run(tmp_path, suffix):
    trace, file = tmp_path / "trace", tmp_path / f"model.{suffix}"
    content = {"model": {"first.weight": Malicious(trace)}}
    if suffix == "pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save({**content, "model_state": {}}, file)
    refusal = r"cannot load .*model\S+: it refers to \S*mkdir\n.*never code"
    with pytest.raises(UserError, match=refusal):
        SafeCheckpointer(new_model()).load(str(file))
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", b"hello\n", b"<html>404</html>", b'{"a": 1}', b"PK\x03\x04broken"],
)
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_broken_file_is_named(tmp_path, content, suffix):
    file = tmp_path / f"broken.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot load .*broken.{suffix}: it is no checkpoint"):
        SafeCheckpointer(new_model()).load(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="no checkpoint nowhere.pth"):
        SafeCheckpointer(new_model()).load("nowhere.pth")


@pytest.mark.parametrize(
    "path, url",
    [
        ("detectron2://ImageNetPretrained/torchvision/{}.pkl",
         "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/{}.pkl"),
        ("https://download.pytorch.org/models/{}.pth",
         "https://download.pytorch.org/models/{}.pth"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [URLError("Name or service not known"), TimeoutError("timed out"), RemoteDisconnected("gone")],
)
def test_without_a_network_the_message_says_what_to_do(path, url, error, monkeypatch, tmp_path):
    """It names the address, and a place that works: a file saved there is taken."""
    def unreachable(*_, **__):
        raise error

    # A name of its own for each case: a process remembers what it has fetched.
    path, url = (text.format(type(error).__name__) for text in (path, url))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        SafeCheckpointer(new_model()).load(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot fetch {path}") and url in first
    assert str(getattr(error, "reason", error)) in first
    assert "train.init_checkpoint=FILE" in second
    place = Path(re.search(r"save it as (\S+)", second)[1])
    assert place.is_relative_to(tmp_path) and place.name == path.rpartition("/")[2]
    place.parent.mkdir(parents=True, exist_ok=True)
    model, other = new_model(), new_model()
    content = {"model": {k: v.numpy() for k, v in other.state_dict().items()}}
    if place.suffix == ".pkl":
        place.write_bytes(pickle.dumps(content))
    else:
        torch.save({"model": other.state_dict()}, place)
    SafeCheckpointer(model).load(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_an_address_of_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="cannot fetch s3://a/b.pth: an address starts with http"):
        SafeCheckpointer(new_model()).load("s3://a/b.pth")


def test_saved_weights_load_again(tmp_path):
    model, other = new_model(), new_model()
    SafeCheckpointer(model, str(tmp_path)).save("model")
    SafeCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_model_zoo_pickle_of_arrays_loads(tmp_path, protocol):
    """Detectron2's ImageNet files: numpy arrays, matched by the ends of their names."""
    file, weight = tmp_path / "zoo.pkl", np.random.rand(3, 2).astype(np.float32)
    content = {"model": {"weight": weight}, "__author__": "zoo", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    model = nn.ModuleDict({"backbone": nn.Linear(2, 3)})
    SafeCheckpointer(model).load(str(file))
    np.testing.assert_array_equal(model["backbone"].weight.detach(), weight)


def test_a_released_checkpoint_is_recognised(tmp_path):
    """In mmdet's format; dead entries are dropped, everything else keeps its values."""
    prefix = "roi_head.bbox_head.0."
    released = {
        f"{prefix}dynamic_conv.parameter_generator.weight": torch.randn(4, 2),
        f"{prefix}dynamic_conv.parameter_generator.bias": torch.randn(4),
        f"{prefix}dynamic_conv.subbox_score_list.0.weight": torch.randn(2, 2),
        f"{prefix}iou_snyc_statistics.running_mean": torch.zeros(1),
    }
    file = tmp_path / "released.pth"
    torch.save({"state_dict": released, "meta": {"epoch": 12}}, file)

    def nest(names, leaf):
        for name in reversed(names):
            leaf = nn.ModuleDict({name: leaf})
        return leaf

    model = nest(["decoder", "stages", "0", "mixing", "filter_generator"], nn.Linear(2, 4))
    SafeCheckpointer(model).load(str(file))
    values = list(released.values())
    assert torch.equal(next(model.parameters()), values[0])
    assert convert_released(released).dropped == list(released)[2:]


MODELS = {
    "r50": "stageinteractor_r50_12ep",
    "x101_dcn": "stageinteractor_x101_dcn_300q_36ep",
    "swin_s": "stageinteractor_swin_s_300q_36ep",
    "adamixer_r50": "adamixer_r50_12ep",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_released_checkpoint_fills_the_whole_model(name, tmp_path, caplog):
    """Directly, as train.init_checkpoint does, with a line in the log."""
    shapes = released_shapes(name)
    # Every entry repeats one number, so that the file stays small.
    released = {
        entry: released_entry(entry, shape) if "init_proposal_bboxes" in entry
        else torch.full((), index % 1000).expand(shape)
        for index, (entry, shape) in enumerate(shapes.items())
    }
    torch.save({"meta": {"epoch": 12}, "state_dict": released}, tmp_path / "released.pth")
    model = build(MODELS[name]).model
    with caplog.at_level("INFO"):
        checkpointer = SafeCheckpointer(instantiate(model), strict=True)
        checkpointer.logger.propagate = True
        checkpointer.load(str(tmp_path / "released.pth"))
    method = "AdaMixer" if "adamixer" in name else "StageInteractor"
    assert f"is a released {method} checkpoint: " in caplog.text
    assert "no place" not in caplog.text
    loaded = checkpointer.model.state_dict()
    for entry, place in ((entry, project_name(entry)) for entry in shapes):
        if place is not None:
            assert torch.equal(loaded[place].cpu(), released[entry]), entry


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


def load_into(model, content, file):
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    checkpointer = SafeCheckpointer(model)
    checkpointer.logger.propagate = True
    incompatible = []
    load = checkpointer._load_model
    checkpointer._load_model = lambda x: incompatible.append(load(x)) or incompatible[-1]
    checkpointer.load(str(file))
    return incompatible[0]


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


def detectron2_name(name):
    name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


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


@pytest.mark.parametrize(
    "content",
    [
        {"patch_embed.proj.weight": torch.ones(1)},
        {"model": {"roi_heads.box_head.fc1.weight": torch.ones(3, 2)}},
        {"model": {"first.weight": torch.ones(7, 7)}},
        {},
    ],
)
def test_weights_of_another_model_are_refused(content, tmp_path):
    """Instead of training from random weights unnoticed."""
    with pytest.raises(UserError, match="nothing for this model"):
        load_into(new_model(), content, tmp_path / "other.pth")


@pytest.mark.parametrize("content", [{"model": None}, {"model": {1: torch.ones(1)}}, {"a": "b"}])
def test_what_is_no_dictionary_of_tensors_is_named(content, tmp_path):
    with pytest.raises(UserError, match="other.pth holds no weights by name"):
        load_into(new_model(), content, tmp_path / "other.pth")


def test_names_of_several_processes_load(tmp_path):
    """DistributedDataParallel puts "module." in front of them. The path has a query too."""
    model, other = new_model(), new_model()
    state = {f"module.{name}": value for name, value in other.state_dict().items()}
    torch.save({"model": state}, tmp_path / "parallel.pth")
    SafeCheckpointer(model).load(str(tmp_path / "parallel.pth") + "?matching_heuristics=True")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "wrap, name",
    [
        (lambda state: {"model_state": state}, "pycls.pyth"),
        (lambda state: {"blobs": {**state, "first.weight_momentum": np.ones(1)}}, "caffe2.pkl"),
    ],
)
def test_older_formats_that_detectron2_knows(wrap, name, tmp_path):
    model, other = new_model(), new_model()
    state = {k: v if name.endswith("pyth") else v.numpy() for k, v in other.state_dict().items()}
    load_into(model, wrap(state), tmp_path / name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_pickles_of_numpy_1_and_2_load(tmp_path):
    """They name the place of a function differently; a copy is written with the other name."""
    weight = np.random.rand(3, 2).astype(np.float32)
    written = pickle.dumps({"model": {"first.weight": weight}}, protocol=2)
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    assert (old in written) != (new in written)
    for text in {written, written.replace(old, new), written.replace(new, old)}:
        (tmp_path / "zoo.pkl").write_bytes(text)
        model = new_model()
        SafeCheckpointer(model).load(str(tmp_path / "zoo.pkl"))
        np.testing.assert_array_equal(model.first.weight.detach(), weight)


def test_class_names_are_saved_beside_the_weights(tmp_path):
    SafeCheckpointer(new_model(), str(tmp_path), class_names=["cat", "dog"]).save("model")
    assert torch.load(tmp_path / "model.pth")["class_names"] == ["cat", "dog"]
    assert not list(tmp_path.glob("*.tmp"))


def test_golden_values_depend_on_the_name_alone():
    a, b = (released_entry(f"{name}.weight", (3, 2)) for name in "ab")
    assert not torch.equal(a, b) and torch.equal(a, released_entry("a.weight", (3, 2)))
