"""Checkpoints that detrex loads with Detectron2's own checkpointer."""

import pickle
import re

import convert
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate

from projects.stageinteractor.config.overrides import load_config
from support.detrex_runs import CONFIGS, ROOT, load
from support.released_files import light_state, save_released
from support.zoo_names import detectron2_name


def small_decoder(name):
    """The model of a config, whose backbone is whole."""
    options = ["points_per_stage=[4]", "out_points=4", "embed_dim=32", "feature_dim=32",
               "ffn_dim=8", "first_reuse_stage=1"]
    return instantiate(load_config(
        str(ROOT / CONFIGS / f"{name}.py"), [f"model.decoder.{option}" for option in options]
    ).model)


def not_loaded(model, expected, file, query=""):
    """Names of weights that are not what is expected after a file was loaded."""
    DetectionCheckpointer(model).load(f"{file}{query}")
    state = model.state_dict()
    return {name for name, value in expected.items() if not torch.equal(state[name], value)}


def drawn_backbone(model):
    """Other values for the weights of a backbone, by their names in the model."""
    return {name: torch.rand_like(value) for name, value in model.state_dict().items()
            if name.startswith("backbone.") and value.is_floating_point()}


def torchvision_name(name):
    """Of a weight in a ResNet of Detectron2."""
    name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name.removeprefix("stem."))
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"conv(\d)\.norm", r"bn\1", name)


def test_the_r50_of_the_model_zoo_fills_the_backbone(tmp_path):
    model = small_decoder("stageinteractor_r50_12ep")
    expected = drawn_backbone(model)
    weights = {name.removeprefix("backbone."): v.numpy() for name, v in expected.items()}
    weights |= {"stem.fc.weight": np.zeros((1000, 2048)), "stem.fc.bias": np.zeros(1000)}
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps(
        {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    ))
    assert not_loaded(model, expected, file) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stageinteractor_lite0_trees", "stageinteractor_swin_s_300q_36ep"]
)
def test_timm_and_swin_fill_the_backbone_by_the_ends_of_their_names(name, tmp_path):
    model = small_decoder(name)
    expected = drawn_backbone(model)
    weights = {re.sub(r"^backbone\.(body\.)?", "", name): v for name, v in expected.items()}
    weights |= {"norm.weight": torch.zeros(768), "head.weight": torch.zeros(1000, 768)}
    torch.save({"model": weights}, tmp_path / "model.pth")
    assert not_loaded(model, expected, tmp_path / "model.pth", "?matching_heuristics=True") == set()
    # prepare_trees.py writes that into the file of the small model; Swin's has to be asked so.
    assert len(not_loaded(small_decoder(name), expected, tmp_path / "model.pth")) > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stageinteractor_r101_300q_36ep", "stageinteractor_x101_dcn_300q_36ep"]
)
def test_a_file_of_torchvision_has_to_be_renamed_first(name, tmp_path):
    """As Detectron2's `convert-torchvision-to-d2.py` does it."""
    model = small_decoder(name)
    expected = {name: value for name, value in drawn_backbone(model).items()
                if ".offset." not in name}
    weights = {torchvision_name(name.removeprefix("backbone.")): value
               for name, value in expected.items()}
    torch.save(weights, tmp_path / "raw.pth")
    for query in ("", "?matching_heuristics=True"):
        assert len(not_loaded(model, expected, tmp_path / "raw.pth", query)) > 400
    renamed = {"model": {detectron2_name(name): v.numpy() for name, v in weights.items()}}
    (tmp_path / "renamed.pkl").write_bytes(pickle.dumps(
        {**renamed, "__author__": "torchvision", "matching_heuristics": True}
    ))
    assert not_loaded(model, expected, tmp_path / "renamed.pkl") == set()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["r50", "swin_s"])
def test_a_released_checkpoint_loads_once_it_is_converted(backbone, tmp_path):
    released = save_released(tmp_path, light_state(backbone))
    file = tmp_path / "here.pth"
    convert.main(["checkpoint", released, str(file)])
    name = "r50_12ep" if backbone == "r50" else "swin_s_300q_36ep"
    cfg = load_config(str(ROOT / CONFIGS / f"stageinteractor_{name}.py"), [])
    model = instantiate(cfg.model)
    with pytest.raises(ValueError, match="Unsupported type found in checkpoint"):
        DetectionCheckpointer(model).load(released)
    expected = load(file)["model"]
    assert not_loaded(model, expected, file) == set()
    lost = set(model.state_dict()) - set(expected)
    assert all(name.endswith(("num_batches_tracked", "relative_position_index")) for name in lost)
