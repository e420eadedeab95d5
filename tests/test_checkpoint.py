"""Checkpoints: nothing in them is executed, released ones load, broken ones are named."""

import os
import pickle
from collections import OrderedDict
from urllib.error import URLError

import numpy as np
import pytest
import torch
from golden_weights import released_entry
from torch import nn

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.checkpoint.released import convert_released
from projects.stageinteractor.errors import UserError


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
    with pytest.raises(UserError, match="cannot load .*model"):
        SafeCheckpointer(new_model()).load(str(file))
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_broken_file_is_named(tmp_path, content, suffix):
    file = tmp_path / f"broken.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot load .*broken.{suffix}"):
        SafeCheckpointer(new_model()).load(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="no checkpoint nowhere.pth"):
        SafeCheckpointer(new_model()).load("nowhere.pth")


def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    url = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    with pytest.raises(UserError, match=f"cannot fetch {url} into {tmp_path}: Name or service"):
        SafeCheckpointer(new_model()).load(url)


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
    assert len(convert_released(released)) == 2


def test_golden_values_depend_on_the_name_alone():
    a, b = (released_entry(f"{name}.weight", (3, 2)) for name in "ab")
    assert not torch.equal(a, b) and torch.equal(a, released_entry("a.weight", (3, 2)))
