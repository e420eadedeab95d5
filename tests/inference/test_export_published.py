"""Exact, when exported too: the published models with golden weights, on real photographs."""

import export
import onnx
import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from projects.stageinteractor.analysis.recorded import load_golden_weights
from projects.stageinteractor.inference import load_detector
from projects.stageinteractor.inference.export.exported_model import load_openvino
from support.exports import SIZES, assert_agreement, photographs
from support.golden_figures import CONFIGS
from support.runtimes import unreadable

MODELS = {  # heavier ones see fewer pictures
    "stageinteractor_r50_12ep": SIZES,
    "stageinteractor_swin_s_300q_36ep": SIZES,
    "stageinteractor_x101_dcn_300q_36ep": SIZES[:3],
    "adamixer_r50_12ep": SIZES[:3],
}
LACKING = {  # what is not in every runtime
    "stageinteractor_swin_s_300q_36ep": ["DirectML has no Mod of INT64"],
    "stageinteractor_x101_dcn_300q_36ep": [
        "DirectML has no DeformConv of FLOAT", "OpenVINO has no DeformConv of FLOAT"
    ],
}
OPTIONS = ["dataloader.test.mapper.augmentations=[]", "train.device=cpu"]


@pytest.mark.parametrize("config", [
    pytest.param(name, marks=pytest.mark.rare if "_x101_" in name else pytest.mark.slow)
    for name in MODELS
])
def test_a_published_model_agrees(config, tmp_path):
    """With its ONNX model on onnxruntime and on OpenVINO."""
    sizes = MODELS[config]
    path = str(CONFIGS / f"{config}.py")
    model = instantiate(LazyConfig.load(path).model)
    load_golden_weights(model)
    torch.save({"model": model.state_dict()}, tmp_path / "golden.pth")
    del model
    files = ["--config-file", path, "--checkpoint", str(tmp_path / "golden.pth")]
    try:
        export.main([*files, "--format", "onnx", "--output", str(tmp_path / "out"), *OPTIONS])
    except SystemExit as ended:
        if "Could not find an implementation for DeformConv" not in str(ended):
            raise
        pytest.skip("this onnxruntime has no deformable convolution, and the command says so")
    model = load_detector(tmp_path / "golden.pth", path, OPTIONS)
    path = tmp_path / "out/model.onnx"
    assert unreadable(onnx.load(path)) == LACKING.get(config, [])
    exported = load_detector(path)
    assert_agreement(model, exported, photographs(sizes), 50)
    if "OpenVINO" not in str(LACKING.get(config)):
        exported.model.run, _ = load_openvino(str(path))
        assert_agreement(model, exported, photographs(sizes), 50)
    for file in tmp_path.rglob("*.*"):  # half a gigabyte each
        if file.is_file():
            file.unlink()
