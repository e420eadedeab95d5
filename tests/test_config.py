"""Mistakes on the command line: one clear line each, before anything starts."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from projects.stageinteractor.engine import load_config, select_device
from projects.stageinteractor.engine.optim import BackboneLRFactor
from projects.stageinteractor.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py")


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("train.max_iter=5", "train.max_iter", 5),
        ("optimizer.lr=1", "optimizer.lr", 1),
        ("optimizer.betas=[0.9,0.95]", "optimizer.betas", [0.9, 0.95]),
        ("model.decoder.points_per_stage=[32,32]", "model.decoder.points_per_stage", [32, 32]),
        ("model.decoder.num_classes=3", "model.decoder.num_classes", 3),
        ("model.criterion.alpha=0.5", "model.criterion.alpha", 0.5),  # an argument not in the file
        ("optimizer.foreach=true", "optimizer.foreach", True),
        ("train.output_dir='a b/c'", "train.output_dir", "a b/c"),
        ("train.wandb.params.name=first", "train.wandb.params.name", "first"),
        ("+train.note=hello", "train.note", "hello"),
        ("model.decoder.strides.0=8", "model.decoder.strides.0", 8),
    ],
)
def test_overrides_apply(override, key, value):
    assert OmegaConf.select(load_config(CONFIG, [override]), key) == value


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_itr=5", "unknown config key train.max_itr: did you mean train.max_iter"),
        ("model.decoder.num_clases=3", "did you mean model.decoder.num_classes"),
        ("model.criterion.lable_assigner.iou_threshold=0.3", "did you mean model.criterion.label"),
        ("nonsense=1", r"unknown config key nonsense: \+key=value adds"),
        ("train.max_iter=many", "train.max_iter=many: expected an integer.* got text"),
        ("train.max_iter=1.5", "expected an integer"),
        ("train.amp.enabled=1", "expected true or false"),
        ("optimizer.lr=true", "expected a number"),
        ("model.decoder.points_per_stage=32", "expected a list"),
        ("train.output_dir=[a]", "expected text"),
        ("train.amp=on", "expected a dictionary"),
        ("model.criterion.alpha=high", "expected a number"),
        ("train.max_iter", "cannot read the override 'train.max_iter'"),
        ("--resume", "cannot read the override '--resume'"),
        ("~train.max_iter", "deleting is not supported"),
        ("model.decoder.strides.7=8", "unknown config key model.decoder.strides.7"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(CONFIG, [override])
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("path", ["", "nowhere.py"])
def test_a_config_file_that_is_not_there(path):
    with pytest.raises(UserError, match="no config"):
        load_config(path, [])


@pytest.mark.parametrize("name, text, message", [
    ("model.pth", "", "model.pth is no config, which ends in .py or .yaml: a checkpoint"),
    ("broken.py", "a = 1\nb = (", "broken.py has syntax error! Line 2: .*never closed"),
    ("broken.yaml", "a: [1", "broken.yaml: .* line 1"),
])
def test_a_config_file_that_is_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / name), [])


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto") == select_device("cpu") == "cpu"
    with pytest.raises(UserError, match="train.device=cuda is not available here; there is: cpu"):
        select_device("cuda")
    with pytest.raises(UserError, match="train.device=tpu"):
        select_device("tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == "cuda" and select_device("cuda:1") == "cuda:1"


def test_backbone_learning_rate():
    factor = BackboneLRFactor(0.1)
    assert factor("backbone.res3.weight") == factor("module.backbone.res3.weight") == 0.1
    assert factor("decoder.stages.0.weight") == 1
