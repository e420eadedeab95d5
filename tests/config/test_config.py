"""Mistakes on the command line: one clear line each, before anything starts."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from projects.stageinteractor.config.device import select_device
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.engine.optim import BackboneLRFactor
from projects.stageinteractor.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py")


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("train.max_iter=5", "train.max_iter", 5),
        ("optimizer.lr=1", "optimizer.lr", 1),
        ("optimizer.betas=[0.9,0.95]", "optimizer.betas", [0.9, 0.95]),
        ("model.decoder.points_per_stage=[32,32]", "model.decoder.points_per_stage", [32, 32]),
        ("model.decoder.num_classes=3", "model.decoder.num_classes", 3),
        ("model.size_divisibility=64", "model.size_divisibility", 64),  # not in the file
        ("optimizer.foreach=true", "optimizer.foreach", True),
        ("train.output_dir='a b/c'", "train.output_dir", "a b/c"),
        ("train.wandb.params.name=first", "train.wandb.params.name", "first"),
        ("+train.wandb.params.group=first", "train.wandb.params.group", "first"),
        ("train.wandb.params={tags: [a]}", "train.wandb.params.tags", ["a"]),
        ("+train.cudnn_benchmark=true", "train.cudnn_benchmark", True),
        ("train.amp={enabled: true}", "train.amp.dtype", "bfloat16"),
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
        ("nonsense=1", "unknown config key nonsense: nothing reads it"),
        ("lr=0.001", r"did you mean optimizer\.lr\?"),
        ("train.lr=0.001", r"did you mean optimizer\.lr\?"),
        ("batch_size=4", r"did you mean dataloader\.train\.total_batch_size\?"),
        ("epochs=3", r"did you mean train\.epochs\?"),
        ("num_classes=3", r"did you mean model\.decoder\.num_classes\?"),
        ("workers=2", r"did you mean dataloader\.train\.num_workers\?"),
        ("fp16=true", r"did you mean train\.amp\.enabled\?"),
        ("train.wandb.params.group=a", r"\+train.wandb.params.group=VALUE adds it"),
        ("train.amp={enabld: true}", r"train\.amp\.enabld: did you mean train\.amp\.enabled\?"),
        ("train.amp={enabled: 1}", "train.amp.enabled=1: expected true or false"),
        ("+train.max_iter=many", "expected an integer"),
        ("train.max_iter=many", "train.max_iter=many: expected an integer.* got text"),
        ("train.max_iter=1.5", "expected an integer"),
        ("train.amp.enabled=1", "expected true or false"),
        ("optimizer.lr=true", "expected a number"),
        ("model.decoder.points_per_stage=32", "expected a list"),
        ("train.output_dir=[a]", "expected text"),
        ("train.amp=on", "expected a dictionary"),
        ("model.size_divisibility=high", "expected an integer"),
        ("train.max_iter", "cannot read the override 'train.max_iter'"),
        ("--resume", "cannot read the override '--resume'"),
        ("~train.max_iter", "deleting is not supported"),
        ("train.output_dir=~/runs", "'train.output_dir='.*~/runs"),
        ("train.output_dir=/a b/c#1", "quote it: .*/a b/c#1"),
        ("model.decoder.strides.7=8", "unknown config key model.decoder.strides.7"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(CONFIG, [override])
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("key", [
    "lr", "train.foo", "nonsense.a.b", "model.foo", "model.decoder.foo", "optimizer.foo",
    "lr_multiplier.foo", "dataloader.foo", "dataset.foo", "model.decoder.strides.9",
])
def test_a_new_key_that_nothing_reads_is_refused(key):
    with pytest.raises(UserError, match=f"unknown config key {key}: "):
        load_config(CONFIG, [f"+{key}=1"])


def test_a_new_key_that_the_config_refers_to_is_read(tmp_path):
    text = f"from detectron2.config import LazyConfig\ncfg = LazyConfig.load({CONFIG!r})\n"
    text += "model, dataloader, train = cfg.model, cfg.dataloader, cfg.train\n"
    (tmp_path / "mine.py").write_text(text + "train.output_dir = '${folder}'\n")
    assert load_config(str(tmp_path / "mine.py"), ["+folder=here"]).train.output_dir == "here"


@pytest.mark.parametrize("path", ["", "nowhere.py"])
def test_a_config_file_that_is_not_there(path):
    with pytest.raises(UserError, match="no config"):
        load_config(path, [])


def test_the_config_file_that_was_meant_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").touch()
    for path, meant in [
        ("stageinteractor_r50_12ep", "configs/stageinteractor_r50_12ep.py"),
        ("configs/stageinteractor_r50_12epp.py", "configs/stageinteractor_r50_12ep.py"),
        ("confg.yaml", "config.yaml"),
        (str(tmp_path), f"{tmp_path}/config.yaml"),
    ]:
        with pytest.raises(UserError, match=rf"did you mean \S*{re.escape(meant)}\?"):
            load_config(path, [])
    with pytest.raises(UserError, match="has no dataloader, no train"):
        load_config(CONFIG.replace("stageinteractor_r50_12ep", "models/stageinteractor_r50"), [])


@pytest.mark.parametrize("name, text, message", [
    ("model.pth", "", "model.pth is not a config file .*checkpoint"),
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
    with pytest.raises(UserError, match="train.device=cuda is not available here; .*cpu"):
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
