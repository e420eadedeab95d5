"""Checkpoints: nothing in them is executed, released ones load, broken ones are named."""

import copy
import os
import pickle
import re
from collections import OrderedDict
from http.client import RemoteDisconnected
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from projects.stageinteractor.analysis.recorded import released_entry
from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.checkpoint.released import convert_released
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from support.checkpoints import load_into
from support.runs import ROOT

LITE = "projects/stageinteractor/configs/stageinteractor_lite0_trees.py"


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
    with pytest.raises(UserError, match=f"cannot load .*broken.{suffix}: it is not a whole"):
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


@pytest.mark.parametrize(
    "content",
    [
        {"patch_embed.proj.weight": torch.ones(1)},
        {"model": {"roi_heads.box_head.fc1.weight": torch.ones(3, 2)}},
        {"model": {"first.weight": torch.ones(7, 7)}},
        {},
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_weights_of_another_model_are_refused(content, suffix, tmp_path):
    """Instead of training from random weights unnoticed."""
    if suffix == "pkl":
        content = {name: value.numpy() for name, value in content.get("model", content).items()}
    with pytest.raises(UserError, match="no weight of the checkpoint fits"):
        load_into(new_model(), content, tmp_path / f"other.{suffix}")


@pytest.mark.parametrize("content", [{"model": None}, {"model": {1: torch.ones(1)}}, {"a": "b"}])
def test_what_is_no_dictionary_of_tensors_is_named(content, tmp_path):
    with pytest.raises(UserError, match="other.pth does not hold weights"):
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


@pytest.mark.parametrize("ours", [["b", "new", "a"], ["x", "y"], ["b", "a"]])
def test_classes_of_the_same_name_keep_their_rows(tmp_path, ours, caplog):
    """In any order and number. A run that resumes keeps all rows as they are."""
    torch.manual_seed(0)
    theirs, models = ["a", "b"], []
    for names in (theirs, ours):
        options = [f"model.decoder.num_classes={len(names)}"]
        models.append(instantiate(load_config(str(ROOT / LITE), options).model))
    first, second = models
    SafeCheckpointer(first, str(tmp_path), class_names=theirs).save("model")
    before, start = first.state_dict(), copy.deepcopy(second.state_dict())
    checkpointer = SafeCheckpointer(second, class_names=ours)
    with caplog.at_level("INFO"):
        checkpointer.load(str(tmp_path / "model.pth"), checkpointables=[])
    kept = len({*theirs} & {*ours})
    assert f"keep {kept} of {len(ours)} by name" in caplog.text
    heads = [key for key in start if ".class_head.3." in key]
    assert heads
    for key in heads:
        for number, name in enumerate(ours):
            row = before[key][theirs.index(name)] if name in theirs else start[key][number]
            assert torch.equal(second.state_dict()[key][number], row)
    for key in start.keys() - {*heads}:
        assert torch.equal(second.state_dict()[key], before[key])
    if len(ours) == 2:
        checkpointer.load(str(tmp_path / "model.pth"))
        assert all(torch.equal(second.state_dict()[key], before[key]) for key in heads)
